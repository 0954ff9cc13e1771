"""`python -m tests.bench [--quick] [--out DIRECTORY] [passes | handler …]`."""

from pathlib import Path

import click

from tests.bench import at_rest, changes, datapath, handler, joins, passes, report, scale, tunnels

# The mesh of 50 hosts comes last: once it is there it stays, and takes half a core at rest.
MEASUREMENTS = {
    "passes": passes.run,
    "handler": handler.run,
    "datapath": datapath.run,
    "tunnels": tunnels.run,
    "at-rest": at_rest.run,
    "joins": joins.run,
    "changes": changes.run,
}

# Takes minutes and most of a machine.
ON_REQUEST = {"scale": scale.run}


@click.command()
@click.option("--quick", is_flag=True, help="fewer sizes and repetitions")
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/benchmarks"), show_default=True)
@click.argument("names", nargs=-1, type=click.Choice([*MEASUREMENTS, *ON_REQUEST]))
def main(names: tuple[str, ...], out: Path, *, quick: bool) -> None:
    """Measure, print tables, and write JSON and figures."""
    every = MEASUREMENTS | ON_REQUEST
    # In this order, whatever was asked for: the joins would find the changes' mesh of 50 where they begin with 3.
    for name in [name for name in every if name in (names or MEASUREMENTS)]:
        result = every[name](quick=quick)
        click.echo(report.text(result))
        report.write([result], out)


if __name__ == "__main__":
    main()
