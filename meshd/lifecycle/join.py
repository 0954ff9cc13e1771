"""Make a mesh, or join one. On any error the host is as it was before."""

from meshd import files
from meshd.daemon import hints, service
from meshd.endpoint import Endpoint
from meshd.errors import ConflictError, InputError, SerfError
from meshd.gossip import serf, serf_agent
from meshd.lifecycle import preflight
from meshd.lifecycle.rollback import all_or_nothing
from meshd.lifecycle.up import begin
from meshd.mesh import addressing
from meshd.mesh.invitations import Admission, Invitation
from meshd.state import authority
from meshd.state.claim import choose_subnet, endpoint, publish, settle_subnet
from meshd.state.directory import Claim, State
from meshd.state.settings import Settings


def init(state: State, settings: Settings) -> None:
    """Make a mesh with this host as its first. On any error the host is as it was before."""
    _not_set_up(state)
    with all_or_nothing(state):
        _settle_in(state, settings)
        authority.found(state, settings.mesh, settings.name)
        subnet = settings.subnet or choose_subnet(settings)
        publish(state, None, subnet=subnet, endpoint=endpoint(settings), settled=True)
        begin(state)


def join(state: State, settings: Settings, invitation: Invitation, admission: Admission, member: Endpoint) -> None:
    """Join the mesh of the member at `member`. On any error the host is as it was before."""
    _not_set_up(state)
    preflight.member_address(member, settings.overlay)
    preflight.reachable(member)
    with all_or_nothing(state):
        _settle_in(state, settings, invitation.gossip_key)
        state.save_authority(invitation.authority)
        state.save_certificate(admission.certificate, admission.seed)
        state.save_contacts({"": member})
        allowed = admission.certificate.subnets
        if settings.subnet is not None and not addressing.is_allowed(settings.subnet, allowed):
            raise InputError(
                f"the invitation allows subnets of {', '.join(map(str, allowed))} only, not {settings.subnet}"
            )
        subnet = settings.subnet or choose_subnet(settings, allowed=allowed)
        # Without a daemon nobody can be asked before the agent is started by hand.
        claim = publish(state, None, subnet=subnet, endpoint=endpoint(settings), settled=not settings.daemon)
        if settings.daemon:
            service.start(state)
            _enter(state, claim, member)
        begin(state)


def _enter(state: State, claim: Claim, member: Endpoint) -> None:
    """Join the gossip, and settle the claim against those of all members."""
    settings = state.settings
    with serf_agent.connect(state) as client:
        try:
            client.join([str(member)])
        except SerfError as error:
            raise InputError(
                f"{member} answers, but not as a member of the mesh {settings.mesh!r}: the invitation is of another "
                f"mesh, or another program uses that port ({error})"
            ) from None
        if holder := serf.name_conflict(state.serf_log):
            raise ConflictError(f"the name {settings.name} is already in the mesh ({holder}): pass --name")
        subnet = settle_subnet(state, claim, client.members())
        publish(state, claim, subnet=subnet, endpoint=endpoint(settings), settled=True)


def renew(state: State, admission: Admission) -> None:
    """Take over a new certificate for this host, if it is one; nothing else changes, and no packet is lost."""
    preflight.root()
    if admission.certificate == state.certificate:
        return
    with state.lock():
        state.save_certificate(admission.certificate, admission.seed)
    hints.wake(state.socket, "a new certificate")


def _not_set_up(state: State) -> None:
    preflight.root()
    if state.exists:
        settings = state.settings
        raise ConflictError(
            f"this host is already in the mesh {settings.mesh!r} as {settings.name}: "
            "'meshd up' starts it, 'meshd leave' ends it"
        )


def _settle_in(state: State, settings: Settings, gossip_key: bytes | None = None) -> None:
    """Check the machine, then write everything that starting needs."""
    files.private_directory(state.directory)
    preflight.check(settings, state.wireguard_key)
    if gossip_key is not None:
        state.save_gossip_key(gossip_key)
    _ = state.gossip_key, state.rpc_key
    state.save_settings(settings)
