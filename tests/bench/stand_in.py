"""A stand-in for Serf's RPC with as many members as wanted; tests/netns/test_serf_rpc.py holds both to one contract.

It knows what a reconcile asks: handshake, auth, members, tags, stats, list-keys. Streams stay silent, and questions get
no answer.
"""

import base64
import socket
import socketserver
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

import msgpack

from meshd.mesh.model import Member
from meshd.mesh.records import LIMIT, size

_SILENT = {"monitor", "stream", "event", "query"}
_WITH_BODY = {"handshake", "auth", "tags", *_SILENT}


class StandIn(socketserver.ThreadingTCPServer):
    """An agent named as the first member. `show` replaces its members; the answer is packed once, not in each call."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int, auth_key: str, members: list[Member], gossip_key: bytes) -> None:
        super().__init__(("127.0.0.1", port), _Connection)
        self.auth_key = auth_key
        self.gossip_key = base64.b64encode(gossip_key).decode()
        self.show(members)

    def show(self, members: list[Member]) -> None:
        self.members = members
        self.answer = _packed(members)

    def set_tags(self, tags: Mapping[str, str], delete: list[str]) -> str:
        own = self.members[0]
        new = {name: value for name, value in {**own.tags, **tags}.items() if name not in delete}
        if size(new) > LIMIT:
            return f"Encoded length of tags exceeds limit of {LIMIT} bytes"
        self.show([Member(own.name, own.address, own.port, own.status, new), *self.members[1:]])
        return ""


@contextmanager
def serving(port: int, auth_key: str, members: list[Member], gossip_key: bytes = bytes(32)) -> Iterator[StandIn]:
    """Answer on loopback of the caller's network namespace while the block runs."""
    with StandIn(port, auth_key, members, gossip_key) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Connection(socketserver.BaseRequestHandler):
    server: StandIn
    request: socket.socket

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.greeted = self.known = False

    def handle(self) -> None:
        messages = self._messages()
        with suppress(OSError):
            for header in messages:
                command = header["Command"]
                body = next(messages, {}) if command in _WITH_BODY else {}
                error, answer = self._answer(command, body)
                self.request.sendall(msgpack.packb({"Seq": header["Seq"], "Error": error}) + answer)

    def _messages(self) -> Iterator[dict[str, Any]]:
        unpacker = msgpack.Unpacker(unicode_errors="replace")  # payloads are any bytes
        while data := self.request.recv(65536):
            unpacker.feed(data)
            yield from unpacker

    def _answer(self, command: str, body: Mapping[str, Any]) -> tuple[str, bytes]:
        """Give the error, empty if there is none, and the packed body of the answer."""
        if command == "handshake":
            self.greeted = True
            return "", b""
        if command == "auth":
            self.known = body["AuthKey"] == self.server.auth_key
            return "" if self.known else "Invalid authentication token", b""
        if not self.greeted or not self.known:
            return "Authentication required" if self.greeted else "Handshake required", b""
        if command == "members":
            return "", self.server.answer
        told = {
            "stats": {"agent": {"name": self.server.members[0].name}},
            "list-keys": {"Keys": {self.server.gossip_key: len(self.server.members)}},
        }
        if command in told:
            return "", msgpack.packb(told[command])
        error = "" if command in _SILENT else "Unsupported command"
        if command == "tags":
            error = self.server.set_tags(body.get("Tags", {}), body.get("DeleteTags", []))
        return error, b""


def _packed(members: Iterable[Member]) -> bytes:
    packed: bytes = msgpack.packb({"Members": [_entry(m) for m in members]}, use_bin_type=False)
    return packed


def _entry(member: Member) -> dict[str, object]:
    """As the agent sends it: the address as bytes, and six versions that nobody asks for."""
    versions = [f"{of}{which}" for of in ("Protocol", "Delegate") for which in ("Min", "Max", "Cur")]
    return {
        "Name": member.name,
        "Addr": member.address.packed,
        "Port": member.port,
        "Tags": dict(member.tags),
        "Status": str(member.status),
        **dict.fromkeys(versions, 4),
    }
