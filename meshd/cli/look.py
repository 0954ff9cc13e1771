"""The commands that show the mesh and this host, and change nothing."""

import sys

import click

from meshd.cli import output, views
from meshd.cli.options import json_option
from meshd.state.directory import State


@click.command()
@json_option
@click.pass_obj
def members(state: State, as_json: bool) -> None:
    """List the hosts of the mesh.

    Each line has name, subnet, underlay address and port, state, last handshake, and why a host is refused.

    \b
    Example:
      meshd members
      meshd members --json | jq -r '.[] | select(.state != "alive") | .name'
    """
    report = views.gather(state)
    rows = views.members(report)
    if as_json:
        output.print_json(views.members_json(rows))
    else:
        output.show(*views.members_lines(rows))
    for failure in report.failures:
        output.warn(failure)


@click.command()
@json_option
@click.pass_obj
def status(state: State, as_json: bool) -> None:
    """Show what runs on this host and what is wrong.

    The exit code is 1 if something is wrong.

    \b
    Example:
      meshd status
      meshd status --json | jq .problems
    """
    facts = views.status(state)
    if as_json:
        output.print_json(views.status_json(facts))
    else:
        output.show(*views.status_lines(facts))
    if facts.problems:
        sys.exit(1)
