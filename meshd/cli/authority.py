"""The commands that decide who may join, on the host that holds the authority."""

from ipaddress import IPv4Network
from typing import Any

import click

from meshd.cli import output
from meshd.cli.options import as_host, as_root
from meshd.cli.types import Duration, Prefix
from meshd.errors import InputError
from meshd.gossip.delivery import Readiness
from meshd.lifecycle import revoke as lifecycle
from meshd.mesh import invitations
from meshd.mesh.certificates import date
from meshd.mesh.invitations import Invitation
from meshd.mesh.model import DEFAULT_HOSTS, MAX_HOSTS
from meshd.state import authority as keeper
from meshd.state.authority import Terms, expiry, label
from meshd.state.directory import State

# How long a reusable invitation holds, in seconds, unless --ttl says otherwise.
REUSABLE = 86400


@click.command()
@click.argument("name", required=False)
@click.option(
    "--ttl", type=Duration(), help="How long it is valid: 90m, 24h, 30d, 8w.  [default: no limit; reusable: 24h]"
)
@click.option(
    "--subnet",
    "subnets",
    type=Prefix(),
    multiple=True,
    help="A range in which the host may have its subnet. Repeatable.  [default: any]",
)
@click.option("--reusable", is_flag=True, help="Admit many hosts, whose names begin with NAME if it is given.")
@click.option(
    "--hosts",
    type=click.IntRange(1, MAX_HOSTS),
    help=f"How many hosts a reusable invitation is for, at most {MAX_HOSTS}.  [default: {DEFAULT_HOSTS}]",
)
@click.pass_obj
@as_host
def invite(
    state: State,
    name: str | None,
    ttl: int | None,
    subnets: tuple[IPv4Network, ...],
    *,
    reusable: bool,
    hosts: int | None,
) -> None:
    """Print the line with which a host joins.

    The line is a secret: the first host that runs it becomes NAME. With --ttl the host's membership ends after that
    time, unless it joins again with a new invitation. Hosts that join with a reusable invitation become permanent
    members as soon as the host with the authority has met them, as many as --hosts says.

    \b
    Example:
      meshd invite web3
      meshd invite db1 --subnet 172.20.7.0/24 --ttl 90d
      meshd invite --reusable web- --hosts 20 --ttl 30d
    """
    keeper.key(state)
    if hosts is not None and not reusable:
        raise InputError("--hosts is for reusable invitations: add --reusable, or leave --hosts out")
    if reusable:
        terms = Terms(expiry(ttl or REUSABLE), subnets)
        print_invitation(state, keeper.invite_many(state, name or "", terms, hosts or DEFAULT_HOSTS))
    elif name is None:
        raise InputError("whom to invite? 'meshd invite NAME' for one host, 'meshd invite --reusable' for many")
    else:
        print_invitation(state, keeper.invite(state, name, Terms(expiry(ttl) if ttl else 0, subnets)))


def print_invitation(state: State, invitation: Invitation) -> None:
    """Print the line with which a host joins, and for whom and until when it is valid."""
    delegation = invitation.delegation
    terms = delegation or invitation.certificate
    until = f", until {date(terms.expires)}" if terms is not None and terms.expires else ""
    if delegation:
        whose = f"whose name begins with {delegation.prefix!r}" if delegation.prefix else "that is to join"
        output.show(
            f"On every host {whose}, up to {delegation.most} hosts{until}, run this line. It is a secret;",
            f"'{label(delegation.serial)}' is its name for 'meshd revoke'.",
        )
    else:
        output.show(f"On the host that is to be {invitation.name}{until}, run this line. It is a secret.")
    output.show("", f"    MESHD_INVITE={invitations.encode(invitation)} meshd join {state.advertised}", "")


@click.command()
@click.argument("name")
@click.pass_obj
@as_root
@as_host
def forget(state: State, name: str) -> None:
    """Remove a dead host from the mesh.

    All others drop NAME, and its subnet is free again. Hosts that are down now learn of it when they are back. If NAME
    itself comes back, it has to join again.

    \b
    Example:
      meshd forget barge3
    """
    heard = lifecycle.forget(state, name)
    output.show(f"{name} is forgotten.")
    _print_who_has_heard(heard)


@click.command()
@click.argument("name")
@click.option("--with-hosts", is_flag=True, help="Exclude the hosts that joined with the invitation as well.")
@click.pass_obj
@as_root
@as_host
def revoke(state: State, name: str, *, with_hosts: bool) -> None:
    """Exclude a host, or end an invitation.

    All others cut off the host NAME permanently. A reusable invitation with which NAME joined ends too; hosts that
    joined with it, and that the authority has not met since, have to join again. The others are listed; --with-hosts
    excludes them as well. NAME keeps the gossip key: it can still see who is in the mesh, but nobody talks to it.

    \b
    Example:
      meshd revoke web3
      meshd revoke invitation-1f2e3d4c5b6a7988 --with-hosts
    """
    done = lifecycle.revoke(state, name, with_hosts=with_hosts)
    for revoked in done.names:
        output.show(f"{revoked} is revoked.")
    if done.stay:
        names = ", ".join(done.stay)
        output.show(f"Joined with the invitation and keep their certificates: {names}.")
        output.show("To exclude one of these, run 'meshd revoke HOST'.")
    _print_who_has_heard(done.heard)


def _print_who_has_heard(heard: Readiness) -> None:
    alive = len(heard.ready) + len(heard.missing)
    if alive:
        output.show(f"{len(heard.ready)} of {alive} other hosts that are alive have confirmed it.")
    if heard.missing:
        names = ", ".join(sorted(heard.missing))
        output.warn(f"no answer from {names}; they will learn it from other hosts, or when they reconnect")


@click.group()
def authority() -> None:
    """Copy the authority to another host.

    Only a host with the authority can invite, forget and revoke. A copy survives the host where 'meshd init' ran.

    \b
    Example:
      meshd authority export authority.json
    """


passphrase_option = click.option(
    "--passphrase-file", type=click.File(), help="A file that holds the passphrase.  [default: a prompt]"
)


@authority.command("export")
@click.argument("file", type=click.File("w", lazy=False), default="-")
@passphrase_option
@click.pass_obj
@as_host
def export(state: State, file: Any, passphrase_file: Any) -> None:
    """Write the authority's key to FILE.

    It is encrypted with a passphrase. Without FILE it is printed.

    \b
    Example:
      meshd authority export authority.json
    """
    keeper.key(state)
    file.write(keeper.export(state, _passphrase(passphrase_file, confirm=True)))


@authority.command("import")
@click.argument("file", type=click.File())
@passphrase_option
@click.pass_obj
@as_host
def restore(state: State, file: Any, passphrase_file: Any) -> None:
    """Take over the authority from FILE.

    This host can then invite, forget and revoke.

    \b
    Example:
      meshd authority import authority.json
    """
    keeper.restore(state, file.read(2**20), _passphrase(passphrase_file, confirm=False))
    output.show(f"This host holds the authority of the mesh {state.settings.mesh!r} now.")


def _passphrase(file: Any, *, confirm: bool) -> str:
    text = (
        file.readline().rstrip("\n")
        if file
        else click.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm)
    )
    if len(text) < 8:
        raise InputError("the passphrase is shorter than 8 characters")
    return str(text)
