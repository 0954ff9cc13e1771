"""What must be so before `init`, `join` or `up` changes a host. A failure says what is in the way, and what to do."""

import errno
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network, ip_address
from pathlib import Path

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from meshd.endpoint import Endpoint, IPAddress, unusable
from meshd.errors import ConflictError, InputError, MeshdError, MissingError
from meshd.gossip import serf
from meshd.keys import public_key
from meshd.mesh import addressing
from meshd.net import links, listeners, routes, underlay, wireguard
from meshd.net.docker import DEFAULT_POOLS, DockerNetwork
from meshd.net.listeners import Process
from meshd.net.resources import Device, Link, Network, Resource
from meshd.reconcile import plan
from meshd.state.claim import settled
from meshd.state.directory import State
from meshd.state.settings import Settings

START = 1.0
PACKAGES = {"serf": "serf", "nft": "nftables"}
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
# What Docker Swarm uses on all its hosts, as Serf does.
SWARM = 7946


class Command(StrEnum):
    """For which command the machine is checked: what to do about a conflict depends on it."""

    INIT = "init"
    JOIN = "join"
    UP = "up"


def check(settings: Settings, bind: IPAddress, private_key: bytes, command: Command) -> None:
    """Check the machine for what `settings` want, with the underlay address `bind`. Nothing is changed.

    Raises InputError, MissingError or ConflictError.
    """
    programs = PACKAGES | ({"iptables": "iptables"} if settings.docker else {})
    for program, package in programs.items():
        if shutil.which(program) is None:
            raise MissingError(f"{program} is not installed: apt install {package}")
    wireguard.find(settings.wireguard, private_key, settings.wireguard_backend)
    _address(bind)
    _names(settings, command)
    _ports(_wanted(settings, bind))
    docker = _docker(settings)
    if docker is not None:
        docker.engine()
    _networks(settings, docker, command)


def check_again(state: State) -> None:
    """Check what others may have taken while this host was down, and what it needs to be up. Nothing is changed.

    What is left of it here itself, as by a `down` that failed, is not in the way. Raises ConflictError.
    """
    settings, left = state.settings, _left(state)
    _names(settings, Command.UP, left)
    if bind := settings.bind or state.found_bind():
        tunnel, *gossip = _wanted(settings, bind)
        # Without a daemon Serf is started by hand, and may run all the time.
        serf_comes = settings.daemon and serf.running(state.serf_config) is None
        _ports([*([tunnel] if settings.wireguard not in left else []), *(gossip if serf_comes else [])])
    try:
        _networks(settings, _docker(settings), Command.UP)
    except MissingError:  # a Docker that does not answer is reported by the first reconcile
        _networks(settings, None, Command.UP)


def _left(state: State) -> set[str]:
    """Return the names of the links here that are this mesh's own.

    One is known by its key, and the bridge by its MAC, or by the label of the Docker network that is on it.
    """
    settings, key, found = state.settings, state.wireguard_key, list[Resource]()
    with suppress(MeshdError):
        found += wireguard.find(settings.wireguard, key, settings.wireguard_backend).read()
    found += links.Links((settings.bridge,), ()).read()
    own = {public_key(key), plan.mac(settled(state).record.address)}
    names = {
        r.name
        for r in found
        if (isinstance(r, Device) and r.public_key in own) or (isinstance(r, Link) and r.mac in own)
    }
    if settings.docker and settings.bridge not in names:
        with suppress(MeshdError):
            names |= {r.bridge for r in DockerNetwork(settings.mesh, settings.bridge).read() if isinstance(r, Network)}
    return names


def free_overlay(settings: Settings) -> IPv4Network | None:
    """Return a range for an overlay that nothing here has, None if there is none.

    What Docker takes by itself is not free on any host. Raises MissingError or ApplyError.
    """
    taken = [prefix for prefix, _ in routes.overlapping(IPv4Network("0.0.0.0/0"), ignore_links=())]
    docker = _docker(settings)
    if docker is not None:
        taken += docker.ranges()
    return addressing.free_overlay([*DEFAULT_POOLS, *taken], settings.subnet_length)


def check_change(settings: Settings, bind: IPAddress, ports: Collection[str]) -> None:
    """Check the machine for other settings of a host that has joined: its address, and the ports of these options.

    Nothing is changed. Raises InputError or ConflictError.
    """
    _address(bind)
    _ports([port for port in _wanted(settings, bind) if port.option in ports])


