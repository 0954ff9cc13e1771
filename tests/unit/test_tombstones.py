"""Tombstones on their way: whole, in messages that Serf carries, and nothing but tombstones comes out."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.gossip.messages import ANSWER_LIMIT, EVENT_LIMIT
from meshd.mesh import certificates, tombstones
from meshd.mesh.model import Revocation, Tombstone
from meshd.mesh.records import MAX_PREFIX, MAX_SEQ, RecordError
from meshd.mesh.tombstones import Tombstones, grave
from tests.conftest import AUTHORITY, MESH, certificate, delegated, delegation, public_key, record

names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?", fullmatch=True)
keys = st.integers().map(lambda n: public_key(str(n)))
# A host's own last record, the longest one among them, and the authority's signature.
LONGEST = delegated("barge1", delegation("barge1" + "x" * (MAX_PREFIX - 6), subnets=(record(1).subnet,)))
records = st.sampled_from([record(2, leaving=True), record(1, seq=MAX_SEQ - 1, by=LONGEST, leaving=True)])
left = st.builds(
    lambda seq, key, last: Tombstone(seq, key, last, identity=last.certificate.identity),
    st.integers(1, MAX_SEQ - 1),
    keys,
    records,
)
forgotten = st.builds(
    lambda seq, key, signature: Tombstone(seq, key, forgotten=signature),
    st.integers(1, MAX_SEQ - 1),
    keys,
    st.binary(min_size=1, max_size=64),
)
by_name = st.dictionaries(
    names, st.lists(left | forgotten, min_size=1).map(lambda found: {t.identity: t for t in found}), max_size=20
)
revocations = st.dictionaries(st.integers(1, 2**63 - 1), st.tuples(names, st.binary(max_size=64)), max_size=20).map(
    lambda found: {serial: Revocation(serial, *fields) for serial, fields in found.items()}
)
owners = st.dictionaries(names, st.integers(1, 2**63 - 1).map(lambda n: certificate("any", serial=n)), max_size=20)
all_tombstones = st.builds(Tombstones, by_name, revocations, owners)


@given(all_tombstones, st.sampled_from([EVENT_LIMIT, ANSWER_LIMIT]))
def test_tombstones_round_trip_in_pages(known: Tombstones, limit: int) -> None:
    """Tombstones survive the way through pages that Serf can carry."""
    found = Tombstones()
    for message in known.pages(limit):
        assert len(message) <= limit + 10
        found = found.merged(Tombstones.read(message, MESH))
    assert found == known


def test_longest_tombstone_fits_into_event() -> None:
    """The longest tombstone fits into a user event."""
    proof = tombstones.of_leaving(record(1, seq=MAX_SEQ - 1, by=LONGEST, leaving=True))
    (message,) = Tombstones(grave("b" * 63, proof)).pages(EVENT_LIMIT)
    assert len(message) <= EVENT_LIMIT


def test_pages_skip_tombstones_without_proof() -> None:
    """Tombstones without a proof are not passed on."""
    assert list(Tombstones(grave("barge1", Tombstone(1, public_key("barge1")))).pages(EVENT_LIMIT)) == []


@given(st.binary(max_size=1024))
def test_read_tombstones_from_any_bytes(payload: bytes) -> None:
    """Any bytes are read as valid tombstones or as nothing."""
    found = Tombstones.read(payload, MESH)
    for name, _, goodbye in tombstones.each(found.gone):
        assert len(name) <= 63
        assert 0 < goodbye.seq < MAX_SEQ
    assert all(0 < serial < 2**63 for serial in found.revoked)


@given(st.binary(max_size=400))
def test_noise_is_no_proof(proof: bytes) -> None:
    """Random bytes prove no tombstone."""
    for kind in (b"g", b"f", b""):
        try:
            tombstone = tombstones.read_proof(1, public_key("barge1"), kind + proof, MESH)
        except RecordError:
            continue
        assert not tombstones.is_proved(MESH, "barge1", tombstone)


def test_read_skips_malformed_tombstones() -> None:
    """Malformed tombstones are skipped, and the good ones of the same message are read."""
    good, key = ["barge1", 5, bytes(31) + b"x", b"fp"], bytes(32)
    bad = [
        ["", *good[1:]],
        ["a b", *good[1:]],
        ["b", 0, *good[2:]],
        ["c", True, *good[2:]],
        ["d", 5, key, b"fp"],
        ["f", 5, good[2], b"p"],
        ["g", 5, good[2], b"g" + bytes(100)],
        ["e"],
        7,
    ]
    assert list(Tombstones.read(msgpack.packb([*bad, good]), MESH).gone) == ["barge1"]


@pytest.mark.parametrize("change", [{"name": "barge2"}, {"seq": 6}, {"public_key": public_key("barge2")}])
def test_forget_is_bound_to_one_membership(change: dict[str, str | int]) -> None:
    """The authority's forget counts for one name, sequence number and key only."""
    said = {"name": "barge1", "seq": 5, "public_key": public_key("barge1")}
    signature = certificates.forget(AUTHORITY, "meshd", "barge1", 5, public_key("barge1"))

    def proved(name: str, seq: int, public_key: str) -> bool:
        return tombstones.is_proved(MESH, name, Tombstone(seq, public_key, forgotten=signature))

    assert proved(**said)  # type: ignore[arg-type]
    assert not proved(**(said | change))  # type: ignore[arg-type]


def test_later_tombstone_wins() -> None:
    """Of two tombstones of one host the later one wins."""
    first, second = (
        Tombstones(grave("barge1", Tombstone(seq, public_key("barge1"), forgotten=b"p"))) for seq in (1, 2)
    )
    assert second.without(first) == second
    assert not first.without(second)
    assert not second.without(second)
    assert first.merged(second) == second.merged(first) == second
