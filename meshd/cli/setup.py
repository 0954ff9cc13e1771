"""The commands that bring this host into a mesh, start and stop it, and take it out."""

import os
import sys
import time
from typing import Any

import click

from meshd.cli import authority, output, views
from meshd.cli.options import (
    as_host,
    as_root,
    changed,
    changing_options,
    given,
    setting_options,
    strict_option,
    wait_option,
)
from meshd.endpoint import Endpoint
from meshd.errors import InputError, InUseError
from meshd.gossip import serf_agent
from meshd.lifecycle import change as changing
from meshd.lifecycle import join as lifecycle
from meshd.lifecycle import leave as leaving
from meshd.lifecycle import up as running
from meshd.mesh import endings, invitations
from meshd.mesh.invitations import Invitation
from meshd.mesh.model import Host
from meshd.state import machine_id
from meshd.state.authority import Terms, expiry, invite_many
from meshd.state.claim import settled
from meshd.state.directory import State
from meshd.state.settings import OPTIONS, Scope, Settings

INVITED = [name for name, option in OPTIONS.items() if option.scope is not Scope.HOST]


@click.command()
@setting_options(joins=False)
@click.pass_obj
@as_root
@as_host
def init(state: State, /, **options: Any) -> None:
    """Start a new mesh on this host.

    It prints the line with which the next host joins.

    \b
    Example:
      meshd init
      meshd init --mesh staging --overlay 10.80.0.0/16 --bind 203.0.113.5
    """
    lifecycle.init(state, lifecycle.with_overlay(given(options)))
    settings, claim = state.settings, state.claim()
    subnet = claim.record.subnet if claim else "?"
    output.show(
        f"The mesh {settings.mesh!r} runs on {settings.name}: its containers get addresses of {subnet}.",
        "This host holds the mesh's authority: 'meshd invite NAME' here admits one more host at any time.",
        "",
    )
    authority.print_invitation(state, invite_many(state, "", Terms(expiry(authority.REUSABLE))))
    if not settings.daemon:
        _print_no_daemon(state)
    _warn_of_firewalls(state)


@click.command()
@click.argument("address")
@click.option(
    "--invite",
    envvar="MESHD_INVITE",
    show_envvar=True,
    help="The invitation. Other users of this host can read options: prefer the environment, a file, or the prompt.",
)
@click.option("--invite-file", type=click.File(), help="A file that holds the invitation; - is standard input.")
@setting_options(joins=True)
@wait_option
@strict_option
@click.pass_obj
@as_root
@as_host
def join(
    state: State,
    /,
    *,
    address: str,
    invite: str | None,
    invite_file: Any,
    timeout: float,
    strict: bool,
    **options: Any,
) -> None:
    """Join an existing mesh.

    ADDRESS is the underlay address of any member. The invitation is a secret that comes from MESHD_INVITE,
    --invite-file, or a prompt.

    \b
    Example:
      meshd join 10.10.10.101
      MESHD_INVITE=meshd3.… meshd join 203.0.113.5 --no-docker
    """
    text = invite or (invite_file.read(2**16) if invite_file else None)
    if is_known := state.exists:
        lifecycle.join_again(state, invitations.decode(text) if text else None)
    else:
        _join(state, address, invitations.decode(text or _prompt()), options)
    _warn_of_end(state, is_certified=bool(text) or not is_known)
    _wait(state, timeout, strict=strict, is_new=not is_known)


def _join(state: State, address: str, invitation: Invitation, options: dict[str, Any]) -> None:
    member = _endpoint(address, invitation.gossip_port)
    admission = invitation.redeem(options["name"], os.uname().nodename, time.time())
    of_the_mesh = {name: getattr(invitation, name) for name in INVITED}
    settings = Settings(**{**of_the_mesh, **given(options), "name": admission.name})
    lifecycle.join(state, settings, invitation, admission, member, say=output.warn)


@click.command()
@changing_options()
@click.option("--moved", is_flag=True, help="The state comes from another machine, which is gone for good.")
@wait_option
@strict_option
@click.pass_obj
@as_root
def up(state: State, /, *, timeout: float, strict: bool, moved: bool, **options: Any) -> None:
    """Start the mesh on this host again.

    After 'meshd down' it brings back the same keys and the same subnet. On a host that is up it is harmless. An option
    changes that setting from now on, for the same keys and the same containers. On any error the old settings are in
    force.

    \b
    Example:
      meshd up
      meshd up --allow tcp/22 --allow tcp/9100
      meshd up --mtu 1380 --bind auto
    """
    if not moved:
        machine_id.check(state)
    report = changing.change(state, changed(options), moved=moved)
    _warn_of_end(state, is_certified=False)
    _wait(state, timeout, strict=strict, is_new=False)
    for failure in report.failures:
        if isinstance(failure.error, InUseError):
            output.warn(str(failure.error))


