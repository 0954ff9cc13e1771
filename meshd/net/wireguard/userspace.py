"""WireGuard by wireguard-go: the text protocol "UAPI" on its unix socket (https://www.wireguard.com/xplatform/).

wireguard-go makes the link (a TUN) and lives as long as the link does. It is started outside of meshd's process group
and found again by its socket, so that restarting meshd disturbs nobody.
"""

import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from meshd.errors import ApplyError, MissingError
from meshd.interrupts import uninterrupted
from meshd.keys import public_key
from meshd.net.resources import Action, Change, Device, Peer, Resource
from meshd.net.wireguard.contract import PROGRAM, check_key, peer_update
from meshd.net.wireguard.uapi import State, format_device, format_peer, format_removal, not_understood, parse

SOCKETS = Path("/var/run/wireguard")  # compiled into wireguard-go
TIMEOUT = 5.0  # seconds for one exchange, for a start and for an end
MAX_ANSWER = 64 << 20  # bytes; a peer takes about 400
_POLL = 0.01
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: process, user, group


def is_running(name: str) -> bool:
    """Whether a wireguard-go answers for the link `name` of this network namespace. Raises ApplyError."""
    return _has_link(name) and _answers(_path(name))


class Userspace:
    """The adapter of a wireguard-go device; see `contract.WireGuard`."""

    kinds: ClassVar[frozenset[str]] = frozenset({"device", "peer"})
    backend = "userspace"

    def __init__(self, name: str, private_key: bytes) -> None:
        self._name = name
        self._private_key = private_key

    def read(self) -> list[Resource]:
        """The device and its peers; nothing when wireguard-go does not run or has lost its link. Raises ApplyError."""
        if not is_running(self._name):
            return []
        state = self._get()
        return [self._device(state), *state.peers]

    def apply(self, change: Change) -> None:
        """Make one change; a second time it is harmless. Raises ApplyError or MissingError."""
        try:
            self._apply(change)
        except ApplyError as error:
            raise ApplyError(f"{change}: {error}") from error

    def _apply(self, change: Change) -> None:
        resource, gone = change.resource, change.action is Action.REMOVE
        match resource:
            case Device():
                self._remove_device() if gone else self._set_device(resource)
            case Peer() if gone:
                self._remove_peer(resource)
            case Peer():
                self._set(format_peer(resource.public_key, peer_update(change, resource)))
            case _:
                raise ApplyError(f"WireGuard has no {resource.kind}")

    def _get(self) -> State:
        return parse(exchange(_path(self._name), "get=1\n\n"))

    def _device(self, state: State) -> Device:
        # By the public key, because wireguard-go gives the private one back clamped (RFC 7748).
        return Device(self._name, public_key(bytes.fromhex(state.private_key)) if state.private_key else "", state.port)

    def _set(self, request: str) -> None:
        # The answer to `set` is an errno alone, which parse() turns into an error.
        parse(exchange(_path(self._name), request))

    def _set_device(self, device: Device) -> None:
        check_key(device, self._private_key)
        if not is_running(self._name):
            _start(self._name)
        current = self._device(self._get())
        # Either costs something even when it changes nothing: the key all sessions, the port a new socket.
        key = None if current.public_key == device.public_key else self._private_key
        port = None if current.port == device.port else device.port
        if key is not None or port is not None:
            self._set(format_device(key, port))

    def _remove_device(self) -> None:
        """wireguard-go ends when its link goes; what it left behind when it was killed goes too."""
        from meshd.net.wireguard.kernel import delete_link  # noqa: PLC0415  # pyroute2 costs 200 ms to import

        path, here = _path(self._name), _has_link(self._name)
        delete_link(self._name, ("tun", "tuntap"))
        # Sockets are shared by the network namespaces of one file system: without the link, it may be another's.
        if here and not _wait(lambda: not _answers(path), TIMEOUT):
            raise ApplyError(f"wireguard-go still answers at {path}")
        if not _answers(path):
            path.unlink(missing_ok=True)

    def _remove_peer(self, peer: Peer) -> None:
        if is_running(self._name):
            self._set(format_removal(peer.public_key))


def exchange(path: Path, request: str) -> str:
    """Send one request, give the whole answer, within TIMEOUT and MAX_ANSWER. Raises ApplyError."""
    deadline = time.monotonic() + TIMEOUT
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(str(path))
            if not _is_own(sock):
                raise ApplyError(f"asking wireguard-go at {path}: another user listens there")
            sock.sendall(request.encode("ascii"))
            return _receive(sock, deadline).decode("ascii")
    except UnicodeDecodeError as error:
        raise not_understood("it is not ASCII") from error
    except OSError as error:
        raise ApplyError(f"asking wireguard-go at {path}: {error.strerror or error}") from error


def _receive(sock: socket.socket, deadline: float) -> bytes:
    answer = bytearray()
    while not answer.endswith(b"\n\n"):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(remaining)
        chunk = sock.recv(1 << 16)
        if not chunk:
            raise not_understood("it ends early")
        answer += chunk
        if len(answer) > MAX_ANSWER:
            raise not_understood(f"it is longer than {MAX_ANSWER} bytes")
    return bytes(answer)


def _start(name: str) -> None:
    """Start wireguard-go, which puts itself into the background once its link and its socket are there."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise MissingError(f"starting {PROGRAM} for {name}: it is not installed: apt install {PROGRAM}")
    try:
        with uninterrupted():
            done = subprocess.run(
                [program, name],
                stdin=subprocess.DEVNULL,
                # What it says until it is in the background; from then on its output goes to /dev/null.
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # Nothing of meshd's environment (which may hold secrets) stays readable in a long-lived process. The
                # last one is for old versions, which refuse to run where the kernel has WireGuard.
                env={"PATH": os.environ.get("PATH", os.defpath), "WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD": "1"},
                cwd="/",
                start_new_session=True,
                timeout=TIMEOUT,
                check=False,
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ApplyError(f"starting {PROGRAM}: {error}") from error
    if done.returncode or not _wait(lambda: is_running(name), TIMEOUT):
        # Between its errors there may be a banner that advises the kernel's WireGuard.
        said = [line for line in done.stdout.decode(errors="replace").splitlines() if line.startswith("ERROR")]
        raise ApplyError(f"starting {PROGRAM}: {said[-1] if said else f'no answer at {_path(name)}'}")


def _path(name: str) -> Path:
    return SOCKETS / f"{name}.sock"


def _has_link(name: str) -> bool:
    try:
        return bool(socket.if_nametoindex(name))
    except OSError:
        return False


def _answers(path: Path) -> bool:
    """Whether a wireguard-go of this user listens: a socket file outlives one that was killed."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(str(path))
            return _is_own(sock)
    except OSError:
        return False


def _is_own(sock: socket.socket) -> bool:
    """Return whether it was this user who listened at the other end (unix(7)): a request may hold the private key."""
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return bool(uid == os.geteuid())


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(_POLL)
    return true
