"""What must be so before `init` and `join` touch the host: each failure names what is in the way and what to do."""

import shutil
import socket
from collections.abc import Collection
from ipaddress import IPv4Network

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from meshd.endpoint import Endpoint, IPAddress, unusable
from meshd.errors import ConflictError, InputError, MissingError
from meshd.gossip import serf
from meshd.net import links, routes, underlay, wireguard
from meshd.net.docker import DockerNetwork
from meshd.state.settings import Settings

START = 1.0
PORTS = frozenset({"--wireguard-port", "--gossip-port", "--rpc-port"})
PACKAGES = {"serf": "serf", "nft": "nftables"}


def check(settings: Settings, bind: IPAddress, private_key: bytes) -> None:
    """Check the machine for what `settings` want, with the underlay address `bind`. Nothing is changed.

    Raises InputError, MissingError or ConflictError.
    """
    programs = PACKAGES | ({"iptables": "iptables"} if settings.docker else {})
    for program, package in programs.items():
        if shutil.which(program) is None:
            raise MissingError(f"{program} is not installed: apt install {package}")
    wireguard.find(settings.wireguard, private_key, settings.wireguard_backend)
    _address(bind)
    _names(settings)
    _ports(settings, bind, PORTS)
    docker = DockerNetwork(settings.mesh, settings.bridge) if settings.docker else None
    if docker is not None:
        docker.engine()
        if problem := docker.occupied(settings.overlay):
            raise ConflictError(problem)
        _networks(settings, docker)
    _routes(settings)


def check_change(settings: Settings, bind: IPAddress, ports: Collection[str]) -> None:
    """Check the machine for other settings of a host that has joined: its address, and the ports of these options.

    Nothing is changed. Raises InputError or ConflictError.
    """
    _address(bind)
    _ports(settings, bind, ports)


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


def _names(settings: Settings) -> None:
    existing = links.link_names()
    if settings.wireguard in existing:
        raise ConflictError(
            f"an interface {settings.wireguard} exists already and is not meshd's: pass --interface with another name"
        )
    if settings.docker and settings.bridge in existing:
        raise ConflictError(
            f"an interface {settings.bridge} exists already and is not meshd's: "
            f"remove it (docker network rm {settings.bridge}) or pass --bridge with another name"
        )


def _ports(settings: Settings, bind: IPAddress, options: Collection[str]) -> None:
    family = socket.AF_INET6 if bind.version == 6 else socket.AF_INET
    anywhere = "::" if bind.version == 6 else "0.0.0.0"  # noqa: S104  WireGuard listens everywhere
    wanted: tuple[tuple[str, int, socket.SocketKind, int, str, str], ...] = (
        ("WireGuard's UDP", family, socket.SOCK_DGRAM, settings.wireguard_port, anywhere, "--wireguard-port"),
        ("gossip's TCP", family, socket.SOCK_STREAM, settings.gossip_port, str(bind), "--gossip-port"),
        ("gossip's UDP", family, socket.SOCK_DGRAM, settings.gossip_port, str(bind), "--gossip-port"),
        ("Serf RPC's TCP", socket.AF_INET, socket.SOCK_STREAM, settings.rpc_port, "127.0.0.1", "--rpc-port"),
    )
    for what, domain, kind, port, address, option in wanted:
        if option not in options:
            continue
        with socket.socket(domain, kind) as probe:
            if kind == socket.SOCK_STREAM:
                # As Go's listeners do: a connection that is merely closing does not occupy the port.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                rival = "" if port == settings.wireguard_port else _rival()
                raise ConflictError(
                    f"{what} port {port} on {address} is not free ({(error.strerror or '').lower()}): "
                    f"{rival}pass {option}"
                ) from None


def _rival() -> str:
    """Name the usual reason for a taken port of Serf's: Debian's package starts an agent of its own."""
    for pid, _ in serf.agents():
        return f"another Serf agent runs here (pid {pid}), stop it (systemctl disable --now serf) or "
    return ""


def _networks(settings: Settings, docker: DockerNetwork) -> None:
    for name, subnet in docker.overlapping(settings.overlay):
        raise ConflictError(
            f"the overlay {settings.overlay} overlaps the Docker network {name} ({subnet}): "
            f"remove that network, or choose another overlay (meshd init --overlay)"
        )


def _routes(settings: Settings) -> None:
    for prefix, link in routes.overlapping(settings.overlay, ignore_links=()):
        raise ConflictError(
            f"the overlay {settings.overlay} overlaps the route {prefix} dev {link}: "
            f"choose another overlay (meshd init --overlay)"
        )
