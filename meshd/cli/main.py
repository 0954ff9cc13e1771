"""The `meshd` command: a table of commands, each in a module that is imported only when it runs, and error display."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import click

from meshd import __version__
from meshd.cli import output
from meshd.errors import MeshdError
from meshd.state.directory import DEFAULT, State


class Command(NamedTuple):
    """A command of a module, which has a function of that name. `summary` is the first line of its help."""

    name: str
    module: str
    summary: str


SECTIONS: Mapping[str, Sequence[Command]] = {
    "Set up": (
        Command("init", "meshd.cli.setup", "Start a new mesh on this host."),
        Command("join", "meshd.cli.setup", "Join an existing mesh."),
        Command("up", "meshd.cli.setup", "Start the mesh on this host again."),
        Command("down", "meshd.cli.setup", "Stop the mesh on this host, which stays a member."),
        Command("leave", "meshd.cli.setup", "Leave the mesh permanently."),
    ),
    "Look": (
        Command("members", "meshd.cli.look", "List the hosts of the mesh."),
        Command("status", "meshd.cli.look", "Show what runs on this host and what is wrong."),
        Command("plan", "meshd.cli.change", "Show what 'sync' would change."),
    ),
    "Change": (
        Command("sync", "meshd.cli.change", "Apply the desired state to this host now."),
        Command("renumber", "meshd.cli.change", "Give this host another subnet."),
    ),
    "Authority": (
        Command("invite", "meshd.cli.authority", "Print the line with which a host joins."),
        Command("forget", "meshd.cli.authority", "Remove a dead host from the mesh."),
        Command("revoke", "meshd.cli.authority", "Exclude a host, or end an invitation."),
        Command("authority", "meshd.cli.authority", "Copy the authority to another host."),
    ),
    "Daemon and lab": (
        Command("agent", "meshd.cli.daemon", "Run the daemon in the foreground."),
        Command("lab", "meshd.lab.commands", "Try a mesh of several hosts on this machine."),
    ),
}


class Commands(click.Group):
    """A group that imports a command's module when the command is used, and prints every MeshdError as one message."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*(command.name for command in _table()), *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for command in _table():
            if command.name == cmd_name:
                found: click.Command = getattr(import_module(command.module), command.name)
                return found
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  click's
        width = max(len(command.name) for command in _table())
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(command.name.ljust(width), command.summary) for command in commands])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MeshdError as error:
            output.print_error(error)
            _print_notes(error)
            ctx.exit(error.exit_code)
        except (SystemExit, KeyboardInterrupt) as error:
            _print_notes(error)
            raise


def _table() -> Iterator[Command]:
    for commands in SECTIONS.values():
        yield from commands


def _print_notes(error: BaseException) -> None:
    """Print what was noted on an error on its way; Python itself does so only in a traceback."""
    for note in getattr(error, "__notes__", ()):
        output.print_error(note)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="meshd")
@click.option(
    "--state-dir",
    envvar="MESHD_STATE_DIR",
    show_envvar=True,
    type=click.Path(path_type=Path),
    default=DEFAULT,
    show_default=True,
    help="Directory for this host's keys and state (one per mesh).",
)
@click.pass_context
def main(ctx: click.Context, state_dir: Path) -> None:
    """Containers on many Docker hosts, one flat encrypted network.

    \b
    On the first host:   meshd init
    On every other one:  meshd join ADDRESS     (any member's address)
    Then anywhere:       meshd members

    'meshd COMMAND --help' shows an example, and the environment variable of
    each setting.
    """
    # For what is logged without a handler, which is all but what the daemon logs.
    logging.lastResort = output.Warnings(logging.WARNING)
    ctx.obj = State(state_dir)
