"""The `meshd` command: each command is a few lines over one function of another module."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from meshd import __version__
from meshd.cli import authority
from meshd.cli.types import Address, Prefix
from meshd.endpoint import Endpoint, IPAddress
from meshd.errors import InputError, MeshdError
from meshd.state.directory import DEFAULT, State

F = TypeVar("F", bound=Callable[..., Any])
READY_TIMEOUT = 30.0


class Commands(click.Group):
    """The commands in the order in which a person meets them, and every MeshdError as a clear message."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        return [*self.commands, "lab"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "lab":
            from meshd.lab.commands import lab  # noqa: PLC0415  only the lab needs it

            return lab
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MeshdError as error:
            click.echo(f"Error: {error}", err=True)
            _say_notes(error)
            ctx.exit(error.exit_code)
        except (SystemExit, KeyboardInterrupt) as error:
            _say_notes(error)
            raise


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="meshd")
@click.option(
    "--state-dir",
    envvar="MESHD_STATE_DIR",
    type=click.Path(path_type=Path),
    default=DEFAULT,
    show_default=True,
    help="Where this host's keys and memory are; one directory a mesh.",
)
@click.pass_context
def main(ctx: click.Context, state_dir: Path) -> None:
    """Containers on many Docker hosts, one flat encrypted network.

    \b
    On the first host:   meshd init
    On every other one:  meshd join ADDRESS     (any member's address)
    Then anywhere:       meshd members

    Every command has --help with an example, and names the environment variable of each setting.
    """
    ctx.obj = State(state_dir)


ALLOW_HELP = "What the overlay may reach on the host itself besides ICMP: tcp/22, udp/5000-5010, all. Repeatable."


def setting(flag: str, *names: str, **attributes: Any) -> Callable[[F], F]:
    """Give an option that the environment can set too: `--wireguard-port` is MESHD_WIREGUARD_PORT."""
    variable = "MESHD_" + flag.partition("/")[0].lstrip("-").upper().replace("-", "_")
    shown = attributes.get("default") is not None
    return click.option(flag, *names, envvar=variable, show_envvar=True, show_default=shown, **attributes)


