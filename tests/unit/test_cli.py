"""The command line without a mesh: help for persons, clear errors, exit codes."""

import re
import subprocess
import sys
from ipaddress import IPv4Network, ip_address
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from meshd.cli.main import SECTIONS, Command, Commands, main
from meshd.cli.options import changed
from meshd.errors import ConflictError
from meshd.mesh import invitations
from meshd.state import authority
from meshd.state.authority import Terms
from meshd.state.directory import State
from meshd.state.settings import NUMBER, OPTIONS, UP
from tests.conftest import AUTHORITY

TABLE = [command for commands in SECTIONS.values() for command in commands]
COMMANDS = [command.name for command in TABLE]
AS_ROOT = ["init", "join 10.10.10.101", "up", "down", "leave", "plan", "sync", "renumber", "forget web", "revoke web"]


def test_help_shows_summaries_in_sections() -> None:
    """`meshd --help` shows each whole summary in its section, at 80 columns."""
    lines = CliRunner().invoke(main, ["--help"], terminal_width=80).output.splitlines()
    for title, commands in SECTIONS.items():
        first = lines.index(f"{title}:") + 1
        shown = [tuple(line.split(maxsplit=1)) for line in lines[first : first + len(commands)]]
        assert shown == [(command.name, command.summary) for command in commands]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", TABLE, ids=lambda command: command.name)
def test_summary_is_first_line_of_docstring(command: Command) -> None:
    """The summary in the table equals the first line of the command's own help."""
    found = main.get_command(click.Context(main), command.name)
    assert found is not None
    assert found.name == command.name
    assert found.callback is not None
    assert (found.callback.__doc__ or "").splitlines()[0] == command.summary


def test_unknown_command_is_error() -> None:
    """A command that does not exist is named in the error."""
    result = CliRunner().invoke(main, ["surprise"])
    assert result.exit_code == 2
    assert "No such command 'surprise'" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help_has_example(command: str) -> None:
    """The help of each command contains an example of that command."""
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"meshd {command}" in result.output


def test_up_takes_the_settings_that_it_changes_and_no_environment() -> None:
    """What is set for `meshd join` changes nothing at each `meshd up`; a fixed setting is there to be refused."""
    up = main.get_command(click.Context(main), "up")
    assert up is not None
    shown = {p.name: p for p in up.params if isinstance(p, click.Option) and p.name in OPTIONS}
    assert shown.keys() == OPTIONS.keys()
    assert {name for name, p in shown.items() if not p.hidden} == {n for n, o in OPTIONS.items() if o.later == UP}
    assert not [p for p in shown.values() if p.envvar]


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("", {}),
        ("--bind auto --mtu auto --allow none", {"bind": None, "mtu": None, "allow": ()}),
        ("--keepalive 0 --allow tcp/22 --allow all", {"keepalive": 0, "allow": ("tcp/22", "all")}),
        ("--bind 10.10.10.9 --no-docker", {"bind": ip_address("10.10.10.9"), "docker": False}),
    ],
)
def test_options_of_up_are_values(line: str, values: dict[str, object]) -> None:
    up = main.get_command(click.Context(main), "up")
    assert up is not None
    options = up.make_context("up", line.split()).params
    assert changed({name: options[name] for name in OPTIONS}) == values


@pytest.mark.parametrize("line", ["--mtu none", "--bind barge1", "--keepalive auto", "--docker maybe"])
def test_up_refuses_what_is_no_value(line: str) -> None:
    assert CliRunner().invoke(main, ["up", *line.split()]).exit_code == 2


def test_help_loads_no_network_libraries() -> None:
    """`meshd --help` does not import the slow network libraries."""
    script = "import sys; from meshd.cli.main import main\ntry: main(['--help'])\nfinally: print(sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not [heavy for heavy in ("'pyroute2'", "'docker'", "'nacl'", "'requests'") if heavy in output]


FOR_ANYBODY = ["members", "status", "agent", "invite"]
FOR_ROOT = [pytest.param(command, marks=pytest.mark.root) for command in ("plan", "sync", "up", "down", "leave")]


@pytest.mark.parametrize("command", [*FOR_ANYBODY, *FOR_ROOT])
def test_command_without_mesh_names_next_step(command: str, tmp_path: Path) -> None:
    """On a host without a mesh, each command fails, names `init` and `join`, and writes nothing."""
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
        (["init", "--name", "a b"], "--name must be 1 to 63 letters, digits, dots and dashes, not 'a b'"),
        (["init", "--subnet", "10.0.0.0/24"], "the subnet 10.0.0.0/24 is not a /24 of 172.20.0.0/16"),
        (["init", "--bind", "203.0.113.77"], "has no address 203.0.113.77"),
        (["init", "--bind", "127.0.0.1"], "--bind 127.0.0.1 is no address of a host: give the address by which other"),
        (["init", "--advertise", "127.0.0.1"], "--advertise 127.0.0.1 is no address of a host: give the address by"),
        (["init", "--advertise", "fe80::1"], "--advertise fe80::1 is local to one link"),
        (["init", "--advertise", "::ffff:203.0.113.5"], "is an IPv4 address in IPv6 spelling"),
        (["join", "10.10.10.101"], "no invitation: set MESHD_INVITE"),
        (["join", "10.10.10.101", "--invite", "meshd3.AAAA"], "the invitation is damaged"),
        (["join", "barge1", "--invite", "hello"], "this is not an invitation"),
    ],
)
@pytest.mark.root
def test_bad_input_error_names_value(arguments: list[str], message: str, tmp_path: Path) -> None:
    """A wrong argument is named in the error, and no file is written."""
    directory = tmp_path / "state"
    result = CliRunner().invoke(main, ["--state-dir", str(directory), *arguments], input="")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not directory.exists() or not list(directory.iterdir())


