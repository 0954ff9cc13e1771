"""The command line without a mesh: help for persons, clear errors, exit codes."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from meshd.cli.main import Commands, main
from meshd.errors import ConflictError

COMMANDS = ["init", "join", "invite", "members", "status", "plan", "sync", "up", "down", "leave", "agent", "lab"]


def test_help_lists_the_commands_in_the_order_of_use() -> None:
    text = CliRunner().invoke(main, ["--help"]).output
    places = [text.index(f"\n  {command} ") for command in COMMANDS]
    assert places == sorted(places)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"meshd {command}" in result.output


def test_help_does_not_load_the_network_libraries() -> None:
    script = "import sys; from meshd.cli.main import main\ntry: main(['--help'])\nfinally: print(sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not [heavy for heavy in ("'pyroute2'", "'docker'", "'nacl'", "'requests'") if heavy in output]


@pytest.mark.parametrize("command", ["members", "status", "plan", "sync", "up", "down", "leave", "agent", "invite"])
def test_without_a_mesh_a_command_says_what_to_do(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--state-dir", str(tmp_path), command])
    assert result.exit_code == 2
    assert "run 'meshd init' or 'meshd join ADDRESS' first" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "--overlay", "172.20.0.1/16"], "has host bits set"),
        (["init", "--overlay", "fd00::/48"], "the overlay is IPv4"),
        (["init", "--bind", "barge1"], "'barge1' is not an IP address"),
        (["init", "--overlay", "172.20.0.0/16", "--subnet-length", "31"], "cannot be cut into /31"),
        (["init", "--name", "a b"], "the host name 'a b'"),
        (["init", "--bind", "203.0.113.77"], "has no address 203.0.113.77"),
        (["join", "10.10.10.101"], "no invitation: set MESHD_INVITE"),
        (["join", "10.10.10.101", "--invite", "meshd2.AAAA"], "the invitation is damaged"),
        (["join", "barge1", "--invite", "hello"], "this is not an invitation"),
    ],
)
@pytest.mark.root
def test_bad_input_is_named_and_leaves_nothing(arguments: list[str], message: str, tmp_path: Path) -> None:
    directory = tmp_path / "state"
    result = CliRunner().invoke(main, ["--state-dir", str(directory), *arguments], input="")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not directory.exists() or not list(directory.iterdir())


@pytest.mark.root
def test_not_root_says_so(tmp_path: Path) -> None:
    # The imports come first: an interpreter below /root is out of reach for anybody else.
    script = "import os, meshd.lifecycle.join; from meshd.cli.main import main; os.setuid(65534); main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "--state-dir", str(tmp_path), "init"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "run it as root" in done.stderr


@pytest.mark.parametrize("error", [ConflictError("a port is taken"), SystemExit(1)], ids=["an error", "a signal"])
def test_what_could_not_be_undone_is_said_after_the_error(error: BaseException) -> None:
    @click.group(cls=Commands)
    def commands() -> None:
        pass

    @commands.command()
    def fail() -> None:
        error.add_note("not undone: wg0")
        raise error

    result = CliRunner().invoke(commands, ["fail"])
    assert result.exit_code == 1
    assert result.output.endswith("Error: not undone: wg0\n")