def host_options(command: F) -> F:
    """Add the options that say how this one host takes part."""
    options = [
        setting("--allow", multiple=True, help=ALLOW_HELP),
        setting("--name", help="This host's name in the mesh; by default its host name."),
        setting("--subnet", type=Prefix(), help="This host's share of the overlay; by default a free one."),
        setting("--bind", type=Address(), help="This host's underlay address; by default found by its routes."),
        setting("--advertise", type=Address(), help="Where others reach this host, if NAT hides --bind."),
        setting("--interface", "wireguard", default="wg0", help="Name of the WireGuard interface."),
        setting("--bridge", default="ovl0", help="Name of the bridge and of the Docker network."),
        setting("--wireguard-port", type=int, default=51820, help="UDP port of WireGuard."),
        setting("--rpc-port", type=int, default=7373, help="Loopback TCP port of Serf's RPC."),
        setting("--mtu", type=int, help="The overlay's MTU; by default the underlay's less 80."),
        setting("--keepalive", type=int, default=25, help="Seconds between packets that keep NAT open; 0 is off."),
        setting(
            "--wireguard-backend",
            type=click.Choice(["auto", "kernel", "userspace"]),
            default="auto",
            help="Which WireGuard: the kernel's or wireguard-go.",
        ),
        setting("--docker/--no-docker", default=True, help="With the Docker network, or the host alone."),
        setting(
            "--daemon/--no-daemon", default=True, help="Run meshd agent, or leave it to a Serf agent that you run."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
wait_option = click.option(
    "--timeout", type=float, default=READY_TIMEOUT, show_default=True, help="Seconds to wait for the other hosts."
)
strict_option = click.option("--strict", is_flag=True, help="Exit with code 3 if some hosts are not ready in time.")


@main.command()
@setting("--mesh", default="meshd", help="Name of the mesh.")
@setting("--overlay", type=Prefix(), default="172.20.0.0/16", help="Prefix of all containers.")
@setting("--subnet-length", type=int, default=24, help="Prefix length of a host's share.")
@click.option(
    "--gossip-port", type=int, default=7946, show_default=True, help="TCP and UDP port of Serf, on all hosts."
)
@host_options
@click.pass_obj
def init(state: State, /, **options: Any) -> None:
    """Begin a mesh with this host, and print how the next one joins.

    \b
    Example:
      meshd init
      meshd init --mesh staging --overlay 10.80.0.0/16 --bind 203.0.113.5
    """
    from meshd.lifecycle import join as lifecycle  # noqa: PLC0415  300 ms of imports that --help does without
    from meshd.state.authority import Terms, expiry, invite_many  # noqa: PLC0415

    lifecycle.init(state, _settings(options, towards=None))
    settings, claim = state.settings, state.claim()
    subnet = claim.record.subnet if claim else "?"
    click.echo(
        f"The mesh {settings.mesh!r} runs on {settings.name}: its containers get addresses of {subnet}.\n"
        "This host holds the mesh's authority: 'meshd invite NAME' here admits one more host at any time.\n"
    )
    authority.print_invitation(state, invite_many(state, "", Terms(expiry(authority.REUSABLE))))
    if not settings.daemon:
        _print_no_daemon(state)
    _warn_of_firewalls(state)


@main.command()
@click.argument("address")
@click.option("--invite", envvar="MESHD_INVITE", help="The invitation; better in MESHD_INVITE, in a file, or typed.")
@click.option("--invite-file", type=click.File(), help="A file that holds the invitation; - is standard input.")
@setting("--gossip-port", type=int, help="This host's gossip port; by default the mesh's.")
@host_options
@wait_option
@strict_option
@click.pass_obj
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
    """Join the mesh of the member at ADDRESS: any member's underlay address.

    The invitation is a secret. It comes from MESHD_INVITE, --invite-file, or a prompt.

    \b
    Example:
      meshd join 10.10.10.101
      MESHD_INVITE=meshd1.… meshd join 203.0.113.5 --no-docker
    """
    from meshd.lifecycle import join as lifecycle  # noqa: PLC0415
    from meshd.lifecycle import preflight  # noqa: PLC0415
    from meshd.mesh import invitations  # noqa: PLC0415

    preflight.root()
    text = invite or (invite_file.read(2**16) if invite_file else None)
    if is_known := state.exists:
        _again(state, text)
    else:
        invitation = invitations.decode(text or _prompt())
        member = _endpoint(address, invitation.gossip_port)
        admission = invitation.redeem(options["name"], os.uname().nodename, time.time())
        options["name"] = admission.name
        options["gossip_port"] = options["gossip_port"] or invitation.gossip_port
        settings = _settings(
            {**options, "mesh": invitation.mesh, "overlay": invitation.overlay,
             "subnet_length": invitation.subnet_length},
            towards=member.address,
        )  # fmt: skip
        lifecycle.join(state, settings, invitation, admission, member)
    _wait(state, timeout, strict=strict, is_new=not is_known)


main.add_command(authority.invite)


@main.command()
@json_option
@click.pass_obj
def members(state: State, as_json: bool) -> None:
    """List the hosts: name, subnet, underlay address and port, state, last handshake, reason if refused.

    \b
    Example:
      meshd members
      meshd members --json | jq -r '.[] | select(.state != "alive") | .name'
    """
    from meshd.cli import views  # noqa: PLC0415

    report = views.gather(state)
    rows = views.members(state, report)
    click.echo(_json(views.members_json(rows)) if as_json else views.members_text(rows))
    for failure in report.failures:
        click.echo(f"Warning: {failure}", err=True)


@main.command()
@json_option
@click.pass_obj
def status(state: State, as_json: bool) -> None:
    """Show what this host is, what runs, and what is wrong.

    \b
    Example:
      meshd status
    """
    from meshd.cli import views  # noqa: PLC0415

    facts = views.status(state)
    click.echo(_json(facts) if as_json else views.status_text(facts))
    if facts["problems"]:
        sys.exit(1)


@main.command()
@json_option
@click.pass_obj
def plan(state: State, as_json: bool) -> None:
    """Show what a pass would change on this host, and change nothing.

    \b
    Example:
      meshd plan
    """
    _pass(state, as_json=as_json, dry=True, force=False)


@main.command()
@click.option("--force", is_flag=True, help="Also remove peers for whose departure there is no evidence.")
@json_option
@click.pass_obj
def sync(state: State, as_json: bool, force: bool) -> None:
    """Make one pass now: read everything, and change what is not as it should be.

    \b
    Example:
      meshd sync
    """
    _pass(state, as_json=as_json, dry=False, force=force)


@main.command()
@click.option("--allow", multiple=True, help=f"{ALLOW_HELP} It replaces what was allowed before; 'none' is nothing.")
@wait_option
@strict_option
@click.pass_obj
def up(state: State, allow: tuple[str, ...], timeout: float, strict: bool) -> None:
    """Start meshd on this host again after 'meshd down', with the same keys and the same subnet.

    Where it is up, that is harmless; with --allow it opens or closes the host to the overlay.

    \b
    Example:
      meshd up
      meshd up --allow tcp/22 --allow tcp/9100
    """
    from meshd.lifecycle import up  # noqa: PLC0415

    if allow:
        up.allow(state, () if allow == ("none",) else allow)
    up.up(state)
    _wait(state, timeout, strict=strict)


force_option = click.option("--force", is_flag=True, help="Disconnect containers that are attached.")


@main.command()
@force_option
@click.pass_obj
def down(state: State, force: bool) -> None:
    """Take everything down on this host and leave it as it was found; 'meshd up' brings it back.

    The other hosts keep it as a member. To leave the mesh for good, run 'meshd leave'.

    \b
    Example:
      meshd down
    """
    from meshd.lifecycle import up  # noqa: PLC0415

    _finish(up.down(state, force=force))
    click.echo("meshd is down on this host; 'meshd up' brings it back.")


main.add_command(authority.forget)
main.add_command(authority.revoke)
main.add_command(authority.authority)


@main.command()
@click.option("--subnet", type=Prefix(), help="The new subnet; by default a free one is chosen.")
@click.option("--force", is_flag=True, help="Move containers too: they lose their connections and get new addresses.")
@click.pass_obj
def renumber(state: State, subnet: Any, force: bool) -> None:
    """Give this host another subnet of the overlay, with a new Docker network and new addresses for its containers.

    \b
    Example:
      meshd renumber --force
      meshd renumber --subnet 172.20.7.0/24
    """
    from meshd.lifecycle import renumber  # noqa: PLC0415

    renumber.renumber(state, subnet, force=force, say=click.echo)


@main.command()
@click.option(
    "--force", is_flag=True, help="Disconnect containers that are attached; leave also if nobody can be told."
)
@click.pass_obj
def leave(state: State, force: bool) -> None:
    """Leave the mesh for good: the others remove this host and free its subnet, and all traces here go.

    \b
    Example:
      meshd leave
    """
    from meshd.lifecycle import leave  # noqa: PLC0415

    mesh = state.settings.mesh
    _finish(leave.leave(state, force=force, say=lambda text: click.echo(f"Warning: {text}", err=True)))
    click.echo(f"This host has left the mesh {mesh}.")


@main.command()
@click.pass_obj
def agent(state: State) -> None:
    """Run the daemon in the foreground: what a service manager runs. 'init', 'join' and 'up' start it themselves.

    \b
    Example:
      meshd agent
    """
    from meshd.daemon import agent as daemon  # noqa: PLC0415

    daemon.run(state)


def _settings(options: dict[str, Any], towards: IPAddress | None) -> Any:
    from meshd.lifecycle import preflight  # noqa: PLC0415
    from meshd.state.settings import Settings  # noqa: PLC0415

    preflight.root()
    options["name"] = options["name"] or os.uname().nodename
    options["bind_chosen"] = options["bind"] is not None
    options["bind"] = preflight.bind_address(options["bind"], towards)
    return Settings(**options)


def _endpoint(text: str, port: int) -> Endpoint:
    try:
        return Endpoint.parse(text, port)
    except ValueError as error:
        raise InputError(f"{text!r} is not the address of a member ({error}): give an IP address") from None


def _prompt() -> str:
    if not sys.stdin.isatty():
        raise InputError("no invitation: set MESHD_INVITE, or pass --invite-file ('meshd invite' prints one)")
    return str(click.prompt("Invitation", hide_input=True))


def _again(state: State, text: str | None) -> None:
    """Join once more: harmless, renews the certificate with a new invitation, and an error only for another mesh."""
    from meshd.lifecycle import join as lifecycle  # noqa: PLC0415
    from meshd.lifecycle import up  # noqa: PLC0415
    from meshd.mesh import invitations  # noqa: PLC0415

    if text is not None:
        invitation = invitations.decode(text)
        if invitation.authority != state.mesh.trust.authority:
            raise InputError(
                f"this host is in the mesh {state.settings.mesh!r} already, and the invitation is of another one: "
                "run 'meshd leave' first, or pass another --state-dir, --interface, --bridge and ports"
            )
        # A reusable invitation gives nothing that a certificate by the authority itself does not have.
        if invitation.certificate is not None or state.certificate.delegation is not None:
            # Nobody takes another identity for this host's while it is one; a revoked one is nobody's any more.
            keeps = invitation.certificate is None and state.certificate.serial not in state.roster().revoked
            name, identity_key = state.settings.name, state.identity_key if keeps else None
            lifecycle.renew(state, invitation.redeem(name, name, time.time(), identity_key))
    up.up(state)


def _wait(state: State, timeout: float, *, strict: bool, is_new: bool = False) -> None:
    """Wait for the others with a progress line on a terminal, then print the members.

    A host that `is_new` and hears that its invitation was revoked is as it was before.
    """
    from meshd.cli import views  # noqa: PLC0415
    from meshd.gossip import delivery  # noqa: PLC0415
    from meshd.lifecycle import leave  # noqa: PLC0415
    from meshd.state.claim import has_ended  # noqa: PLC0415

    if not state.settings.daemon:
        _print_no_daemon(state)
        _warn_of_firewalls(state)
        return
    claim = state.claim()
    terminal = sys.stderr.isatty()

    def progress(ready: int, total: int) -> None:
        if terminal:
            click.echo(f"\r{ready}/{total} hosts ready", nl=False, err=True)

    readiness = delivery.wait_ready(state, claim.record.seq if claim else 0, timeout, progress)
    total = len(readiness.ready) + len(readiness.missing) + 1
    click.echo(f"{chr(13) if terminal else ''}{len(readiness.ready) + 1}/{total} hosts ready", err=True)
    if reason := has_ended(state):
        if is_new:
            leave.leave(state, force=True)
        raise InputError(reason)
    click.echo(views.members_text(views.members(state, views.gather(state))))
    _warn_of_firewalls(state)
    if readiness.missing:
        click.echo(
            f"Warning: not ready after {timeout:g} s: {', '.join(sorted(readiness.missing))}; they go on trying "
            "('meshd members' there says if they refuse this host, and why)",
            err=True,
        )
        if strict:
            sys.exit(3)


def _warn_of_firewalls(state: State) -> None:
    """Say what this host's own firewall shuts; the others would seem to be at fault."""
    from meshd.cli import views  # noqa: PLC0415

    for line in views.shut(state.settings):
        click.echo(f"Warning: {line}", err=True)


def _pass(state: State, *, as_json: bool, dry: bool, force: bool) -> None:
    from meshd.cli import views  # noqa: PLC0415
    from meshd.lifecycle import preflight  # noqa: PLC0415
    from meshd.reconcile.run import Options, sync  # noqa: PLC0415

    preflight.root()
    report = sync(state, Options(dry=dry, force=force))
    click.echo(_json(views.changes_json(report)) if as_json else views.changes_text(report.changes, report.withheld))
    _finish(report)


def _finish(report: Any) -> None:
    """Say what failed, and end with an error if something did."""
    for failure in report.failures:
        click.echo(f"Error: {failure}", err=True)
    if report.failures:
        sys.exit(1)


def _print_no_daemon(state: State) -> None:
    from meshd.gossip import serf_agent  # noqa: PLC0415

    click.echo(
        "Without a daemon, you start the Serf agent yourself; its handlers do the rest:\n\n"
        f"    serf agent -config-file={serf_agent.configure(state)}\n\n"
        "A Serf agent of your own does as well, with the same name, key and RPC port, and with\n\n"
        + "".join(f"    -event-handler '{handler}'\n" for handler in serf_agent.event_handlers(state))
    )


def _say_notes(error: BaseException) -> None:
    """Say what was noted on an error on its way; Python itself does where it shows a traceback."""
    for note in getattr(error, "__notes__", ()):
        click.echo(f"Error: {note}", err=True)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2)
