"""The nouns of meshd, as frozen dataclasses.

Two groups. What the mesh says: `Member` (Serf's view), `Record` (what a host publishes), `Host` (an admitted
member). What a machine has: the resources (`Link`, `Route`, `Peer`, …), each with a `key` that names it; the
difference between the resources that should be and those that are is a list of `Change`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, ip_address
from typing import ClassVar, Protocol

IPAddress = IPv4Address | IPv6Address
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")


def is_name(text: str) -> bool:
    """Tell whether a text can name a host or a mesh: the alphabet of DNS labels, and dots; at most 63 characters.

    Serf itself checks nothing, and a name reaches logs, tables and commands.
    """
    return _NAME.fullmatch(text) is not None


class Status(StrEnum):
    """A member's state, in Serf's words."""

    ALIVE = "alive"
    LEAVING = "leaving"
    LEFT = "left"
    FAILED = "failed"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An underlay address and a UDP or TCP port."""

    address: IPAddress
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"

    @classmethod
    def parse(cls, text: str, default_port: int | None = None) -> "Endpoint":
        """Read `1.2.3.4:5`, `[::1]:5`, or (with a default port) a bare address. Raises ValueError."""
        return _parsed(text, default_port)

    @classmethod
    def _parse(cls, text: str, default_port: int | None) -> "Endpoint":
        host, port = text.strip(), ""
        if host.startswith("["):
            host, closing, rest = host[1:].partition("]")
            if not closing or (rest and not rest.startswith(":")):
                raise ValueError(f"not an address: {text!r}")
            port = rest[1:]
        elif host.count(":") == 1:
            host, _, port = host.partition(":")
        if not port and default_port is None:
            raise ValueError(f"no port in {text!r}")
        number = int(port) if port.isascii() and port.isdigit() else (default_port if not port else None)
        if number is None or not 0 < number < 65536:
            raise ValueError(f"not a port: {port!r}")
        if "%" in host:
            # A zone means something on one host only, and may hold any character.
            raise ValueError(f"an address with a zone: {host!r}")
        return cls(ip_address(host), number)


# A pass reads two for each host (gossip and WireGuard), which mostly are what they were.
_parsed = lru_cache(32768)(Endpoint._parse)
# A pass asks each route for its key three times.
_text = lru_cache(32768)(str)


@dataclass(frozen=True, slots=True)
class Member:
    """A member as Serf lists it; everything in it was written by somebody else."""

    name: str
    address: IPAddress
    port: int
    status: Status
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Delegation:
    """The authority's leave to certify hosts, which a reusable invitation carries.

    `expires` is Unix seconds, 0 for never; names begin with `prefix`; without `subnets` every subnet is allowed.
    """

    serial: int
    expires: int
    key: bytes
    prefix: str = ""
    subnets: tuple[IPv4Network, ...] = ()
    signature: bytes = b""


@dataclass(frozen=True, slots=True)
class Certificate:
    """Whose a name is: the Ed25519 key that signs its records, vouched for by the authority or by a delegation.

    With a delegation, `serial` is the key's digest, and `expires` and `subnets` are the delegation's.
    """

    serial: int
    expires: int
    identity: bytes
    subnets: tuple[IPv4Network, ...] = ()
    delegation: Delegation | None = None
    signature: bytes = b""

    @property
    def serials(self) -> frozenset[int]:
        """The numbers under which it can be revoked."""
        return frozenset({self.serial, self.delegation.serial} if self.delegation else {self.serial})

    @property
    def rank(self) -> tuple[bool, int]:
        """Its place when two hosts claim one subnet: the lower one wins. Nobody chooses the authority's serials."""
        return self.delegation is not None, self.serial


@dataclass(frozen=True, slots=True)
class Record:
    """What a host publishes about itself: the tags, parsed and validated (docs/record.md)."""

    public_key: str
    subnet: IPv4Network
    endpoint: Endpoint
    seq: int
    certificate: Certificate
    leaving: bool = False
    signature: bytes = b""

    @property
    def address(self) -> IPv4Address:
        """The host's own overlay address: the first of its subnet, as Docker gives it to the bridge."""
        return self.subnet.network_address


@dataclass(frozen=True, slots=True)
class Host:
    """A member that the mesh has admitted, with the record that is in force for it."""

    name: str
    record: Record


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The tombstone of a host that left or was forgotten. Who joins again does so with a new key and a newer record.

    `proof` shows it to others (meshd.tombstones); without one it counts on this host alone.
    """

    seq: int
    public_key: str
    proof: bytes = b""

    def voids(self, record: Record) -> bool:
        """Tell whether a record of this name is of the life that has ended."""
        return record.seq <= self.seq or record.public_key == self.public_key


@dataclass(frozen=True, slots=True)
class Revocation:
    """The authority's word that a certificate, or all that a delegation signed, count no more; `name` is for people."""

    serial: int
    name: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class Engine:
    """The Docker engine: its version, and what it writes its firewall rules with."""

    version: str
    firewall: str = "iptables"


# --- what a machine has --------------------------------------------------------------------------------------------


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
    """A network interface: `bridge` is made by `links`, `wireguard` by the WireGuard adapter, which has no `mac`."""

    kind: ClassVar[str] = "link"
    name: str
    type: str
    mtu: int
    up: bool = True
    mac: str | None = None

    @property
    def key(self) -> str:
        return self.name

    def __str__(self) -> str:
        mac = f" {self.mac}" if self.mac else ""
        return f"link {self.name} ({self.type}{mac}, mtu {self.mtu}, {'up' if self.up else 'down'})"


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
    """An IPv4 route in the main table with meshd's protocol number. `link` None means `unreachable`."""

    kind: ClassVar[str] = "route"
    prefix: IPv4Network
    link: str | None
    source: IPv4Address | None = None
    metric: int = 0

    @property
    def key(self) -> str:
        return f"{_text(self.prefix)} metric {self.metric}"

    def __str__(self) -> str:
        if self.link is None:
            return f"route unreachable {self.key}"
        return f"route {self.prefix} via {self.link}" + (f" from {self.source}" if self.source else "")


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
    """meshd's own nftables table (family ip), replaced as a whole and atomically."""

    kind: ClassVar[str] = "table"
    name: str
    chains: tuple[Chain, ...]

    @property
    def key(self) -> str:
        return self.name

    def __str__(self) -> str:
        return f"nftables table {self.name} ({sum(len(c.rules) for c in self.chains)} rules)"


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

    def __str__(self) -> str:
        return f"docker network {self.name} ({self.subnet}, range {self.ip_range}, gateway {self.gateway})"


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
    """One outside system. `read` lists what is there of meshd's own; `apply` makes one change.

    Both raise ApplyError, MissingError or SerfError; applying a change twice is harmless.
    """

    kinds: ClassVar[frozenset[str]]

    def read(self) -> list[Resource]: ...

    def apply(self, change: Change) -> None: ...
