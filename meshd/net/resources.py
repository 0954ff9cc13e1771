"""What a machine has, as frozen dataclasses, and the changes between what should be and what is."""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import ClassVar, Protocol

from meshd.endpoint import Endpoint

# A reconcile asks each route for its key three times.
_text = lru_cache(32768)(str)


@dataclass(frozen=True, slots=True)
class Engine:
    """The Docker engine: its version, and what it writes its firewall rules with."""

    version: str
    firewall: str = "iptables"


class Resource(Protocol):
    """One thing on the machine. Equal resources need no change; equal keys with other fields are set."""

    kind: ClassVar[str]

    @property
    def key(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Sysctl:
    """A kernel parameter: its path below /proc/sys and its value."""

    kind: ClassVar[str] = "sysctl"
    path: str
    value: str

    @property
    def key(self) -> str:
        return self.path

    def __str__(self) -> str:
        return f"sysctl {self.path} = {self.value}"


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface: `bridge` is made by `links`, `wireguard` by the WireGuard adapter, which has no `mac`.

    `ipv6` says that the link takes part in IPv6. None of meshd's does: the overlay is IPv4.
    """

    kind: ClassVar[str] = "link"
    name: str
    type: str
    mtu: int
    up: bool = True
    mac: str | None = None
    ipv6: bool = False

    @property
    def key(self) -> str:
        return self.name

    def __str__(self) -> str:
        mac, ipv6 = f" {self.mac}" if self.mac else "", ", with IPv6" if self.ipv6 else ""
        return f"link {self.name} ({self.type}{mac}, mtu {self.mtu}, {'up' if self.up else 'down'}{ipv6})"


@dataclass(frozen=True, slots=True)
class Port:
    """A container's link, and the bridge that it is on or should be on; None for one that has lost its bridge."""

    kind: ClassVar[str] = "port"
    link: str
    bridge: str | None

    @property
    def key(self) -> str:
        return self.link

    def __str__(self) -> str:
        return f"port {self.link} of {self.bridge}"


@dataclass(frozen=True, slots=True)
class Address:
    """An IPv4 address with its prefix length on a link."""

    kind: ClassVar[str] = "address"
    link: str
    interface: IPv4Interface

    @property
    def key(self) -> str:
        return f"{self.interface} dev {self.link}"

    def __str__(self) -> str:
        return f"address {self.key}"


@dataclass(frozen=True, slots=True)
class Device:
    """A WireGuard device. The private key stays with the adapter: resources are printed and logged."""

    kind: ClassVar[str] = "device"
    name: str
    public_key: str
    port: int

    @property
    def key(self) -> str:
        return self.name

    def __str__(self) -> str:
        return f"wireguard {self.name} (key {self.public_key}, port {self.port})"


@dataclass(frozen=True, slots=True)
class Peer:
    """A WireGuard peer. `handshake` (Unix seconds, 0 = never) and the byte counters are only observed."""

    kind: ClassVar[str] = "peer"
    public_key: str
    endpoint: Endpoint | None
    allowed_ips: tuple[IPv4Network, ...]
    keepalive: int = 0
    handshake: float = field(default=0.0, compare=False)
    received: int = field(default=0, compare=False)
    sent: int = field(default=0, compare=False)

    @property
    def key(self) -> str:
        return self.public_key

    def __str__(self) -> str:
        prefixes = ", ".join(map(str, self.allowed_ips))
        return f"peer {self.public_key} (endpoint {self.endpoint}, allowed ips {prefixes})"


@dataclass(frozen=True, slots=True)
class Route:
    """An IPv4 route in the main table with meshd's protocol number. `link` None means `unreachable`.

    `mtu` is the path's in bytes, 0 where it is the link's.
    """

    kind: ClassVar[str] = "route"
    prefix: IPv4Network
    link: str | None
    source: IPv4Address | None = None
    metric: int = 0
    mtu: int = 0

    @property
    def key(self) -> str:
        return f"{_text(self.prefix)} metric {self.metric}"

    def __str__(self) -> str:
        if self.link is None:
            return f"route unreachable {self.key}"
        source, mtu = f" from {self.source}" if self.source else "", f", mtu {self.mtu}" if self.mtu else ""
        return f"route {self.prefix} via {self.link}{source}{mtu}"


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """meshd's own policy rule, which has the overlay looked up in the main table. There is one for an overlay."""

    kind: ClassVar[str] = "rule"
    overlay: IPv4Network
    priority: int

    @property
    def key(self) -> str:
        return _text(self.overlay)

    def __str__(self) -> str:
        return f"policy rule {self.priority}: to {self.overlay} lookup main"


@dataclass(frozen=True, slots=True)
class Diversion:
    """A policy rule or a route of others that takes packets for the overlay. It is only observed.

    meshd's own rule at the priority `before` prevails over it. Without one, `text` says what people can do.
    """

    kind: ClassVar[str] = "diversion"
    text: str
    before: int | None = None

    @property
    def key(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Rule:
    """One nftables rule. It is compared by the digest that its comment carries in the kernel: what nft lists
    back differs from what it was given, the comment does not."""

    digest: str
    text: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Chain:
    """A base chain of an nftables table."""

    name: str
    type: str
    hook: str
    priority: int
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """meshd's own nftables table of a family, `ip` or `ip6`, replaced as a whole and atomically.

    `counters` are the named ones that its rules count in: their names and, where observed, the packets since the table
    was laid.
    """

    kind: ClassVar[str] = "table"
    family: str
    name: str
    chains: tuple[Chain, ...]
    counters: tuple[tuple[str, int], ...] = field(default=(), compare=False)

    @property
    def key(self) -> str:
        return f"{self.family} {self.name}"

    def __str__(self) -> str:
        return f"nftables table {self.key} ({sum(len(c.rules) for c in self.chains)} rules)"


@dataclass(frozen=True, slots=True)
class IptablesRule:
    """A rule at the top of a chain that Docker reads (DOCKER-USER, raw PREROUTING), marked by `owner`."""

    kind: ClassVar[str] = "iptables"
    table: str
    chain: str
    match: tuple[str, ...]
    owner: str

    @property
    def key(self) -> str:
        return f"{self.table} {self.chain} {' '.join(self.match)}"

    def __str__(self) -> str:
        return f"iptables rule {self.key}"


@dataclass(frozen=True, slots=True)
class Network:
    """The Docker network on the bridge."""

    kind: ClassVar[str] = "network"
    name: str
    bridge: str
    subnet: IPv4Network
    ip_range: IPv4Network
    gateway: IPv4Address
    mtu: int
    options: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        return self.name

    def without_additions(self, asked: "Network") -> "Network":
        """Return the network without the options that were not asked for: Docker adds those of its daemon.json."""
        names = {name for name, _ in asked.options}
        return replace(self, options=tuple((name, value) for name, value in self.options if name in names))

    def __str__(self) -> str:
        return f"docker network {self.name} ({self.subnet}, range {self.ip_range}, gateway {self.gateway})"


@dataclass(frozen=True, slots=True)
class RunningContainer:
    """A running container on the Docker network, and its address there. It is only observed."""

    kind: ClassVar[str] = "running"
    name: str
    address: IPv4Address

    @property
    def key(self) -> str:
        return self.name

    def __str__(self) -> str:
        return f"container {self.name} ({self.address})"


@dataclass(frozen=True, slots=True)
class StoppedContainer:
    """A stopped container, and the Docker network that it is to start on; None if that has gone, or was made anew.

    `address` is its fixed address, if it has one.
    """

    kind: ClassVar[str] = "stopped"
    id: str
    name: str
    network: str | None
    address: IPv4Address | None = None

    @property
    def key(self) -> str:
        return self.id

    def __str__(self) -> str:
        fixed = f"address {self.address}" if self.address else "no fixed address"
        return f"container {self.name} of {self.network} ({fixed})"


@dataclass(frozen=True, slots=True)
class Tags:
    """This host's own Serf tags (those that meshd publishes)."""

    kind: ClassVar[str] = "tags"
    tags: tuple[tuple[str, str], ...]

    @property
    def key(self) -> str:
        return "own"

    def __str__(self) -> str:
        return "tags " + " ".join(f"{name}={value}" for name, value in self.tags)


class Action(StrEnum):
    """What a change does to its resource."""

    ADD = "add"
    SET = "set"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Change:
    """One idempotent step: `resource` is what should be (for REMOVE, what is), `old` what SET replaces."""

    action: Action
    resource: Resource
    old: Resource | None = None

    def __str__(self) -> str:
        return f"{self.action} {self.resource}"


class Adapter(Protocol):
    """One outside system. `read` lists what is there of meshd's own, and diversions; `apply` makes one change.

    Both raise ApplyError, MissingError or SerfError; applying a change twice is harmless.
    """

    @property
    def kinds(self) -> frozenset[str]: ...

    def read(self) -> list[Resource]: ...

    def apply(self, change: Change) -> None: ...
