"""`meshd lab …`: hosts on one machine, for a first look and for tests."""

import json
import os
from pathlib import Path

import click

from meshd.lab.hosts import DEFAULT, Lab


@click.group()
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    default=DEFAULT,
    envvar="MESHD_LAB_DIR",
    show_envvar=True,
    show_default=True,
    help="Where the hosts' disks are.",
)
@click.pass_context
def lab(ctx: click.Context, directory: Path) -> None:
    """Try a mesh of several hosts on this machine.

    Each stand-in host has a network, processes and, if you like, a Docker engine of its own. The hosts are barge1,
    barge2, … at 10.10.10.101, 10.10.10.102, … on a network that only they can see.

    \b
    Example:
      meshd lab up
      meshd lab exec barge1 -- meshd init
      meshd lab exec barge2 -- env MESHD_INVITE=… meshd join 10.10.10.101
      meshd lab down
    """
    ctx.obj = Lab(directory)


@lab.command()
@click.option("-n", "--hosts", "count", type=int, default=3, show_default=True, help="How many hosts.")
@click.option("--docker/--no-docker", default=None, help="A Docker engine on each.  [default: for up to 3 hosts]")
@click.option("--underlay", type=click.Choice(["ipv4", "ipv6", "dual"]), default="ipv4", show_default=True)
@click.option("--mtu", type=int, default=1500, show_default=True, help="The underlay's MTU.")
@click.pass_obj
def up(lab: Lab, count: int, docker: bool | None, underlay: str, mtu: int) -> None:
    """Bring hosts up; those that are up already stay as they are.

    \b
    Example:
      meshd lab up
      meshd lab up --hosts 10 --no-docker --underlay ipv6
    """
    lab.up(count, docker=count <= 3 if docker is None else docker, underlay=underlay, mtu=mtu)
    _print(lab)


@lab.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def status(lab: Lab, as_json: bool) -> None:
    """List the hosts that run: name, underlay address, process, Docker.

    \b
    Example:
      meshd lab status
    """
    if as_json:
        rows = [{"name": h.name, "address": str(h.address), "pid": h.pid} for h in lab.hosts()]
        click.echo(json.dumps(rows, indent=2))
    else:
        _print(lab)


@lab.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("host")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def execute(lab: Lab, host: str, command: tuple[str, ...]) -> None:
    """Run a command on a host.

    \b
    Example:
      meshd lab exec barge2 -- meshd members
      meshd lab exec barge2 -- docker ps
    """
    _become(lab, host, list(command))


@lab.command()
@click.argument("host")
@click.pass_obj
def shell(lab: Lab, host: str) -> None:
    """Open a shell on a host.

    \b
    Example:
      meshd lab shell barge1
    """
    # --norc: the user's own prompt would hide on which host the shell is.
    _become(lab, host, ["env", rf"PS1=root@{host}:\w# ", "bash", "--norc"])


@lab.command()
@click.pass_obj
def demo(lab: Lab) -> None:
    """Show it all: three hosts, one mesh, containers that talk. Leaves the lab up.

    \b
    Example:
      meshd lab demo
    """
    from meshd.lab.demo import run  # noqa: PLC0415

    run(lab)


@lab.command()
@click.pass_obj
def down(lab: Lab) -> None:
    """Remove all hosts with everything that is on them.

    \b
    Example:
      meshd lab down
    """
    lab.down()
    click.echo("The lab is gone.")


def _become(lab: Lab, name: str, command: list[str]) -> None:
    """Replace this process, so that signals, terminal and exit code are the command's own."""
    host = lab.host(name)
    argv = host.argv(command)
    os.execvpe(argv[0], argv, host.environment())  # noqa: S606  no shell is meant


def _print(lab: Lab) -> None:
    hosts = lab.hosts()
    for host in hosts:
        engine = "docker" if host.docker_socket.exists() else "no-docker"
        click.echo(f"{host.name:<9} {host.address!s:<13} pid {host.pid:<8} {engine}")
    if not hosts:
        click.echo("No lab host is running: meshd lab up")
