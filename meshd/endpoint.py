"""An address on the underlay, and a port there."""

from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

IPAddress = IPv4Address | IPv6Address
# IPv6 addresses that are IPv4 ones in another spelling: compatible ones (RFC 4291), and those that a translator turns
# into IPv4 (RFC 6052, RFC 2765). Python knows mapped and 6to4 ones itself.
_COMPATIBLE = IPv6Network("::/96")
_TRANSLATED = (IPv6Network("64:ff9b::/96"), IPv6Network("::ffff:0:0:0/96"))
# The first octets of IPv4 addresses that no host has: "this network", loopback and multicast (RFC 6890, RFC 5771).
_NO_HOSTS, _BROADCAST = frozenset({0, 127, *range(224, 240)}), IPv4Address("255.255.255.255")


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


# A reconcile reads two for each host (gossip and WireGuard), which mostly are what they were.
_parsed = lru_cache(32768)(Endpoint._parse)


@dataclass(frozen=True, slots=True)
class LocalAddresses:
    """Addresses that one host takes for its own, and those by which it reaches everybody on one of its links."""

    addresses: frozenset[IPAddress] = frozenset()
    broadcasts: frozenset[IPAddress] = frozenset()

    def occupied(self, endpoint: Endpoint, port: int) -> str:
        """Return why another host's WireGuard is not at `endpoint`, the empty string if it may be.

        `port` is that of this host's own WireGuard. Other ports of an own address may be forwarded to other hosts.
        """
        if endpoint.address in self.broadcasts:
            return "a broadcast address"
        return "this host's own" if endpoint.address in self.addresses and endpoint.port == port else ""


def unusable(address: IPAddress, overlay: IPv4Network) -> str:
    """Return why no host can be reached at this underlay address, the empty string if one can.

    An overlay address would send the tunnel through itself; an IPv4 address in IPv6 spelling would hide any of these.
    IPv4 link-local addresses are usable: unlike those of IPv6 they name a host without naming a link.
    """
    if isinstance(address, IPv6Address):
        return _unusable_ipv6(address, overlay)
    # A reconcile asks this of every host, and ipaddress takes a microsecond for each property.
    first = int(address) >> 24
    if first in _NO_HOSTS or address == _BROADCAST:
        return "no address of a host"
    return f"inside the overlay {overlay}" if address in overlay else ""


@lru_cache(32768)
def _unusable_ipv6(address: IPv6Address, overlay: IPv4Network) -> str:
    if address.ipv4_mapped is not None or (address in _COMPATIBLE and int(address) > 1):
        return "an IPv4 address in IPv6 spelling"
    if address.is_link_local or address.is_site_local:
        return "local to one link"
    if address.scope_id is not None:
        return "an address with a zone, which means something on one host only"
    if address.is_unspecified or address.is_multicast or address.is_loopback:
        return "no address of a host"
    inner = _translated(address) or address.sixtofour
    if inner is not None and (problem := unusable(inner, overlay)):
        return f"{problem} in IPv6 spelling"
    return ""


def _translated(address: IPv6Address) -> IPv4Address | None:
    """Return the IPv4 address to which a translator would send instead."""
    return IPv4Address(int(address) & 0xFFFFFFFF) if any(address in prefix for prefix in _TRANSLATED) else None


def destination(endpoint: Endpoint) -> Endpoint:
    """Return the endpoint that packets reach in the end: behind a translator it has an IPv4 address."""
    address = endpoint.address
    inner = _translated(address) if isinstance(address, IPv6Address) else None
    return endpoint if inner is None else Endpoint(inner, endpoint.port)
