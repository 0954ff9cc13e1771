"""All adapters of one mesh on this host, read and changed together."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

from meshd.errors import ApplyError, MeshdError
from meshd.gossip.serf_agent import members
from meshd.mesh.records import NAMES
from meshd.net import links
from meshd.net.docker import Bridge
from meshd.net.firewall import Iptables, Nftables
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


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that could not be read or done; the pass went on without it."""

    what: str
    error: MeshdError

    def __str__(self) -> str:
        return f"{self.what}: {self.error}"


class Machine:
    """All adapters of one mesh on this host, for one pass: Serf is asked for its members once."""

    def __init__(self, state: State) -> None:
        settings = state.settings
        self.settings = settings
        self.members = cache(partial(members, state))
        self.wireguard = _wireguard(settings, state.wireguard_key)
        names = (settings.wireguard, settings.bridge) if settings.docker else (settings.wireguard,)
        bridge = settings.bridge
        sysctls = (plan.IP_FORWARD, f"net/ipv4/conf/{bridge}/proxy_arp", f"net/ipv4/neigh/{bridge}/proxy_delay")
        self.bridge = Bridge(settings.mesh, bridge) if settings.docker else None
        self.adapters: list[Adapter] = [
            links.Links(names, sysctls if settings.docker else ()),
            Routes(settings.wireguard, settings.overlay),
            Nftables(table_name(settings.wireguard)),
            self.wireguard,
            SerfTags(settings.rpc_port, state.rpc_key, settings.name, NAMES, self.members),
        ]
        if self.bridge is not None:
            self.adapters += [Ports(settings.overlay), Iptables(settings.owner), self.bridge]

    def observe(self, kinds: Collection[str]) -> tuple[list[Resource], set[str], list[Failure]]:
        """Read every adapter that knows one of `kinds`: the resources, the kinds that were read, the failures."""
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
                # Others' things may be beyond what an adapter foresees; that must not keep the rest where it is.
                told = error if isinstance(error, MeshdError) else ApplyError(f"reading failed: {error!r}")
                failures += [Failure(kind, told) for kind in sorted(adapter.kinds)]
        return resources, read, failures

    def apply(self, changes: Iterable[Change]) -> list[Failure]:
        """Make the changes one by one; one that fails is reported and does not stop the others."""
        by_kind = {kind: adapter for adapter in self.adapters for kind in adapter.kinds}
        failures = []
        for change in changes:
            try:
                by_kind[change.resource.kind].apply(change)
            except MeshdError as error:
                failures.append(Failure(str(change), error))
        return failures

    def engine(self) -> Engine | None:
        return self.bridge.engine() if self.bridge is not None else None


class NoWireGuard:
    """The adapter of a host without any WireGuard: the rest of a pass goes on."""

    kinds: ClassVar[frozenset[str]] = frozenset({"device", "peer"})
    backend = "none"

    def __init__(self, reason: MeshdError) -> None:
        self.reason = reason

    def read(self) -> list[Resource]:
        raise self.reason

    def apply(self, change: Change) -> None:
        raise ApplyError(f"{change}: {self.reason}")


def _wireguard(settings: Settings, key: bytes) -> WireGuard:
    try:
        return find(settings.wireguard, key, settings.wireguard_backend)
    except MeshdError as error:
        return NoWireGuard(error)
