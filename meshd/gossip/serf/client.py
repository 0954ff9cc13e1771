"""Serf's RPC: msgpack over TCP on loopback (https://www.serf.io/docs/agent/rpc.html).

A request is a header {Command, Seq} and a body; an answer is a header {Seq, Error} and, for some commands, a body.
Everything that is read was written, in part, by other members: it is bounded and checked.
"""

import base64
import re
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from itertools import islice
from threading import Lock
from types import TracebackType
from typing import Any, Self

import msgpack
from tenacity import Retrying, retry_if_exception, stop_after_attempt

from meshd.endpoint import IPAddress
from meshd.errors import SerfError
from meshd.gossip.serf import loopback
from meshd.mesh.model import Member, Status
from meshd.printable import LIMIT as LIMIT_OF_TEXT
from meshd.printable import printable

# 10,000 members with 512 bytes of tags each are 10 MB.
LIMIT = 64 * 2**20
# A host's name has at most 63 characters, but Serf takes any.
NAME_LIMIT = 128
_STATUSES = frozenset(Status)
CHUNK = 65536
# Serf waits this long for a change of its own tags to have left (its option `broadcast_timeout`).
BROADCAST_TIMEOUT = 5.0
# Lines of its log that an agent remembers for a monitor.
REMEMBERED = 512
CONFLICT = re.compile(r"\[ERR\] serf: Node name conflicts with another node at (\S+?)\. Names must be unique!.*")


@dataclass(frozen=True, slots=True)
class Access:
    """The way to one agent's RPC: its port on loopback, and the processes of which one must be at the other end.

    The key is read after that is certain. It is another one after each start of the agent.
    """

    port: int
    key: Callable[[], str]
    processes: Callable[[], Collection[int]]


