"""A host's settings: defaults < invitation < environment < flags, fixed at `init` or `join`, then one file."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from ipaddress import IPv4Network, ip_address
from typing import Any

from meshd.endpoint import IPAddress, unusable
from meshd.errors import InputError
from meshd.mesh.addressing import check_overlay, is_usable
from meshd.mesh.model import is_name

VERSION = 1
# IFNAMSIZ is 16 with the final NUL; the alphabet keeps it safe in nft rules and /proc paths.
INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,14}")
ALLOWED = re.compile(r"all|(?:tcp|udp)/([0-9]{1,5})(?:-([0-9]{1,5}))?")
# The hand-made recipe's prefix; it lies in Docker's automatic pool, so the preflight looks for it there.
OVERLAY = IPv4Network("172.20.0.0/16")
PORTS = ("wireguard_port", "gossip_port", "rpc_port")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a person decided for this host. Everything else is found out or claimed."""

    name: str
    mesh: str = "meshd"
    overlay: IPv4Network = OVERLAY
    subnet_length: int = 24
    subnet: IPv4Network | None = None
    bind: IPAddress
    bind_chosen: bool = False
    advertise: IPAddress | None = None
    wireguard: str = "wg0"
    wireguard_backend: str = "auto"
    wireguard_port: int = 51820
    bridge: str = "ovl0"
    gossip_port: int = 7946
    rpc_port: int = 7373
    mtu: int | None = None
    keepalive: int = 25
    docker: bool = True
    daemon: bool = True
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, text in (("host name", self.name), ("mesh name", self.mesh)):
            if not is_name(text):
                raise InputError(f"the {what} {text!r} is not 1 to 63 letters, digits, dots and dashes")
        for interface in (self.wireguard, self.bridge):
            if not INTERFACE.fullmatch(interface):
                raise InputError(f"the interface name {interface!r} is not 1 to 15 letters, digits, dashes and _")
        if self.wireguard == self.bridge:
            raise InputError(f"the WireGuard interface and the bridge are both named {self.bridge}")
        if self.wireguard_backend not in {"auto", "kernel", "userspace"}:
            raise InputError(f"the WireGuard backend {self.wireguard_backend!r} is not auto, kernel or userspace")
        self._check_numbers()
        self._check_prefixes()
        for entry in self.allow:
            check_allowed(entry)

    def _check_numbers(self) -> None:
        for name in PORTS:
            if not 0 < getattr(self, name) < 65536:
                raise InputError(f"the {name.replace('_', ' ')} {getattr(self, name)} is not 1 to 65535")
        if self.gossip_port == self.rpc_port:
            raise InputError(f"gossip and RPC cannot both use TCP port {self.rpc_port}")
        if self.gossip_port == self.wireguard_port:
            raise InputError(f"gossip and WireGuard cannot both use UDP port {self.gossip_port}")
        # 576 is what every IPv4 host must accept (RFC 791); 65,440 is 65,520 less WireGuard's 80.
        if self.mtu is not None and not 576 <= self.mtu <= 65440:
            raise InputError(f"the MTU {self.mtu} is not 576 to 65440")
        if not 0 <= self.keepalive < 65536:
            raise InputError(f"the keepalive {self.keepalive} is not 0 to 65535 seconds")

    def _check_prefixes(self) -> None:
        check_overlay(self.overlay, self.subnet_length)
        if self.subnet is not None:
            if self.subnet.prefixlen != self.subnet_length or not self.subnet.subnet_of(self.overlay):
                raise InputError(f"the subnet {self.subnet} is not a /{self.subnet_length} of {self.overlay}")
            if not is_usable(self.subnet, self.overlay):
                raise InputError(
                    f"the subnet {self.subnet} is the first or last of {self.overlay}, which are not usable"
                )
        for option, address in (("--bind", self.bind), ("--advertise", self.advertise)):
            if address is not None and (problem := unusable(address, self.overlay)):
                raise InputError(
                    f"{option} {address} is {problem}: give the address by which other hosts reach this one"
                )

    @property
    def advertised(self) -> IPAddress:
        """The address under which the others reach this host."""
        return self.advertise or self.bind

    @property
    def owner(self) -> str:
        """How this mesh marks what it adds to tables that are not its own."""
        return f"meshd:{self.wireguard}"


def check_allowed(entry: str) -> None:
    """Refuse what is not `tcp/22`, `udp/5000-5010` or `all`. Raises InputError."""
    found = ALLOWED.fullmatch(entry)
    first, last = (int(found[1]), int(found[2] or found[1])) if found and found[1] else (1, 1)
    if found is None or not 0 < first <= last < 65536:
        raise InputError(
            f"what the overlay may reach on this host, {entry!r}, is not like tcp/22, udp/5000-5010 or all"
        )


def to_json(settings: Settings) -> dict[str, Any]:
    """Give the settings as plain JSON values, with a version."""
    values = asdict(settings)
    plain = {k: v if v is None or isinstance(v, bool | int) else str(v) for k, v in values.items()}
    return {"version": VERSION, **plain, "allow": list(settings.allow)}


def from_json(values: dict[str, Any]) -> Settings:
    """Read what `to_json` gave. Raises InputError naming the bad value."""
    values = dict(values)
    if (version := values.pop("version", None)) != VERSION:
        raise InputError(f"settings version {version!r}, this meshd reads {VERSION}")
    types = {field.name: str(field.type) for field in fields(Settings)}
    unknown = sorted(values.keys() - types.keys())
    if unknown or not {"name", "bind"} <= values.keys():
        raise InputError(f"unknown setting {unknown[0]!r}" if unknown else "name or bind is missing")
    return Settings(**{name: _typed(name, value, types[name]) for name, value in values.items()})


def _typed(name: str, value: Any, kind: str) -> Any:
    readers: dict[str, Callable[[str], Any]] = {"IPv4Network": IPv4Network, "IPv4Address": ip_address}
    if value is None and "None" in kind:
        return None
    for text, reader in readers.items():
        if text in kind and isinstance(value, str):
            try:
                return reader(value)
            except ValueError:
                raise InputError(f"{name} {value!r} is not a prefix or an address") from None
    if kind.startswith("tuple"):
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise InputError(f"{name} {value!r} is not a list of texts")
        return tuple(value)
    expected = bool if "bool" in kind else int if "int" in kind else str
    if type(value) is not expected or any(text in kind for text in readers):
        raise InputError(f"{name} {value!r} is not what it should be")
    return value