@pytest.mark.root
def test_command_requires_root(tmp_path: Path) -> None:
    """The message precedes the missing mesh, a missing or damaged invitation, and the prompt for it."""
    # The imports come first: an interpreter below /root is out of reach for anybody else.
    modules = ", ".join(sorted({command.module for command in TABLE}))
    script = f"""
import os, sys, {modules}
from click.testing import CliRunner
from meshd.cli.main import main
os.setuid(65534)
for line in sys.argv[1:]:
    result = CliRunner().invoke(main, ["--state-dir", {str(tmp_path)!r}, *line.split()])
    print(result.exit_code, result.output, end="")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *AS_ROOT], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(AS_ROOT)
    assert {line.partition(":")[0] for line in lines} == {"2 Error"}
    assert all("run it as root (sudo meshd" in line for line in lines)


@pytest.mark.root
def test_init_reads_settings_from_environment(tmp_path: Path) -> None:
    """An option that the command line does not have is an error of click; a value that it refuses has arrived."""
    bad = {"--subnet": "10.0.0.0/24", "--bind": "172.20.1.1", "--advertise": "172.20.1.1", "--overlay": "127.0.0.0/8"}
    bad |= {"--docker": "perhaps", "--daemon": "perhaps"}
    for option in OPTIONS.values():
        value = bad.get(option.name, "0" if option.kind is NUMBER and option.name != "--keepalive" else "-1")
        result = CliRunner().invoke(main, ["--state-dir", str(tmp_path / "x"), "init"], env={option.variable: value})
        assert result.exit_code == 2, option
        assert value in result.output, option
    assert not (tmp_path / "x").exists()


def test_join_example_has_current_invitation() -> None:
    """The example in the help of join has an invitation of this version."""
    help_text = CliRunner().invoke(main, ["join", "--help"]).output
    assert set(re.findall(r"meshd\d+\.", help_text)) == {invitations.PREFIX}


@pytest.mark.root
def test_join_refuses_subnet_before_writing(state: State, tmp_path: Path) -> None:
    """A subnet that the invitation does not allow is an error before anything is written or asked."""
    state.save_authority_key(AUTHORITY)
    offer = authority.invite(state, "web", Terms(subnets=(IPv4Network("172.20.7.0/24"),)))
    directory = tmp_path / "other"
    # Nobody has this address: the error precedes any connection, too.
    arguments = ["--state-dir", str(directory), "join", "192.0.2.1", "--no-docker", "--subnet", "172.20.8.0/24"]
    result = CliRunner().invoke(main, arguments, env={"MESHD_INVITE": invitations.encode(offer)})
    assert result.exit_code == 2, result.output
    assert "the invitation allows subnets of 172.20.7.0/24 only, not 172.20.8.0/24" in result.output
    assert not directory.exists()


def test_reusable_invitation_is_for_so_many_hosts(state: State) -> None:
    """`--hosts` says for how many, and is an error where it means nothing."""
    state.save_authority_key(AUTHORITY)
    _ = state.gossip_key

    def invite(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["--state-dir", str(state.directory), "invite", *arguments])
        return result.exit_code, result.output

    for arguments, most in (([], 64), (["--hosts", "7"], 7)):
        code, said = invite("--reusable", "web-", *arguments)
        assert code == 0, said
        assert f"whose name begins with 'web-', up to {most} hosts, until " in said
        offer = invitations.decode(said.split("MESHD_INVITE=")[1].split()[0])
        assert offer.delegation is not None
        assert offer.delegation.hosts == most
    for wrong, message in (
        (["web", "--hosts", "7"], "--hosts is for reusable invitations"),
        (["--reusable", "--hosts", "0"], "0 is not in the range 1<=x<=1000"),
        (["--reusable", "--hosts", "1001"], "1001 is not in the range 1<=x<=1000"),
    ):
        code, said = invite(*wrong)
        assert code == 2
        assert message in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["127.0.0.1"], "127.0.0.1 is no address of a host: give a member's underlay address"),
        (["172.20.7.0:7946"], "172.20.7.0 is inside the overlay 172.20.0.0/16"),
        (["::ffff:192.0.2.1"], "is an IPv4 address in IPv6 spelling"),
        (["fe80::1"], "fe80::1 is local to one link"),
        (["fe80::1%eth0"], "an address with a zone"),
        (["192.0.2.1", "--advertise", "127.0.0.1"], "--advertise 127.0.0.1 is no address of a host"),
        (["192.0.2.1", "--bind", "224.0.0.1"], "--bind 224.0.0.1 is no address of a host"),
    ],
)
@pytest.mark.root
def test_join_refuses_address_of_no_host_before_writing(
    state: State, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """An address where no host can be is an error before anything is written or asked."""
    state.save_authority_key(AUTHORITY)
    offer = authority.invite(state, "web", Terms())
    directory = tmp_path / "other"
    command = ["--state-dir", str(directory), "join", *arguments, "--no-docker"]
    result = CliRunner().invoke(main, command, env={"MESHD_INVITE": invitations.encode(offer)})
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not directory.exists()


@pytest.mark.parametrize("error", [ConflictError("a port is taken"), SystemExit(1)], ids=["an error", "a signal"])
def test_failed_undo_is_reported_after_error(error: BaseException) -> None:
    """Steps that could not be undone are printed after the error."""

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
