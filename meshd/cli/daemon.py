"""The command that the service manager runs."""

import click

from meshd.cli.options import as_host
from meshd.daemon import agent as daemon
from meshd.state.directory import State


@click.command()
@click.pass_obj
@as_host
def agent(state: State) -> None:
    """Run the daemon in the foreground.

    A service manager runs this; 'init', 'join' and 'up' start it by themselves.

    \b
    Example:
      meshd agent
    """
    daemon.run(state)
