"""WireGuard in the kernel, by generic netlink (include/uapi/linux/wireguard.h) with pyroute2's message definition."""

import errno
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import IPv4Network, ip_address, ip_network
from typing import Any, ClassVar

from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket
from pyroute2.netlink.generic import wireguard as wg

from meshd.endpoint import Endpoint
from meshd.errors import ApplyError, ConflictError, MissingError
from meshd.net.netlink import link_kind, tolerating
from meshd.net.resources import Action, Change, Device, Peer, Resource
from meshd.net.wireguard.contract import PeerUpdate, check_key, decode_key, encode_key, peer_update


def is_available() -> bool:
    """Whether this kernel has WireGuard, loading its module when it is there. Leaves no link behind.

    Asking for the generic netlink family is enough: the module registers it together with the link type, and the kernel
    loads the module for it (MODULE_ALIAS_GENL_FAMILY).
    """
    try:
        with _wireguard():
            return True
    except NetlinkError as error:
        if error.code == errno.ENOENT:
            return False
        raise ApplyError(f"looking for the kernel's WireGuard: {error.args[-1]}") from error
    except OSError as error:
        raise ApplyError(f"looking for the kernel's WireGuard: {error.strerror or error}") from error


def has_device(name: str) -> bool:
    """Whether there is a kernel WireGuard link of that name. Raises ApplyError."""
    with _errors(f"looking for {name}"):
        return _link_kind(name) == "wireguard"


def delete_link(name: str, kinds: Sequence[str]) -> None:
    """Delete a link of one of these kinds; none of that name is fine. Raises ApplyError, ConflictError."""
    with _errors(f"removing link {name}"):
        kind = _link_kind(name)
        if kind is None:
            return
        if kind not in kinds:
            raise ConflictError(f"removing link {name}: it is a {kind} link, not WireGuard; meshd did not make it")
        with IPRoute(groups=0) as ipr, tolerating(errno.ENODEV):
            ipr.link("del", ifname=name)


class Kernel:
    """The adapter of a kernel device; see `contract.WireGuard`."""

    kinds: ClassVar[frozenset[str]] = frozenset({"device", "peer"})
    backend = "kernel"

    def __init__(self, name: str, private_key: bytes) -> None:
        self._name = name
        self._private_key = private_key

    def read(self) -> list[Resource]:
        """The device and its peers; nothing when there is no such device. Raises ApplyError, MissingError."""
        with _errors(f"reading WireGuard device {self._name}"):
            messages = self._get()
        return collect(self._name, messages) if messages else []

    def apply(self, change: Change) -> None:
        """Make one change; a second time it is harmless. Raises ApplyError, ConflictError or MissingError."""
        resource, gone = change.resource, change.action is Action.REMOVE
        with _errors(str(change)):
            match resource:
                case Device():
                    delete_link(self._name, ("wireguard",)) if gone else self._set_device(resource)
                case Peer():
                    self._remove_peer(resource) if gone else self._set_peer(resource, peer_update(change, resource))
                case _:
                    raise ApplyError(f"{change}: WireGuard has no {resource.kind}")

    def _get(self) -> list[Any]:
        messages: list[Any] = []
        with _wireguard() as sock, tolerating(errno.ENODEV, errno.EOPNOTSUPP):  # no link; one of another kind
            message = self._message(wg.WG_CMD_GET_DEVICE)
            messages += sock.nlm_request(message, msg_type=sock.prid, msg_flags=NLM_F_REQUEST | NLM_F_DUMP)
        return messages

    def _set(self, *attributes: tuple[str, Any]) -> None:
        with _wireguard() as sock:
            message = self._message(wg.WG_CMD_SET_DEVICE, *attributes)
            # pyroute2's own WireGuard.set() logs an error of its own for each ENOENT.
            list(sock.nlm_request(message, msg_type=sock.prid, msg_flags=NLM_F_REQUEST | NLM_F_ACK))

    def _message(self, command: int, *attributes: tuple[str, Any]) -> Any:
        message = wg.wgmsg()
        message["cmd"], message["version"] = command, wg.WG_GENL_VERSION
        message["attrs"] = [("WGDEVICE_A_IFNAME", self._name), *attributes]
        return message

    def _set_device(self, device: Device) -> None:
        check_key(device, self._private_key)
        self._create_link()
        current = collect(self._name, self._get())[0]
        attributes: list[tuple[str, Any]] = []
        if not isinstance(current, Device) or current.public_key != device.public_key:
            # Only when it differs: setting a private key ends all sessions.
            attributes.append(("WGDEVICE_A_PRIVATE_KEY", encode_key(self._private_key)))
        if not isinstance(current, Device) or current.port != device.port:
            attributes.append(("WGDEVICE_A_LISTEN_PORT", device.port))
        if attributes:
            self._set(*attributes)

    def _create_link(self) -> None:
        with IPRoute(groups=0) as ipr:
            try:
                ipr.link("add", ifname=self._name, kind="wireguard")
            except NetlinkError as error:
                if error.code == errno.EOPNOTSUPP:
                    raise MissingError(f"creating {self._name}: {_MISSING}") from error
                if error.code != errno.EEXIST:
                    raise
        kind = _link_kind(self._name)
        if kind != "wireguard":
            raise ConflictError(f"creating WireGuard device {self._name}: it exists and is a {kind} link")

    def _set_peer(self, peer: Peer, update: PeerUpdate) -> None:
        self._set(("WGDEVICE_A_PEERS", [{"attrs": _peer_attributes(peer, update)}]))

    def _remove_peer(self, peer: Peer) -> None:
        decode_key(peer.public_key)
        attributes = [("WGPEER_A_PUBLIC_KEY", peer.public_key), ("WGPEER_A_FLAGS", wg.WGPEER_F_REMOVE_ME)]
        with tolerating(errno.ENODEV):
            self._set(("WGDEVICE_A_PEERS", [{"attrs": attributes}]))


