"""WireGuard: one contract, two backends, which `find` chooses between.

`kernel` speaks generic netlink (include/uapi/linux/wireguard.h), `userspace` the text protocol of wireguard-go
(https://www.wireguard.com/xplatform/). Neither needs `wg`. What both share is here.
"""

import base64
import binascii
import shutil
from ipaddress import IPv4Network
from typing import NamedTuple, Protocol

from meshd.errors import ApplyError, InputError, MissingError
from meshd.mesh.invitations import public_key
from meshd.mesh.model import Action, Adapter, Change, Device, Endpoint, Peer

PROGRAM = "wireguard-go"
_NO_KERNEL = "this kernel has no WireGuard"
_NO_PROGRAM = f"{PROGRAM} is not installed"


class WireGuard(Adapter, Protocol):
    """The adapter of one device and its peers.

    `read` gives the Device (public key "" while it has no private key) and its Peers, sorted by key; nothing when
    there is no such device. A Change of a Device makes or removes the link too. Setting a Peer sends only what differs
    from `change.old`: an endpoint that is sent again undoes roaming, allowed IPs that are sent again are gone for a
    moment.
    """

    @property
    def backend(self) -> str:
        """`kernel` or `userspace`."""
        ...


def find(name: str, private_key: bytes, prefer: str = "auto") -> WireGuard:
    """The adapter of the device `name` (which need not exist yet), holding its 32-byte private key.

    A device that exists decides the backend: it is adopted, whatever `prefer` says. Else `prefer` does: `kernel`,
    `userspace`, or `auto` (the kernel when it can). Raises MissingError, which says what to install; InputError for
    another `prefer`; ApplyError.
    """
    # pyroute2 costs 200 ms to import and nacl 36 ms: nobody who merely imports this package should wait for them.
    from meshd.net.wireguard.userspace import Userspace, is_running  # noqa: PLC0415

    if prefer not in ("auto", "kernel", "userspace"):
        raise InputError(f"WireGuard backend {prefer!r}: use auto, kernel or userspace")
    if is_running(name):
        return Userspace(name, private_key)

    from meshd.net.wireguard.kernel import Kernel, has_device, is_available  # noqa: PLC0415

    if has_device(name):
        return Kernel(name, private_key)
    if prefer != "userspace" and is_available():
        return Kernel(name, private_key)
    if prefer != "kernel" and shutil.which(PROGRAM):
        return Userspace(name, private_key)
    raise MissingError(_advice(prefer))


def _advice(prefer: str) -> str:
    install, load = f"apt install {PROGRAM}", "load the module (modprobe wireguard)"
    if prefer == "kernel":
        return f"{_NO_KERNEL}: {load}"
    if prefer == "userspace":
        return f"{_NO_PROGRAM}: {install}"
    return f"{_NO_KERNEL} and {_NO_PROGRAM}: {install}, or {load}"


# --- keys ----------------------------------------------------------------------------------------------------------


def encode_key(raw: bytes) -> str:
    """Base64 text of a key, as `wg` prints it."""
    return base64.b64encode(raw).decode("ascii")


def decode_key(text: str) -> bytes:
    """The 32 bytes of a base64 key. Raises ApplyError for anything else."""
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise ApplyError(f"WireGuard key {text!r}: not base64") from error
    if len(raw) != 32:
        raise ApplyError(f"WireGuard key {text!r}: {len(raw)} bytes instead of 32")
    return raw


def check_key(device: Device, private_key: bytes) -> None:
    """Refuse a Device that wants another key than the adapter holds: no number of passes would reach it."""
    own = public_key(private_key)
    if device.public_key != own:
        raise ApplyError(f"setting {device}: the private key at hand belongs to {own}")


# --- peers ---------------------------------------------------------------------------------------------------------


class PeerUpdate(NamedTuple):
    """What to send about a peer; None leaves a field as it is. `update_only`: do not create the peer."""

    endpoint: Endpoint | None
    allowed_ips: tuple[IPv4Network, ...] | None
    keepalive: int | None
    update_only: bool


def peer_update(change: Change, peer: Peer) -> PeerUpdate:
    """What an ADD or SET of `peer` has to send: for a SET with `change.old` only the differences."""
    old = change.old
    if change.action is not Action.SET or not isinstance(old, Peer):
        return PeerUpdate(peer.endpoint, peer.allowed_ips, peer.keepalive, update_only=False)
    return PeerUpdate(
        endpoint=None if peer.endpoint == old.endpoint else peer.endpoint,
        allowed_ips=None if peer.allowed_ips == old.allowed_ips else peer.allowed_ips,
        keepalive=None if peer.keepalive == old.keepalive else peer.keepalive,
        # A peer that went away meanwhile must not come back by halves; the next pass adds it whole.
        update_only=True,
    )