def member_address(member: Endpoint, overlay: IPv4Network) -> None:
    """Require that a member can be at this address. Raises InputError."""
    if problem := unusable(member.address, overlay):
        raise InputError(f"{member.address} is {problem}: give a member's underlay address")


def reachable(member: Endpoint, timeout: float = 5.0) -> None:
    """Require that something answers at a member's gossip address. Raises InputError."""
    # A member's Serf that starts at this moment listens within a second.
    starts = retry_if_exception_type(ConnectionRefusedError)
    try:
        for attempt in Retrying(retry=starts, stop=stop_after_delay(START), wait=wait_fixed(0.1), reraise=True):
            with attempt:
                socket.create_connection((str(member.address), member.port), timeout).close()
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
        raise InputError(
            f"{member} does not answer ({reason}): is it a member's underlay address, is meshd up there, "
            f"and does its firewall admit TCP and UDP port {member.port}?"
        ) from None


def _address(bind: IPAddress) -> None:
    if underlay.holder(bind) is None:
        raise InputError(f"this host has no address {bind}: pass --bind with one of its underlay addresses")


def _docker(settings: Settings) -> DockerNetwork | None:
    return DockerNetwork(settings.mesh, settings.bridge) if settings.docker else None


def _names(settings: Settings, command: Command, left: Collection[str] = ()) -> None:
    existing = links.link_names()
    wanted = {settings.wireguard: "--interface"} | ({settings.bridge: "--bridge"} if settings.docker else {})
    for name, option in wanted.items():
        if name in existing and name not in left:
            of = next((f", of {_title(state)}" for state in _meshes() if _has_link(state, name)), "")
            what = f"an interface {name} exists already (a link of kind {existing[name]}{of}) and is not this mesh's"
            free = next(each for each in _numbered(name) if each not in existing.keys() | wanted.keys())
            ways = f"remove it, then run 'meshd {command}' again"
            raise ConflictError(f"{what}: {ways if command is Command.UP else f'pass {option} {free}, or remove it'}")


def _numbered(name: str) -> Iterator[str]:
    """Yield names of links with higher numbers."""
    stem = name.rstrip("0123456789")
    for each in range(int(name[len(stem) :] or 0) + 1, 10**15):
        yield f"{stem[: 15 - len(str(each))]}{each}"


# --- ports ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Port:
    """A port that meshd needs, by each of `protocols` at each of `addresses`; `others` are the rest of its ports."""

    what: str
    option: str
    number: int
    protocols: tuple[str, ...]
    addresses: tuple[IPAddress, ...]
    others: frozenset[int]

    def taken(self, number: int) -> tuple[str, IPAddress] | None:
        """Return by which protocol and at which address a port of this number is somebody's."""
        each = ((protocol, address) for protocol in self.protocols for address in self.addresses)
        return next(((p, a) for p, a in each if not _is_free(p, a, number)), None)

    @property
    def free(self) -> int:
        """The next port that is nobody's."""
        numbers = (n for n in range(self.number + 1, 65536) if n not in self.others and not self.taken(n))
        return next(numbers, 0)


def _wanted(settings: Settings, bind: IPAddress) -> list[_Port]:
    """Return the ports that meshd needs, WireGuard's first."""
    # WireGuard listens everywhere, and its sockets of both versions of IP have one port.
    both = "0.0.0.0", "::"  # noqa: S104
    everywhere = both if bind.version == 4 and links.has_ipv6() else both[bind.version == 6 :][:1]
    ports = settings.wireguard_port, settings.gossip_port, settings.rpc_port
    rows = (
        ("WireGuard's", "--wireguard-port", ("udp",), tuple(map(ip_address, everywhere))),
        ("gossip's", "--gossip-port", ("tcp", "udp"), (bind,)),
        ("Serf RPC's", "--rpc-port", ("tcp",), (ip_address("127.0.0.1"),)),
    )
    return [
        _Port(what, option, number, protocols, addresses, frozenset(ports) - {number})
        for number, (what, option, protocols, addresses) in zip(ports, rows, strict=True)
    ]


