"""A host's settings. Each one is declared once: option, environment variable, default, check, and place in the file.

They are decided at `init` or `join` and then kept in one file: defaults < invitation < environment < options. Most of
them `meshd up` changes later.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from ipaddress import IPv4Network, ip_address
from typing import Any

from meshd.endpoint import IPAddress, unusable
from meshd.errors import InputError
from meshd.mesh.addressing import check_overlay, is_usable
from meshd.mesh.model import is_name

VERSION = 2
# IFNAMSIZ is 16 with the final NUL; the alphabet keeps it safe in nft rules and /proc paths.
INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,14}")
ALLOWED = re.compile(r"all|(?:tcp|udp)/([0-9]{1,5})(?:-([0-9]{1,5}))?")


class Scope(Enum):
    """Who decides on a setting."""

    MESH = "init decides for the whole mesh, and the invitation carries it"
    INHERITED = "init decides, and each host may decide otherwise"
    HOST = "each host decides"


@dataclass(frozen=True, slots=True)
class Kind:
    """How a value is kept in the file. `read` raises ValueError for anything else than `what`."""

    what: str
    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = lambda value: value


def _exactly(wanted: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not wanted:
            raise ValueError
        return value

    return read


def _parsed(parser: Callable[[str], Any]) -> Callable[[Any], Any]:
    return lambda value: parser(_exactly(str)(value))


TEXT = Kind("a text", _exactly(str))
NUMBER = Kind("a whole number", _exactly(int))
SWITCH = Kind("true or false", _exactly(bool))
ADDRESS = Kind("an IP address", _parsed(ip_address), str)
PREFIX = Kind("an IPv4 prefix", _parsed(IPv4Network), str)
# `init` takes AUTO for one that is free, too.
OVERLAY, AUTO = Kind("the IPv4 prefix of a mesh", _parsed(IPv4Network), str), "auto"
TEXTS = Kind("a list of texts", lambda value: tuple(_exactly(str)(entry) for entry in _exactly(list)(value)), list)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be, in words and as a check."""

    words: str
    holds: Callable[[Any], bool]


def _within(low: int, high: int, unit: str = "") -> Rule:
    return Rule(f"{low} to {high}{unit}", lambda value: low <= value <= high)


def _one_of(*choices: str) -> Rule:
    return Rule(f"{', '.join(choices[:-1])} or {choices[-1]}", lambda value: value in choices)


def _is_allowed_entry(entry: str) -> bool:
    found = ALLOWED.fullmatch(entry)
    first, last = (int(found[1]), int(found[2] or found[1])) if found and found[1] else (1, 1)
    return found is not None and 0 < first <= last < 65536


NAME = Rule("1 to 63 letters, digits, dots and dashes", is_name)
LINK = Rule("1 to 15 letters, digits, dashes and _", lambda value: INTERFACE.fullmatch(value) is not None)
PORT = _within(1, 65535)
BACKENDS = ("auto", "kernel", "userspace")


# What changes a setting later, as a user types it.
UP, RENUMBER, REJOIN = "meshd up", "meshd renumber", "meshd leave, then meshd join"


@dataclass(frozen=True, slots=True)
class Option:
    """The declaration of a setting.

    `default` says in words what holds without a value. `choices` are all values that there are, if they are few.
    `later` is the command that changes the setting of a host that has joined.
    """

    flag: str
    kind: Kind
    help: str
    default: str = ""
    rule: Rule | None = None
    choices: tuple[str, ...] = ()
    scope: Scope = Scope.HOST
    later: str = REJOIN

    @property
    def name(self) -> str:
        """The option as errors name it: `--docker` of `--docker/--no-docker`."""
        return self.flag.partition("/")[0]

    @property
    def variable(self) -> str:
        """The environment variable: `--wireguard-port` is MESHD_WIREGUARD_PORT."""
        return "MESHD_" + self.name.lstrip("-").upper().replace("-", "_")

    def check(self, value: Any) -> None:
        """Raise InputError for a value, or an entry of a list, that breaks the rule."""
        for entry in value if isinstance(value, tuple) else (value,):
            if self.rule is not None and entry is not None and not self.rule.holds(entry):
                raise InputError(f"{self.name} must be {self.rule.words}, not {entry!r}")