_MISSING = "this kernel has no WireGuard: load the module (modprobe wireguard), or use the userspace backend"


@contextmanager
def _wireguard() -> Iterator[Any]:
    """A generic netlink socket that knows WireGuard's messages. Raises NetlinkError ENOENT when the kernel has none.

    Not pyroute2.WireGuard: when the family is missing, its constructor logs twice and leaves its descriptors open.
    """
    with GenericNetlinkSocket() as sock:
        sock.asyncore.module_err_level = "debug"
        sock.bind(wg.WG_GENL_NAME, wg.wgmsg)
        yield sock


@contextmanager
def _errors(doing: str) -> Iterator[None]:
    """What the kernel refuses is an ApplyError that begins with `doing`; a missing family is a MissingError."""
    try:
        yield
    except NetlinkError as error:
        if getattr(error, "extra_code", 0) == errno.ENOTSUP:
            raise MissingError(f"{doing}: {_MISSING}") from error
        raise ApplyError(f"{doing}: {error.args[-1]}") from error
    except OSError as error:
        raise ApplyError(f"{doing}: {error.strerror or error}") from error


def _link_kind(name: str) -> str | None:
    """IFLA_INFO_KIND of a link, `device` when it has none, None when there is no such link."""
    try:
        with IPRoute(groups=0) as ipr:
            return link_kind(ipr.link("get", ifname=name)[0])
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise


def _peer_attributes(peer: Peer, update: PeerUpdate) -> list[tuple[str, Any]]:
    decode_key(peer.public_key)
    flags = wg.WGPEER_F_UPDATE_ONLY if update.update_only else 0
    attributes: list[tuple[str, Any]] = [("WGPEER_A_PUBLIC_KEY", peer.public_key)]
    if update.endpoint is not None:
        endpoint = {"addr": str(update.endpoint.address), "port": update.endpoint.port}
        attributes.append(("WGPEER_A_ENDPOINT", endpoint))
    if update.keepalive is not None:
        attributes.append(("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL", update.keepalive))
    if update.allowed_ips is not None:
        flags |= wg.WGPEER_F_REPLACE_ALLOWEDIPS
        attributes.append(("WGPEER_A_ALLOWEDIPS", [_allowed_ip(network) for network in update.allowed_ips]))
    return [*attributes, ("WGPEER_A_FLAGS", flags)]


def _allowed_ip(network: IPv4Network) -> dict[str, Any]:
    return {
        "attrs": [
            ("WGALLOWEDIP_A_FAMILY", socket.AF_INET),
            ("WGALLOWEDIP_A_IPADDR", network.network_address.packed),
            ("WGALLOWEDIP_A_CIDR_MASK", network.prefixlen),
        ]
    }


def collect(name: str, messages: Iterable[Any]) -> list[Resource]:
    """The Device and its Peers, sorted by key, from the messages of one dump.

    The kernel splits a peer with many allowed IPs over messages, and repeats only its key
    (https://github.com/svinota/pyroute2/issues/1212).
    """
    key, port = "", 0
    parts: dict[str, list[Any]] = {}
    for message in messages:
        key = _key_text(message.get_attr("WGDEVICE_A_PUBLIC_KEY")) or key
        port = message.get_attr("WGDEVICE_A_LISTEN_PORT") or port
        for part in message.get_attr("WGDEVICE_A_PEERS") or ():
            parts.setdefault(_key_text(part.get_attr("WGPEER_A_PUBLIC_KEY")), []).append(part)
    return [Device(name, key, port), *(_peer(public, parts[public]) for public in sorted(parts))]


def _key_text(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value or "")


def _peer(key: str, parts: Sequence[Any]) -> Peer:
    first = parts[0]
    time = first.get_attr("WGPEER_A_LAST_HANDSHAKE_TIME") or {}
    networks = (ip_network(ip["addr"]) for part in parts for ip in part.get_attr("WGPEER_A_ALLOWEDIPS") or ())
    return Peer(
        public_key=key,
        endpoint=_endpoint(first.get_attr("WGPEER_A_ENDPOINT")),
        # meshd sets no IPv6 allowed IPs, and a Peer has no room for them.
        allowed_ips=tuple(sorted(n for n in networks if isinstance(n, IPv4Network))),
        keepalive=first.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL") or 0,
        handshake=time.get("tv_sec", 0) + time.get("tv_nsec", 0) / 1e9,
        received=first.get_attr("WGPEER_A_RX_BYTES") or 0,
        sent=first.get_attr("WGPEER_A_TX_BYTES") or 0,
    )


def _endpoint(value: Any) -> Endpoint | None:
    if not value:
        return None
    with suppress(ValueError):
        return Endpoint(ip_address(value["addr"]), value["port"])
    return None
