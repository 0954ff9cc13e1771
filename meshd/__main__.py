"""`python -m meshd`, for the service manager: it does not depend on where the `meshd` command is."""

from meshd.cli.main import main

if __name__ == "__main__":
    main(prog_name="meshd")