def _is_free(protocol: str, address: IPAddress, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, KINDS[protocol]) as probe:
        if protocol == "tcp":
            # As Go's listeners do: a connection that is merely closing does not occupy the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.version == 6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((str(address), port))
        except OSError as error:
            # An address that has gone from this host meanwhile is followed by the daemon.
            return error.errno == errno.EADDRNOTAVAIL
    return True


def _ports(wanted: Collection[_Port]) -> None:
    for port in wanted:
        if found := port.taken(port.number):
            protocol, address = found
            who, stop = _holder(protocol, address, port.number)
            what = f"{port.what} {protocol.upper()} port {port.number} on {address} is not free: {who} has it"
            raise ConflictError(f"{what}. To go on, pass {port.option} {port.free or 'with another one'}, or {stop}")


def _holder(protocol: str, address: IPAddress, port: int) -> tuple[str, str]:
    """Return who has a port, and how to stop that."""
    for process in listeners.holders(protocol, address, port):
        return _described(process, port)
    if protocol == "udp" and (link := wireguard.link_on(port)):
        return f"the WireGuard interface {link}", f"remove that interface (ip link del {link})"
    return "a program that /proc does not show", "stop that program"


def _described(process: Process, port: int) -> tuple[str, str]:
    words, stop = process.words, "stop that program"
    name = Path(words[0]).name if words else ""
    if name == "serf" and words[1:2] == ("agent",):
        config = next((word.partition("=")[2] for word in words if word.startswith("-config-file=")), "")
        state = next((state for state in _meshes() if str(state.serf_config) == config), None)
        if state is not None:
            return f"the Serf agent of {_title(state)} (pid {process.pid})", "take that mesh down"
        # Debian's package starts an agent of its own.
        return f"another Serf agent (pid {process.pid})", "stop that agent (systemctl disable --now serf)"
    if process.name == "dockerd" and port == SWARM:
        return f"Docker Swarm, by {process},", "leave the swarm (docker swarm leave)"
    if name == "wireguard-go":
        return f"the WireGuard interface {words[-1]}, by {process},", f"remove that interface (ip link del {words[-1]})"
    return str(process), stop


def _meshes() -> Iterator[State]:
    """Yield the meshes whose Serf agents run here."""
    for _, arguments in serf.agents():
        for word in arguments:
            option, _, value = word.partition("=")
            if option == "-config-file" and (state := State(Path(value).parent)).exists:
                yield state


def _has_link(state: State, name: str) -> bool:
    try:
        return name in {state.settings.wireguard, state.settings.bridge}
    except MeshdError:
        return False


def _title(state: State) -> str:
    try:
        return f"the mesh {state.settings.mesh!r} in {state.directory}"
    except MeshdError:
        return f"a mesh in {state.directory}"


# --- the overlay ---------------------------------------------------------------------------------------------------


def _networks(settings: Settings, docker: DockerNetwork | None, command: Command) -> None:
    """Require that the overlay and the Docker network's name are nobody's. Raises ConflictError or MissingError."""
    overlay = settings.overlay
    if docker is not None:
        if problem := docker.occupied(overlay):
            raise ConflictError(problem)
        for network in docker.overlapping(overlay):
            remove = network.removal
            again = "start its containers again: Docker gives them another range" if network.containers else ""
            _refuse(f"the overlay {overlay} overlaps {network}", remove, again, settings, command)
    # What is left here of this mesh itself, at `up`, is not in the way.
    own = {settings.wireguard, settings.bridge} if command is Command.UP else set[str]()
    for prefix, link in routes.overlapping(overlay, ignore_links=own):
        what = f"the overlay {overlay} overlaps the route {prefix} dev {link}"
        _refuse(what, "remove that route", "", settings, command)


def _refuse(what: str, remove: str, afterwards: str, settings: Settings, command: Command) -> None:
    """Raise ConflictError: what is in the way of the overlay, and what to do, which `init` has the easiest of."""
    if command is Command.INIT:
        free = free_overlay(settings)
        ways = f"pass --overlay {free}, which is free here" if free else f"no private range is free here; {remove}"
    else:
        ways = f"{remove}, then run 'meshd {command}' again" + (f", and {afterwards}" if afterwards else "")
    if command is Command.JOIN:
        ways += ". Or make the mesh anew with another overlay (meshd init --overlay)"
    raise ConflictError(f"{what}: {ways}")
