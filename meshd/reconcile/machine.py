"""All adapters of one mesh on this host, read and changed together."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, partial
from ipaddress import IPv4Network
from typing import ClassVar

from meshd.endpoint import LocalAddresses
from meshd.errors import ApplyError, MeshdError
from meshd.gossip.serf_agent import access, members
from meshd.mesh.model import Member
from meshd.mesh.records import NAMES
from meshd.net import conntrack, links, underlay
from meshd.net.docker import DockerNetwork
from meshd.net.firewall import Iptables, Nftables
from meshd.net.policy import Policy
from meshd.net.ports import Ports
from meshd.net.resources import Adapter, Change, Engine, Resource
from meshd.net.routes import Routes
from meshd.net.rules import table_name
from meshd.net.wireguard import find
from meshd.net.wireguard.contract import WireGuard
from meshd.reconcile import plan
from meshd.reconcile.own_tags import SerfTags
from meshd.state.directory import State
from meshd.state.settings import Settings


class Area(StrEnum):
    """What a failure is about."""

    MEMBERSHIP = "membership"  # this host is no longer a member
    MEMBERS = "members"  # Serf did not say who is there
    SUBNET = "subnet"  # another host keeps this host's subnet
    UNDERLAY = "underlay"  # no link holds the underlay address
    DOCKER = "docker"  # Docker did not say what it is
    READ = "read"  # resources of the kind `subject` were not read
    CHANGE = "change"  # the change `subject` was not made
    DISK = "disk"  # the file `subject` was not written


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that could not be read, changed or written. Everything else went on."""

    area: Area
    error: MeshdError
    subject: str = ""

    def __str__(self) -> str:
        return f"{self.subject or self.area}: {self.error}"


class Machine:
    """What one reconcile reads and changes. `members` asks Serf; `engine` asks Docker and returns None without it.

    `mtu` is the underlay's, `networks` are this host's own inside the overlay, `local` its own addresses. All five
    raise MeshdError. `ipv6` says whether the kernel has IPv6. `end_connections` is conntrack.end.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        members: Callable[[], list[Member]],
        *,
        engine: Callable[[], Engine | None],
        mtu: Callable[[], int],
        networks: Callable[[], Collection[IPv4Network]],
        local: Callable[[], LocalAddresses] = LocalAddresses,
        ipv6: bool = True,
        end_connections: Callable[[conntrack.Admission], tuple[Counter[str], int]] = lambda _: (Counter(), 0),
    ) -> None:
        self.adapters = tuple(adapters)
        self.members = members
        self.engine = engine
        self.mtu = mtu
        self.networks = networks
        self.local = local
        self.ipv6 = ipv6
        self.end_connections = end_connections

    def observe(self, kinds: Collection[str]) -> tuple[list[Resource], frozenset[str], list[Failure]]:
        """Read every adapter of one of `kinds`: return the resources, the kinds that were read, and the failures."""
        resources: list[Resource] = []
        read: set[str] = set()
        failures: list[Failure] = []
        for adapter in self.adapters:
            if adapter.kinds.isdisjoint(kinds):
                continue
            try:
                resources += adapter.read()
                read |= adapter.kinds
            except Exception as error:
                # What other programs made may be beyond what an adapter foresees; the rest must still be kept up.
                told = error if isinstance(error, MeshdError) else ApplyError(f"reading failed: {error!r}")
                failures += [Failure(Area.READ, told, kind) for kind in sorted(adapter.kinds)]
        return resources, frozenset(read), failures

    def apply(self, changes: Iterable[Change]) -> list[Failure]:
        """Make the changes one by one; a failure is returned and does not stop the others."""
        by_kind = {kind: adapter for adapter in self.adapters for kind in adapter.kinds}
        failures = []
        for change in changes:
            try:
                by_kind[change.resource.kind].apply(change)
            except MeshdError as error:
                failures.append(Failure(Area.CHANGE, error, str(change)))
        return failures


def this_machine(state: State) -> Machine:
    """Return the adapters of a mesh on this host. Serf is asked for its members once, however often they are read."""
    settings, ipv6 = state.settings, links.has_ipv6()
    listed = cache(partial(members, state))
    adapters: list[Adapter] = [
        links.Links(*_links(settings)),
        Routes(settings.wireguard, settings.overlay, settings.bridge if settings.docker else None),
        Policy(settings.overlay, _links(settings)[0]),
        Nftables(table_name(settings.wireguard), ("ip", "ip6") if ipv6 else ("ip",)),
        wireguard(state),
        SerfTags(access(state), settings.name, NAMES, listed),
    ]
    network = docker(settings)
    if network is not None:
        adapters += [Ports(settings.overlay), Iptables(settings.owner), network]
    return Machine(
        adapters,
        listed,
        engine=network.engine if network is not None else lambda: None,
        mtu=lambda: underlay.mtu(state.bind),
        networks=lambda: underlay.networks(settings.overlay, {settings.wireguard, settings.bridge}),
        local=underlay.local,
        ipv6=ipv6,
        end_connections=conntrack.end,
    )


def docker(settings: Settings) -> DockerNetwork | None:
    """Return the adapter of the Docker network, None on a host without Docker."""
    return DockerNetwork(settings.mesh, settings.bridge) if settings.docker else None


def _links(settings: Settings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the links that meshd makes and the sysctls that it sets."""
    if not settings.docker:
        return (settings.wireguard,), ()
    names = (settings.wireguard, settings.bridge)
    return names, (plan.IP_FORWARD, *(sysctl.path for sysctl in plan.sysctls(*names)))


class NoWireGuard:
    """The adapter of a host without any WireGuard, so that everything else is still kept up."""

    kinds: ClassVar[frozenset[str]] = frozenset({"device", "peer"})
    backend = "none"

    def __init__(self, reason: MeshdError) -> None:
        self.reason = reason

    def read(self) -> list[Resource]:
        raise self.reason

    def apply(self, change: Change) -> None:
        raise ApplyError(f"{change}: {self.reason}")


def wireguard(state: State) -> WireGuard:
    """Return the adapter of the mesh's WireGuard device; where there is no WireGuard, one that says so."""
    settings, key = state.settings, state.wireguard_key  # a damaged key is an error of the whole command
    try:
        return find(settings.wireguard, key, settings.wireguard_backend)
    except MeshdError as error:
        return NoWireGuard(error)
