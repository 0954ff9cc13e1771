"""The commands of who may join: `invite`, `forget`, `revoke` and `authority`, on the host that holds the authority."""

from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Any

import click

from meshd.cli.types import Duration, Prefix
from meshd.errors import InputError
from meshd.state.directory import State

if TYPE_CHECKING:
    from meshd.gossip.delivery import Readiness

# How long a reusable invitation holds, in seconds, unless somebody says otherwise.
REUSABLE = 86400


@click.command()
@click.argument("name", required=False)
@click.option(
    "--ttl", type=Duration(), help="How long it holds: 90m, 24h, 30d, 8w.  [default: for ever; reusable: 24h]"
)
@click.option("--subnet", "subnets", type=Prefix(), multiple=True, help="What the host may own; by default any subnet.")
@click.option("--reusable", is_flag=True, help="For any number of hosts, whose names begin with NAME if it is given.")
@click.pass_obj
def invite(state: State, name: str | None, ttl: int | None, subnets: tuple[IPv4Network, ...], reusable: bool) -> None:
    """Print the line by which the host NAME joins. It is a secret: whoever runs it first is NAME.

    With --ttl the host's membership ends then, unless it joins again with a new invitation. Hosts that come by a
    reusable invitation stay for good as soon as the host with the authority has met them.

    \b
    Example:
      meshd invite web3
      meshd invite db1 --subnet 172.20.7.0/24 --ttl 90d
      meshd invite --reusable web- --ttl 30d
    """
    from meshd.state import authority  # noqa: PLC0415  300 ms of imports that --help does without
    from meshd.state.authority import Terms, expiry  # noqa: PLC0415

    authority.key(state)
    if reusable:
        print_invitation(state, authority.invite_many(state, name or "", Terms(expiry(ttl or REUSABLE), subnets)))
    elif name is None:
        raise InputError("whom to invite? 'meshd invite NAME' for one host, 'meshd invite --reusable' for any number")
    else:
        print_invitation(state, authority.invite(state, name, Terms(expiry(ttl) if ttl else 0, subnets)))


def print_invitation(state: State, invitation: Any) -> None:
    """Print the line that joins, and for whom and until when it is."""
    from meshd.mesh import invitations  # noqa: PLC0415  as above
    from meshd.mesh.certificates import date  # noqa: PLC0415
    from meshd.state.authority import label  # noqa: PLC0415

    settings, delegation = state.settings, invitation.delegation
    port = "" if settings.gossip_port == 7946 else f":{settings.gossip_port}"
    terms = delegation or invitation.certificate
    until = f", until {date(terms.expires)}" if terms.expires else ""
    if delegation:
        whose = f"whose name begins with {delegation.prefix!r}" if delegation.prefix else "that is to join"
        click.echo(f"On every host {whose}{until}, run this line. It is a secret; '{label(delegation.serial)}' is its")
        click.echo("name for 'meshd revoke'.\n")
    else:
        click.echo(f"On the host that is to be {invitation.name}{until}, run this line. It is a secret.\n")
    click.echo(f"    MESHD_INVITE={invitations.encode(invitation)} meshd join {settings.advertised}{port}\n")


@click.command()
@click.argument("name")
@click.pass_obj
def forget(state: State, name: str) -> None:
    """Remove the host NAME, which is dead and will not come back, from the whole mesh; its subnet is free again.

    Hosts that are down now hear of it when they are back. NAME itself, should it come back, has to join anew.

    \b
    Example:
      meshd forget barge3
    """
    from meshd.lifecycle import revoke  # noqa: PLC0415  as above

    heard = revoke.forget(state, name)
    click.echo(f"{name} is forgotten.")
    _say_who_has_heard(heard)


@click.command()
@click.argument("name")
@click.pass_obj
def revoke(state: State, name: str) -> None:
    """Cut the host NAME off everywhere and for good, or end an invitation that was not used yet.

    A reusable invitation by which NAME came ends too; hosts that the authority has not met since then have to join
    anew. NAME keeps the gossip key, so it can still see who is in the mesh, but nobody speaks to it.

    \b
    Example:
      meshd revoke web3
      meshd revoke invitation-1f2e3d4c5b6a7988
    """
    from meshd.lifecycle import revoke  # noqa: PLC0415  as above

    names, heard = revoke.revoke(state, name)
    for revoked in names:
        click.echo(f"{revoked} is revoked.")
    _say_who_has_heard(heard)


def _say_who_has_heard(heard: "Readiness") -> None:
    alive = len(heard.ready) + len(heard.missing)
    if alive:
        click.echo(f"{len(heard.ready)} of {alive} other hosts that are alive have confirmed it.")
    if heard.missing:
        names = ", ".join(sorted(heard.missing))
        click.echo(f"Warning: no answer from {names}: to be told by the others, or asks for it later", err=True)


@click.group()
def authority() -> None:
    """Hand the mesh's authority on, so that it survives the host where 'meshd init' ran."""


passphrase_option = click.option(
    "--passphrase-file", type=click.File(), help="A file that holds the passphrase; by default it is asked for."
)


@authority.command("export")
@click.argument("file", type=click.File("w", lazy=False), default="-")
@passphrase_option
@click.pass_obj
def export(state: State, file: Any, passphrase_file: Any) -> None:
    """Write the authority's key to FILE (or print it), encrypted with a passphrase.

    \b
    Example:
      meshd authority export authority.json
    """
    from meshd.state.authority import export, key  # noqa: PLC0415  as above

    key(state)
    file.write(export(state, _passphrase(passphrase_file, confirm=True)))


@authority.command("import")
@click.argument("file", type=click.File())
@passphrase_option
@click.pass_obj
def restore(state: State, file: Any, passphrase_file: Any) -> None:
    """Take the authority over from FILE: this host can then invite, forget and revoke.

    \b
    Example:
      meshd authority import authority.json
    """
    from meshd.state.authority import restore  # noqa: PLC0415  as above

    restore(state, file.read(2**20), _passphrase(passphrase_file, confirm=False))
    click.echo(f"This host holds the authority of the mesh {state.settings.mesh!r} now.")


def _passphrase(file: Any, *, confirm: bool) -> str:
    text = (
        file.readline().rstrip("\n")
        if file
        else click.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm)
    )
    if len(text) < 8:
        raise InputError("the passphrase is shorter than 8 characters")
    return str(text)
