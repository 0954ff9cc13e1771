"""An address on the underlay, and a port there."""

from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

IPAddress = IPv4Address | IPv6Address


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