def _option(*arguments: Any, **more: Any) -> Mapping[str, Option]:
    return {"option": Option(*arguments, **more)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What someone decided for this host. Everything else is found out or claimed."""

    mesh: str = field(
        default="meshd", metadata=_option("--mesh", TEXT, "Name of the mesh.", rule=NAME, scope=Scope.MESH)
    )
    # It lies in Docker's automatic pool, so the preflight looks for it there.
    overlay: IPv4Network = field(
        default=IPv4Network("172.20.0.0/16"),
        metadata=_option(
            "--overlay",
            OVERLAY,
            f"Address range of the mesh (CIDR); {AUTO} is one that nothing on this host has.",
            scope=Scope.MESH,
        ),
    )
    subnet_length: int = field(
        default=24,
        metadata=_option("--subnet-length", NUMBER, "Prefix length of each host's subnet.", scope=Scope.MESH),
    )
    name: str = field(
        default_factory=lambda: os.uname().nodename,
        metadata=_option("--name", TEXT, "Name of this host in the mesh.", "the host name", rule=NAME),
    )
    subnet: IPv4Network | None = field(
        default=None,
        metadata=_option("--subnet", PREFIX, "This host's share of the overlay.", "a free one", later=RENUMBER),
    )
    bind: IPAddress | None = field(
        default=None,
        metadata=_option(
            "--bind", ADDRESS, "Underlay address of this host.", "found by the routes, and followed", later=UP
        ),
    )
    advertise: IPAddress | None = field(
        default=None,
        metadata=_option(
            "--advertise", ADDRESS, "Address at which others reach this host behind NAT.", "as --bind", later=UP
        ),
    )
    wireguard: str = field(
        default="wg0", metadata=_option("--interface", TEXT, "Name of the WireGuard interface.", rule=LINK)
    )
    bridge: str = field(
        default="ovl0", metadata=_option("--bridge", TEXT, "Name of the bridge and of the Docker network.", rule=LINK)
    )
    wireguard_port: int = field(
        default=51820, metadata=_option("--wireguard-port", NUMBER, "UDP port of WireGuard.", rule=PORT, later=UP)
    )
    gossip_port: int = field(
        default=7946,
        metadata=_option(
            "--gossip-port", NUMBER, "TCP and UDP port of Serf.", rule=PORT, scope=Scope.INHERITED, later=UP
        ),
    )
    rpc_port: int = field(
        default=7373,
        metadata=_option("--rpc-port", NUMBER, "TCP port of Serf's RPC, on loopback.", rule=PORT, later=UP),
    )
    # 576 is what every IPv4 host must accept (RFC 791); 65,440 is 65,520 less WireGuard's 80.
    mtu: int | None = field(
        default=None,
        metadata=_option(
            "--mtu", NUMBER, "MTU of the overlay.", "the underlay's less 80", rule=_within(576, 65440), later=UP
        ),
    )
    keepalive: int = field(
        default=25,
        metadata=_option(
            "--keepalive",
            NUMBER,
            "Seconds between packets that keep NAT mappings open; 0 sends none.",
            rule=_within(0, 65535, " seconds"),
            later=UP,
        ),
    )
    wireguard_backend: str = field(
        default="auto",
        metadata=_option(
            "--wireguard-backend",
            TEXT,
            "The kernel's WireGuard or wireguard-go; auto prefers the kernel's.",
            rule=_one_of(*BACKENDS),
            choices=BACKENDS,
        ),
    )
    allow: tuple[str, ...] = field(
        default=(),
        metadata=_option(
            "--allow",
            TEXTS,
            "What the overlay may reach on the host itself besides ICMP: tcp/22, udp/5000-5010, all. Repeatable.",
            "nothing",
            rule=Rule("like tcp/22, udp/5000-5010 or all", _is_allowed_entry),
            later=UP,
        ),
    )
    docker: bool = field(
        default=True,
        metadata=_option("--docker/--no-docker", SWITCH, "Create the Docker network, or connect only the host itself."),
    )
    daemon: bool = field(
        default=True,
        metadata=_option(
            "--daemon/--no-daemon",
            SWITCH,
            "Run the meshd daemon, or only event handlers under your own Serf agent.",
        ),
    )

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            option.check(getattr(self, name))
        if self.wireguard == self.bridge:
            raise InputError(f"the WireGuard interface and the bridge are both named {self.bridge}")
        if self.gossip_port == self.rpc_port:
            raise InputError(f"gossip and RPC cannot both use TCP port {self.rpc_port}")
        if self.gossip_port == self.wireguard_port:
            raise InputError(f"gossip and WireGuard cannot both use UDP port {self.gossip_port}")
        self._check_prefixes()

    def _check_prefixes(self) -> None:
        check_overlay(self.overlay, self.subnet_length)
        if self.subnet is not None:
            if self.subnet.prefixlen != self.subnet_length or not self.subnet.subnet_of(self.overlay):
                raise InputError(f"the subnet {self.subnet} is not a /{self.subnet_length} of {self.overlay}")
            if not is_usable(self.subnet, self.overlay):
                raise InputError(
                    f"the subnet {self.subnet} is the first or last of {self.overlay}, which are not usable"
                )

    def check_addresses(self) -> None:
        """Raise InputError for an address of an option that no host can have on the underlay.

        This is for what was typed. A file that an older version of meshd wrote may hold such an address: the host goes
        on, and `meshd status` says that the others refuse it.
        """
        for option, address in (("--bind", self.bind), ("--advertise", self.advertise)):
            if address is not None:
                self.check_underlay(address, option)

    def check_underlay(self, address: IPAddress, option: str = "--bind (found by the routes)") -> None:
        """Raise InputError for an address that no host can have on the underlay, chosen by an option or found."""
        if problem := unusable(address, self.overlay):
            raise InputError(f"{option} {address} is {problem}: give the address by which other hosts reach this one")

    @property
    def owner(self) -> str:
        """How this mesh marks what it adds to tables that are not its own."""
        return f"meshd:{self.wireguard}"


OPTIONS: dict[str, Option] = {each.name: each.metadata["option"] for each in fields(Settings)}
# None where there is no value: `Option.default` says what holds then.
DEFAULTS: dict[str, Any] = {each.name: None if each.default is MISSING else each.default for each in fields(Settings)}


def to_json(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain JSON values, with a version."""
    plain = {name: _written(option.kind, getattr(settings, name)) for name, option in OPTIONS.items()}
    return {"version": VERSION, **plain}


def _written(kind: Kind, value: Any) -> Any:
    return None if value is None else kind.write(value)


def from_json(values: Mapping[str, Any]) -> Settings:
    """Read what `to_json` returned, of version 1 too. Raises InputError naming the bad value."""
    values = dict(values)
    version = values.pop("version", None)
    if version not in (1, VERSION):
        raise InputError(f"settings version {version!r}: this version of meshd supports 1 and {VERSION}")
    if version == 1 and not _read("bind_chosen", SWITCH, values.pop("bind_chosen", False)):
        values["bind"] = None  # it was found, see `found_in_version_1`
    unknown = sorted(values.keys() - OPTIONS.keys())
    if unknown or "name" not in values:
        raise InputError(f"unknown setting {unknown[0]!r}" if unknown else "name is missing")
    return Settings(**{name: _value(name, value) for name, value in values.items()})


def found_in_version_1(values: Mapping[str, Any]) -> IPAddress | None:
    """Return the underlay address that version 1 kept among the settings although meshd had found it by itself."""
    if values.get("version") != 1 or values.get("bind_chosen") is True:
        return None
    address: IPAddress = _read("bind", ADDRESS, values.get("bind"))
    return address


def _value(name: str, value: Any) -> Any:
    if value is None and DEFAULTS[name] is None and name != "name":
        return None
    return _read(name, OPTIONS[name].kind, value)


def _read(name: str, kind: Kind, value: Any) -> Any:
    try:
        return kind.read(value)
    except ValueError:
        raise InputError(f"{name} must be {kind.what}, not {value!r}") from None
