"""Serf's RPC as bytes: whatever an agent, or a member through it, sends is an answer or a SerfError."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import SerfError
from meshd.gossip.serf.client import Serf, decode_member
from meshd.mesh.model import Member


@contextlib.contextmanager
def agent_that_sends(data: bytes) -> Iterator[Serf]:
    """A client whose agent has already answered, and has then closed the connection."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        client = Serf(ours, timeout=2)
        with client:
            yield client


def packed(*values: object) -> bytes:
    return b"".join(msgpack.packb(value, use_bin_type=False) for value in values)


HEADER = {"Seq": 1, "Error": ""}
ENTRY = {
    "Name": "barge1",
    "Addr": bytes([10, 10, 10, 101]),
    "Port": 7946,
    "Status": "alive",
    "Tags": {"wg": "x"},
    "ProtocolCur": 5,
}
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=5)
    ),
    max_leaves=20,
)
calls: list[Callable[[Serf], object]] = [
    Serf.members,
    Serf.stats,
    lambda serf: serf.join(["10.0.0.1"]),
    lambda serf: serf.tags({"a": "b"}),
    lambda serf: list(serf.query("q", b"", timeout=1)),
    lambda serf: list(serf.stream()),
    lambda serf: list(serf.monitor()),
]


@pytest.mark.parametrize("call", calls, ids=["members", "stats", "join", "tags", "query", "stream", "monitor"])
@given(st.binary(max_size=300))
def test_rpc_noise_raises_serf_error(call: Callable[[Serf], object], data: bytes) -> None:
    """Random bytes from the agent raise SerfError, nothing else."""
    with agent_that_sends(data) as serf, pytest.raises(SerfError):
        call(serf)


@pytest.mark.parametrize("call", calls, ids=["members", "stats", "join", "tags", "query", "stream", "monitor"])
@given(plain, plain)
def test_rpc_unexpected_values_raise_serf_error(call: Callable[[Serf], object], one: Any, two: Any) -> None:
    """Well-formed but unexpected values are an answer or raise SerfError."""
    with agent_that_sends(packed(HEADER, one, HEADER, two)) as serf, contextlib.suppress(SerfError):
        call(serf)


@given(plain)
def test_decode_member_accepts_any_value(entry: Any) -> None:
    """Any value is decoded as a member or as nothing."""
    raw = msgpack.unpackb(packed(entry), raw=True, strict_map_key=False)
    assert decode_member(raw) is None or isinstance(decode_member(raw), Member)


@given(st.dictionaries(st.sampled_from(list(ENTRY)), plain))
def test_members_skip_spoiled_entry(spoiled: dict[str, Any]) -> None:
    """A spoiled entry does not hide the other members."""
    answer = packed(HEADER, {"Members": [{**ENTRY, **spoiled}, {**ENTRY, "Name": "barge2"}]})
    with agent_that_sends(answer) as serf:
        assert serf.members()[-1].name == "barge2"


def test_decode_member_replaces_invalid_utf8() -> None:
    """Tags that are not UTF-8 are read with replacement characters."""
    raw = msgpack.unpackb(packed({**ENTRY, "Tags": {b"\xff": b"\xfe\x00"}}), raw=True)
    member = decode_member(raw)
    assert member is not None
    assert member.tags == {"\ufffd": "\ufffd\\x00"}, "and made safe to show"


def test_decode_member_unmaps_ipv4() -> None:
    """An IPv4 address that is mapped into IPv6 is read as IPv4."""
    mapped = {**ENTRY, "Addr": bytes(10) + b"\xff\xff" + bytes([10, 10, 10, 101])}
    member = decode_member(msgpack.unpackb(packed(mapped), raw=True))
    assert member is not None
    assert str(member.address) == "10.10.10.101"


def test_rpc_error_is_one_line() -> None:
    """An error of the agent is reported in one line."""
    with agent_that_sends(packed({"Seq": 1, "Error": "no\n such  thing"})) as serf, pytest.raises(SerfError) as caught:
        serf.stats()
    assert str(caught.value) == "stats: no such thing"


def test_tags_are_sent_again_after_broadcast_timeout() -> None:
    """Tags are sent again after a broadcast time-out, three times at most."""
    lost = {"Error": "timeout waiting for update broadcast"}
    with agent_that_sends(packed({"Seq": 1, **lost}, {"Seq": 2, "Error": ""})) as serf:
        serf.tags({"a": "b"})
    answers = [{"Seq": seq, **lost} for seq in (1, 2, 3)]
    with agent_that_sends(packed(*answers)) as serf, pytest.raises(SerfError, match="tags: timeout waiting for update"):
        serf.tags({"a": "b"})
    refused = [{"Seq": 1, "Error": "too long"}, {"Seq": 2, "Error": ""}]
    with agent_that_sends(packed(*refused)) as serf, pytest.raises(SerfError, match="tags: too long"):
        serf.tags({"a": "b"})


def test_rpc_nested_lists_raise_serf_error() -> None:
    """A bomb of nested lists raises SerfError."""
    with agent_that_sends(b"\x91" * 100_000) as serf, pytest.raises(SerfError):
        serf.stats()


def test_rpc_huge_string_raises_serf_error() -> None:
    """A string whose header claims gigabytes raises SerfError at once."""
    with agent_that_sends(packed(HEADER) + b"\xdb\xff\xff\xff\xff" + bytes(100)) as serf, pytest.raises(SerfError):
        serf.stats()
