"""What both of WireGuard's backends are and share: the contract, keys, and what to send about a peer."""

import base64
import binascii
from ipaddress import IPv4Network
from typing import NamedTuple, Protocol

from meshd.endpoint import Endpoint
from meshd.errors import ApplyError
from meshd.keys import public_key
from meshd.net.resources import Action, Adapter, Change, Device, Peer

PROGRAM = "wireguard-go"


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
    """Refuse a Device that wants another key than the adapter holds: no number of reconciles would reach it."""
    own = public_key(private_key)
    if device.public_key != own:
        raise ApplyError(f"setting {device}: the private key at hand belongs to {own}")


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
        # A peer that went away meanwhile must not come back half configured; the next reconcile adds it whole.
        update_only=True,
    )
