"""What should be, and the way there: pure functions from the hosts to resources, and from resources to changes."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from meshd.mesh.model import Host, Record
from meshd.mesh.records import encode
from meshd.net import rules
from meshd.net.resources import (
    Action,
    Address,
    Change,
    Device,
    Engine,
    Link,
    Network,
    Peer,
    PolicyRule,
    Port,
    Resource,
    Route,
    RunningContainer,
    StoppedContainer,
    Sysctl,
    Tags,
)
from meshd.reconcile.handshakes import keep_quiet
from meshd.state.settings import Settings

# An endpoint that WireGuard has learned from an authenticated packet is better than ours. WireGuard rekeys after
# 120 s and gives a session up after 180 s (REJECT_AFTER_TIME), so a younger handshake proves the endpoint.
FRESH = 180.0
# Beyond any route that someone would add, so that it only catches what nothing else does.
LAST_METRIC = 4278198272
IP_FORWARD = "net/ipv4/ip_forward"

# Changes are made in this order, and removed in the reverse one: first what keeps overlay traffic from leaving in
# clear, then links before addresses, peers before the routes that lead to them, and the tags that invite traffic last.
ORDER = (
    "table",
    "sysctl",
    "device",
    "link",
    "port",
    "address",
    "iptables",
    "peer",
    "route",
    "rule",
    "network",
    "stopped",
    "tags",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """This host, as far as the desired state depends on it. Without Docker there is no bridge and no engine."""

    host: Host
    settings: Settings
    mtu: int
    engine: Engine | None = None
    # Whether the kernel has IPv6.
    ipv6: bool = True
    # The links of the containers that have lost the bridge.
    loose: tuple[str, ...] = ()
    # The priority of meshd's policy rule, where another one takes the overlay.
    before: int | None = None
    # The path MTUs, by public key; 0, or none at all, where the path is as wide as the overlay's MTU.
    mtus: Mapping[str, int] = field(default_factory=dict)
    # The stopped containers that have lost the Docker network.
    lost: tuple[StoppedContainer, ...] = ()

    @property
    def bridge(self) -> str | None:
        return self.settings.bridge if self.settings.docker else None


def desired(local: Local, hosts: Iterable[Host]) -> tuple[Resource, ...]:
    """Return everything that should be on this host; `diff` puts it into the order in which it is made."""
    record, settings = local.host.record, local.settings
    resources: list[Resource] = [
        rules.table(
            wireguard=settings.wireguard,
            port=settings.wireguard_port,
            bridge=local.bridge,
            overlay=settings.overlay,
            subnet=record.subnet,
            allow=settings.allow,
        ),
        Device(settings.wireguard, record.public_key, settings.wireguard_port),
        Link(settings.wireguard, "wireguard", local.mtu),
        Address(settings.wireguard, IPv4Interface((record.address, 32))),
        Route(settings.overlay, None, metric=LAST_METRIC),
        Tags(tuple(sorted(encode(record).items()))),
    ]
    if local.before is not None:
        resources.append(PolicyRule(settings.overlay, local.before))
    if local.ipv6:
        resources.append(rules.ipv6_table(wireguard=settings.wireguard, bridge=local.bridge))
    if local.bridge is not None:
        resources += _bridge(local, local.bridge)
    for host in hosts:
        resources += _peer(local, host.record)
    return tuple(resources)


def sysctls(wireguard: str, bridge: str) -> tuple[Sysctl, ...]:
    """Return the kernel parameters of meshd's links that are set on a host with this bridge. They end with the links.

    The kernel asks for `forwarding` where a packet comes in, and for none on a bridge's ports. A link that is made
    while `default/forwarding` is 0, as hardening sets it, has none, whatever `ip_forward` says. Docker, which asks
    `ip_forward` alone, takes no notice of these. Of rp_filter every value will do: the way back is by the same link.
    """
    return (
        *(Sysctl(f"net/ipv4/conf/{link}/forwarding", "1") for link in (wireguard, bridge)),
        Sysctl(f"net/ipv4/conf/{bridge}/proxy_arp", "1"),
        # The kernel's default of 0.8 s delays the first packet to each address.
        Sysctl(f"net/ipv4/neigh/{bridge}/proxy_delay", "0"),
    )


def _bridge(local: Local, bridge: str) -> list[Resource]:
    record = local.host.record
    resources: list[Resource] = [
        Link(bridge, "bridge", local.mtu, mac=mac(record.address)),
        *(Port(link, bridge) for link in local.loose),
        # The whole overlay is on-link here: Docker adopts the address, and no packet for an unknown subnet can
        # leave by the default route.
        Address(bridge, IPv4Interface((record.address, local.settings.overlay.prefixlen))),
        *sysctls(local.settings.wireguard, bridge),
    ]
    if local.engine is not None:
        # Not before the engine runs: Docker closes its FORWARD policy only when it turns forwarding on itself.
        resources.append(Sysctl(IP_FORWARD, "1"))
        resources += rules.iptables(
            wireguard=local.settings.wireguard,
            bridge=bridge,
            subnet=record.subnet,
            engine=local.engine,
            owner=local.settings.owner,
        )
        resources.append(_network(local, bridge, record.address, local.engine))
        resources += [taken_over(container, bridge, record.subnet) for container in local.lost]
    return resources


def taken_over(container: StoppedContainer, network: str, subnet: IPv4Network) -> StoppedContainer:
    """Return a stopped container as it is to be: with its fixed address, unless that is outside of the subnet."""
    address = container.address
    return replace(container, network=network, address=address if address and address in subnet else None)


def mac(address: IPv4Address) -> str:
    """Return the bridge's MAC address, made as Docker makes those of containers.

    A bridge without one of its own takes the lowest of its ports' and changes it as they come and go, and one that is
    made again takes another; containers would go on sending to the old one for half a minute.
    """
    return ":".join(f"{octet:02x}" for octet in (0x02, 0x42, *address.packed))


def _network(local: Local, bridge: str, gateway: IPv4Address, engine: Engine) -> Network:
    options = {"com.docker.network.bridge.trusted_host_interfaces": local.settings.wireguard}
    if engine.firewall == "nftables":
        # On that backend nothing but this admits routed packets to containers (Docker 29); it is an error before 28.
        options["com.docker.network.bridge.gateway_mode_ipv4"] = "nat-unprotected"
    return Network(
        name=bridge,
        bridge=bridge,
        subnet=local.settings.overlay,
        ip_range=local.host.record.subnet,
        gateway=gateway,
        mtu=local.mtu,
        options=tuple(sorted(options.items())),
    )


def _peer(local: Local, record: Record) -> list[Resource]:
    return [
        Peer(record.public_key, record.endpoint, (record.subnet,), local.settings.keepalive),
        Route(
            record.subnet,
            local.settings.wireguard,
            local.host.record.address,
            mtu=local.mtus.get(record.public_key, 0),
        ),
    ]


def path_mtus(
    hosts: Iterable[Host], observed: Iterable[Resource], measured: Mapping[str, int], *, mtu: int
) -> Mapping[str, int]:
    """Return the path MTUs by public key: what was `measured`, else what the route has from an earlier daemon.

    `mtu` is the overlay's, 0 if it was not read. It bounds what a route keeps: the kernel would not.
    """
    kept = {r.prefix: r.mtu for r in observed if isinstance(r, Route) and r.mtu and not 0 < mtu <= r.mtu}
    if not kept:
        return measured
    records = (host.record for host in hosts)
    return {r.public_key: kept[r.subnet] for r in records if r.subnet in kept} | dict(measured)


def _rank(resource: Resource) -> tuple[int, int, str]:
    # The unreachable route comes before the routes to peers; sysctls of a link come after that link.
    within = {"route": int(getattr(resource, "link", None) is not None)}.get(resource.kind, 0)
    place = ORDER.index(resource.kind)
    if isinstance(resource, Sysctl) and resource.path != IP_FORWARD:
        place = ORDER.index("link")
        within = 1
    return place, within, resource.key


def diff(
    wanted: Iterable[Resource],
    observed: Iterable[Resource],
    *,
    now: float,
    moved: Collection[str] = (),
    patient: Collection[str] = (),
    kinds: Collection[str] = ORDER,
) -> tuple[Change, ...]:
    """Return the changes from observed to wanted, additions first; equal input gives equal output.

    `kinds` restricts it to what could be observed. `moved` names the public keys whose published endpoint has just
    changed: only these override an endpoint that a fresh handshake proves. `patient` are the public keys of hosts
    that are about to start the handshake (see handshakes.awaited).
    """
    there = {(r.kind, r.key): r for r in observed if r.kind in kinds}
    want = {(r.kind, r.key): r for r in wanted if r.kind in kinds}
    changes: list[Change] = []
    for key, resource in want.items():
        old = there.get(key)
        target = keep_quiet(resource, old, patient)
        if old is None:
            changes.append(Change(Action.ADD, target))
            continue
        target = _keep_roaming(target, old, now, moved)
        if isinstance(target, Network) and isinstance(old, Network):
            old = old.without_additions(target)
        if target != old:
            changes.append(Change(Action.SET, target, old))
    # A sysctl that is not wanted is not ours to remove: `down` puts the original value back instead. Nor are a port and
    # a container, which are Docker's and its user's.
    extra = [r for key, r in there.items() if key not in want and r.kind not in {"sysctl", "port", "stopped"}]
    changes.sort(key=lambda change: _rank(change.resource))
    return (*changes, *(Change(Action.REMOVE, r) for r in sorted(extra, key=_rank, reverse=True)))


def _keep_roaming(wanted: Resource, old: Resource, now: float, moved: Collection[str]) -> Resource:
    if not isinstance(wanted, Peer) or not isinstance(old, Peer) or wanted.public_key in moved:
        return wanted
    if old.endpoint is not None and 0 <= now - old.handshake < FRESH:
        return replace(wanted, endpoint=old.endpoint)
    return wanted


def guard(
    changes: Iterable[Change], observed: Iterable[Resource], departed: Collection[str], *, is_forgetful: bool = False
) -> tuple[tuple[Change, ...], tuple[Change, ...]]:
    """Split the changes into those to make and those to withhold.

    Removing peers is withheld, with the routes to them, when more than half of the peers would go without evidence:
    `departed` are the public keys that said goodbye, were forgotten, or were replaced by a newer key. A host that
    `is_forgetful` has lost its list of hosts, and removes none without evidence.
    """
    changes = tuple(changes)
    peers = [r for r in observed if isinstance(r, Peer)]
    doubtful = [
        c.resource
        for c in changes
        if c.action is Action.REMOVE and isinstance(c.resource, Peer) and c.resource.public_key not in departed
    ]
    if len(doubtful) * 2 <= len(peers) and not is_forgetful:
        return changes, ()
    prefixes = {prefix for peer in doubtful for prefix in peer.allowed_ips}

    def withheld(change: Change) -> bool:
        if change.action is not Action.REMOVE:
            return False
        resource = change.resource
        return resource in doubtful or (isinstance(resource, Route) and resource.prefix in prefixes)

    return tuple(c for c in changes if not withheld(c)), tuple(c for c in changes if withheld(c))


def withheld_text(change: Change) -> str:
    """Return what users are told of a change that `guard` withheld."""
    return f"not removed, because nobody said that it left: {change.resource}; 'meshd sync --force' removes it"


def misplaced(containers: Iterable[RunningContainer], own: Host, hosts: Iterable[Host]) -> tuple[str, ...]:
    """Return what users are told of each container outside of its host's subnet, as `docker run --ip` may put it.

    Docker's network has the whole overlay for its subnet, so that Docker takes the address. To give it to the container
    of another host twice, Docker does not hinder either.
    """
    subnet = own.record.subnet
    found = sorted(containers, key=lambda container: container.name)
    taken = {int(container.address) for container in found}
    # From the end, since Docker gives addresses from the beginning.
    numbers = range(int(subnet.broadcast_address) - 1, int(subnet.network_address), -1)
    free = next((str(IPv4Address(number)) for number in numbers if number not in taken), "")
    advice = f"start it again with --ip {free}, which is free, or without --ip" if free else "start it without --ip"
    outside = [container for container in found if container.address not in subnet]
    of = {c: next((h.name for h in hosts if c.address in h.record.subnet), "") for c in outside} if outside else {}
    return tuple(
        f"container {container.name} has the address {container.address} outside of this host's subnet {subnet}"
        f"{f', in that of {of[container]}' if of[container] else ''}: other hosts do not reach it; {advice}"
        for container in outside
    )


def restored(originals: Mapping[str, str]) -> tuple[Sysctl, ...]:
    """Return the sysctls as they were before meshd."""
    return tuple(Sysctl(path, value) for path, value in sorted(originals.items()))
