"""An address on the underlay, and a port there."""

from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

IPAddress = IPv4Address | IPv6Address
# IPv6 addresses that are IPv4 ones in another spelling: compatible ones (RFC 4291), and NAT64's well-known prefix
# (RFC 6052). Python knows mapped and 6to4 ones itself.
_COMPATIBLE, _NAT64 = IPv6Network("::/96"), IPv6Network("64:ff9b::/96")
_THIS_NETWORK, _BROADCAST = IPv4Network("0.0.0.0/8"), IPv4Address("255.255.255.255")


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


def unusable(address: IPAddress, overlay: IPv4Network) -> str:
    """Return why no host can be reached at this underlay address, the empty string if one can.

    An overlay address would send the tunnel through itself; an IPv4 address in IPv6 spelling would hide any of these.
    """
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None or (address in _COMPATIBLE and int(address) > 1):
            return "an IPv4 address in IPv6 spelling"
        if address.is_link_local or address.is_site_local:
            return "local to one link"
        inner = _embedded(address)
        if inner is not None and unusable(inner, overlay):
            return f"{unusable(inner, overlay)} in IPv6 spelling"
    elif address in _THIS_NETWORK or address == _BROADCAST:
        return "no address of a host"
    elif address in overlay:
        return f"inside the overlay {overlay}"
    return "no address of a host" if address.is_unspecified or address.is_multicast or address.is_loopback else ""


def _embedded(address: IPv6Address) -> IPv4Address | None:
    """Return the IPv4 address that a translator or a 6to4 tunnel would send to instead."""
    return IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else address.sixtofour