class Serf:
    """One connection to an agent. Commands are answered one after the other; a stream takes the connection for itself.

    While a stream or a query runs, only `respond` may be called, from any thread; `close` ends it.
    """

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout
        self._unpacker = _unpacker()
        self._seq = 0
        self._sending = Lock()

    @classmethod
    def connect(cls, access: Access, timeout: float = 5.0) -> Self:
        """Connect to the agent on loopback and authenticate. Raises SerfError.

        Any local user may listen there while the agent does not, so nothing is sent before it is certain who answers.
        An agent without `rpc_auth`, one that someone runs by hand, is used without.
        """
        try:
            connection = socket.create_connection(("127.0.0.1", access.port), timeout)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise SerfError(
                f"the Serf agent does not answer on 127.0.0.1:{access.port}: {error.strerror or error}"
            ) from error
        client = cls(connection, timeout)
        try:
            loopback.check(connection, access.processes, timeout)
            client._handshake(access.key())
        except BaseException:
            client.close()
            raise
        return client

    def _handshake(self, auth_key: str) -> None:
        self._call("handshake", {"Version": 1})
        if auth_key:
            try:
                self._call("auth", {"AuthKey": auth_key})
            except SerfError:
                # An agent that wants no key refuses any; it then answers everything. One that wants another says no.
                self.stats()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a stream that another thread reads ends with a SerfError."""
        with suppress(OSError):  # the other side may have closed it
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def wait_at_most(self, seconds: float) -> None:
        """Wait no longer for an answer from now on. After one that comes too late the connection is of no more use."""
        self._timeout = seconds
        self._connection.settimeout(seconds)

    # --- commands --------------------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        """Return all members, also those that failed and left. An entry that makes no sense is left out."""
        body = self._call("members", body=True)
        entries = body.get("Members")
        if not isinstance(entries, list):
            raise SerfError("members: the agent's answer has no list of members")
        # Each entry is dropped once it is read: somebody can make Serf list thousands.
        entries.reverse()
        return [member for _ in range(len(entries)) if (member := decode_member(entries.pop())) is not None]

    def join(self, addresses: Sequence[str], *, replay: bool = False) -> int:
        """Join through the members at `address:port`; return the number that answered. Raises SerfError if none did."""
        body = self._call("join", {"Existing": list(addresses), "Replay": replay}, body=True)
        return int(body.get("Num", 0))

    def tags(self, tags: Mapping[str, str], delete: Sequence[str] = ()) -> None:
        """Set and delete own tags. It takes 0.5 s: the agent waits for the gossip to have left.

        An agent whose wait timed out may have lost the change to one of the same moment (its own answer to a
        suspicion, or someone else's call): it is told again. Who waits for no longer than BROADCAST_TIMEOUT does not
        hear of that; the agent goes on.
        """
        request = {"Tags": dict(tags), "DeleteTags": list(delete)}
        lost = retry_if_exception(lambda error: isinstance(error, SerfError) and "update broadcast" in str(error))
        Retrying(retry=lost, stop=stop_after_attempt(3), reraise=True)(self._call, "tags", request)

    def leave(self) -> None:
        """Leave the gossip; the agent then ends."""
        self._call("leave")

    def force_leave(self, name: str, *, prune: bool = False) -> None:
        """Declare a failed member as left. Never for one that is alive: that blocks the agent."""
        self._call("force-leave", {"Node": name, "Prune": prune})

    def stats(self) -> dict[str, Any]:
        """Return the agent's own figures."""
        return self._call("stats", body=True)

    def keys(self) -> set[bytes]:
        """Return all gossip keys that any member has. The agent waits a few seconds for those who are silent."""
        seq = self._send("list-keys")
        self._header(seq, tell=False)  # its error says that some did not answer, and their keys are not in the body
        keys = self._read().get("Keys")
        return {_key(text) for text in keys} if isinstance(keys, dict) else set()

    def query(
        self, name: str, payload: bytes, *, timeout: float, nodes: Sequence[str] = ()
    ) -> Iterator[tuple[str, bytes]]:
        """Ask all members, or only `nodes`, and give each answer with its sender until the time is over.

        Who has heard enough before that closes the connection.
        """
        request = {"Name": name, "Payload": payload, "Timeout": int(timeout * 1e9), "FilterNodes": list(nodes)}
        seq = self._send("query", request)
        self._header(seq)
        self._connection.settimeout(timeout + self._timeout)
        while True:
            self._header(seq)
            record = self._read()
            kind, answer = _text(record.get("Type")), record.get("Payload")
            if kind == "done":
                return
            if kind == "response" and isinstance(answer, bytes):
                yield _text(record.get("From")), answer

    def event(self, name: str, payload: bytes) -> None:
        """Send a user event to all members; it is not held back and not merged with others of its name."""
        self._call("event", {"Name": name, "Payload": payload, "Coalesce": False})

    def respond(self, query: int, payload: bytes) -> None:
        """Answer a query that came by this connection's stream. Whether it was in time is not said."""
        self._send("respond", {"ID": query, "Payload": payload})

    def stream(self, types: str = "*") -> Iterator[dict[str, Any]]:
        """Follow events and queries: each a dict with `Event`, and `Name`, `Payload`, `ID` or `Members`."""
        for record in self._follow("stream", {"Type": types}):
            yield {**record, "Event": _text(record.get("Event")), "Name": _text(record.get("Name"))}

    def monitor(self, level: str = "INFO") -> Iterator[str]:
        """Follow the agent's log, what it still remembers first. Each is one whole line, whatever names are in it."""
        for record in self._follow("monitor", {"LogLevel": level}):
            yield _text(record.get("Log"))

    def name_conflict(self) -> str | None:
        """Return the address of another member with this agent's name, if the agent has logged one.

        It looks at what the agent remembers from before this connection. Never at the log's file: a member's name may
        hold a newline, and any text after it. Raises SerfError.
        """
        host, port = self._connection.getsockname()
        last = f"[INFO] agent.ipc: Accepted client: {host}:{port}"
        for record in islice(self._follow("monitor", {"LogLevel": "INFO"}, self._timeout), 2 * REMEMBERED):
            _date, _, rest = _text(record.get("Log")).strip().partition(" ")
            _time, _, line = rest.partition(" ")
            if found := CONFLICT.fullmatch(line):
                return found[1]
            if line == last:
                break
        return None

    # --- the wire --------------------------------------------------------------------------------------------------

    def _call(self, command: str, request: Mapping[str, Any] | None = None, *, body: bool = False) -> dict[str, Any]:
        seq = self._send(command, request)
        # Some commands send their body also with an error: it must be read before the error is told.
        error = self._header(seq, tell=False)
        answer = self._read() if body and (not error or command == "join") else {}
        if error:
            raise SerfError(f"{command}: {error}")
        return answer

    def _follow(
        self, command: str, request: Mapping[str, Any], timeout: float | None = None
    ) -> Iterator[dict[str, Any]]:
        seq = self._send(command, request)
        self._header(seq)
        self._connection.settimeout(timeout)
        while True:
            header = self._read()
            # The answer to `respond` comes in between: it has a header alone.
            if header.get("Seq") == seq:
                yield self._read()

    def _send(self, command: str, request: Mapping[str, Any] | None = None) -> int:
        with self._sending:
            self._seq += 1
            message = msgpack.packb({"Command": command, "Seq": self._seq})
            if request is not None:
                # Serf's codec is older than msgpack's str8 and bin types.
                message += msgpack.packb(request, use_bin_type=False)
            try:
                self._connection.sendall(message)
            except OSError as error:
                raise SerfError(f"{command}: the connection to the Serf agent broke: {error}") from error
            return self._seq

    def _header(self, seq: int, *, tell: bool = True) -> str:
        header = self._read()
        while header.get("Seq") != seq:
            header = self._read()
        error = _text(b" ".join(raw.split())) if isinstance(raw := header.get("Error"), bytes) else ""
        if error and tell:
            raise SerfError(error)
        return error

    def _read(self) -> dict[str, Any]:
        try:
            while True:
                try:
                    value = self._unpacker.unpack()
                    break
                except msgpack.OutOfData:
                    data = self._connection.recv(CHUNK)
                    if not data:
                        raise SerfError("the Serf agent closed the connection") from None
                    self._unpacker.feed(data)
        except (OSError, ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
            raise SerfError(f"the connection to the Serf agent broke: {error}") from error
        if not isinstance(value, dict):
            raise SerfError(f"the Serf agent sent a {type(value).__name__} where an object belongs")
        return {_text(key): item for key, item in value.items()}


def _key(text: object) -> bytes:
    """Return a key in base64 as bytes; whatever else a member says is no key of the mesh either."""
    raw = text if isinstance(text, bytes) else b""
    try:
        return base64.b64decode(raw, validate=True)
    except ValueError:
        return raw


def _unpacker() -> Any:
    # raw=True: names and tags are bytes that need not be UTF-8.
    return msgpack.Unpacker(raw=True, strict_map_key=False, max_buffer_size=LIMIT)


def decode_member(entry: object) -> Member | None:
    """Read one member of the agent's list, which others wrote; None if it makes no sense."""
    if not isinstance(entry, dict):
        return None
    address, port, tags = _address(entry.get(b"Addr")), entry.get(b"Port"), entry.get(b"Tags") or {}
    status = _text(entry.get(b"Status"))
    name = _text(entry.get(b"Name"), NAME_LIMIT)
    if address is None or not name or type(port) is not int or not isinstance(tags, dict) or status not in _STATUSES:
        return None
    return Member(name, address, port, Status(status), {_text(k): _text(v) for k, v in tags.items()})


def _address(raw: object) -> IPAddress | None:
    return _unpacked(raw) if isinstance(raw, bytes) and len(raw) in (4, 16) else None


@lru_cache(16384)
def _unpacked(raw: bytes) -> IPAddress:
    address = ip_address(raw)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _text(value: object, limit: int = LIMIT_OF_TEXT) -> str:
    """Return a text that other members may have written, safe to be shown: this is where all of it comes in."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return printable(text, limit) if isinstance(text, str) else ""
