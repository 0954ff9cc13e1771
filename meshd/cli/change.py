"""The commands that bring this host to its desired state, or show how."""

from ipaddress import IPv4Network

import click

from meshd.cli import output, views
from meshd.cli.options import as_host, as_root, json_option
from meshd.cli.types import Prefix
from meshd.daemon import hints
from meshd.lifecycle import renumber as lifecycle
from meshd.reconcile import run
from meshd.reconcile.run import Options
from meshd.state.directory import State


@click.command()
@json_option
@click.pass_obj
@as_root
def plan(state: State, as_json: bool) -> None:
    """Show what 'sync' would change.

    \b
    Example:
      meshd plan
    """
    _sync(state, as_json=as_json, dry=True, force=False)


@click.command()
@click.option("--force", is_flag=True, help="Also remove peers that nobody said have left.")
@json_option
@click.pass_obj
@as_root
@as_host
def sync(state: State, as_json: bool, force: bool) -> None:
    """Apply the desired state to this host now.

    The daemon does so by itself: at each event, and at least once in a minute.

    \b
    Example:
      meshd sync
    """
    _sync(state, as_json=as_json, dry=False, force=force)


def _sync(state: State, *, as_json: bool, dry: bool, force: bool) -> None:
    report = run.sync(state, Options(dry=dry, force=force))
    if report.changes and not dry:
        hints.wake(state.socket, "synced")  # the daemon sees to the first handshakes of peers that were added
    if as_json:
        output.print_json(views.changes_json(report))
    else:
        output.show(*views.changes_lines(report.changes, report.withheld))
    output.exit_if_failed(report.failures)


@click.command()
@click.option("--subnet", type=Prefix(), help="The new subnet.  [default: a free one]")
@click.option("--force", is_flag=True, help="Move containers too: they lose their connections and get new addresses.")
@click.pass_obj
@as_root
@as_host
def renumber(state: State, subnet: IPv4Network | None, force: bool) -> None:
    """Give this host another subnet.

    The Docker network is replaced, and containers get new addresses.

    \b
    Example:
      meshd renumber --force
      meshd renumber --subnet 172.20.7.0/24
    """
    lifecycle.renumber(state, subnet, force=force, say=output.show)