@click.command()
@click.option("--force", is_flag=True, help="Disconnect containers that are attached.")
@click.pass_obj
@as_root
def down(state: State, force: bool) -> None:
    """Stop the mesh on this host, which stays a member.

    Everything of meshd is removed from the host, which is then as it was found; 'meshd up' brings it back. To leave the
    mesh permanently, run 'meshd leave'.

    \b
    Example:
      meshd down
    """
    output.exit_if_failed(running.down(state, force=force, say=output.show).failures)
    output.show("meshd is down on this host; 'meshd up' brings it back.")


@click.command()
@click.option(
    "--force", is_flag=True, help="Disconnect containers that are attached; leave also if nobody can be told."
)
@click.pass_obj
@as_root
@as_host
def leave(state: State, force: bool) -> None:
    """Leave the mesh permanently.

    The others remove this host and free its subnet. Everything of meshd is removed here.

    \b
    Example:
      meshd leave
    """
    mesh = state.settings.mesh
    output.exit_if_failed(leaving.leave(state, force=force, say=output.warn).failures)
    output.show(f"This host has left the mesh {mesh}.")


def _endpoint(text: str, port: int) -> Endpoint:
    try:
        return Endpoint.parse(text, port)
    except ValueError as error:
        raise InputError(f"{text!r} is not the address of a member ({error}): give an IP address") from None


def _prompt() -> str:
    if not sys.stdin.isatty():
        raise InputError("no invitation: set MESHD_INVITE, or pass --invite-file ('meshd invite' prints one)")
    return str(click.prompt("Invitation", hide_input=True))


def _wait(state: State, timeout: float, *, strict: bool, is_new: bool) -> None:
    """Wait for the others with a progress line on a terminal, then print the members."""
    if not state.settings.daemon:
        _print_no_daemon(state)
        _warn_of_firewalls(state)
        return
    terminal = sys.stderr.isatty()

    def progress(ready: int, total: int) -> None:
        if terminal:
            output.show_progress(f"{ready}/{total} hosts ready")

    readiness = lifecycle.wait_for_others(state, timeout, progress, is_new=is_new)
    total = len(readiness.ready) + len(readiness.missing) + 1
    if terminal:
        output.show_progress("")
    output.show(f"{len(readiness.ready) + 1}/{total} hosts ready", error=True)
    output.show(*views.members_lines(views.members(views.gather(state))))
    _warn_of_firewalls(state)
    for name, refusal in sorted(readiness.refusals.items()):
        output.warn(f"{name} is not ready: {refusal}")
    if silent := sorted(readiness.missing - readiness.refusals.keys()):
        output.warn(
            f"not ready after {timeout:g} s: {', '.join(silent)}; they go on trying "
            "('meshd members' there says if they refuse this host, and why)"
        )
    if readiness.missing and strict:
        sys.exit(3)


def _warn_of_end(state: State, *, is_certified: bool) -> None:
    """Print when this host's membership ends, if that is soon, or if it was certified just now for a limited time.

    After a reusable invitation it is not: the authority gives its own certificate in a moment.
    """
    certificate, name = state.certificate, state.settings.name
    is_limited = is_certified and certificate.expires and certificate.delegation is None
    own = Host(name, settled(state).record)
    for line in [endings.end(name, certificate)] if is_limited else endings.of_own(own, time.time()):
        output.warn(line)


def _warn_of_firewalls(state: State) -> None:
    """Print what this host's own firewall blocks; the others would seem to be at fault."""
    for line in views.blocked(state):
        output.warn(line)


def _print_no_daemon(state: State) -> None:
    output.show(
        "Without a daemon, you start the Serf agent yourself; its handlers do the rest:",
        "",
        f"    serf agent -config-file={serf_agent.configure(state)}",
        "",
        "A Serf agent of your own does as well, with the same name, key and RPC port, and with",
        "",
        *(f"    -event-handler '{handler}'" for handler in serf_agent.event_handlers(state)),
        "",
    )
