"""Tombstones on their way: whole, in messages that Serf carries, and nothing but tombstones comes out."""

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.gossip.messages import ANSWER_LIMIT, EVENT_LIMIT
from meshd.mesh import certificates, extensions, tombstones
from meshd.mesh.model import FORMER, VERSION, Revocation, Tombstone
from meshd.mesh.records import FORMER_PREFIX, MAX_PREFIX, MAX_SEQ, RecordError
from meshd.mesh.tombstones import Tombstones, grave
from tests.conftest import AUTHORITY, MESH, certificate, delegated, delegation, public_key, record, seed

names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?", fullmatch=True)
keys = st.integers().map(lambda n: public_key(str(n)))
block = st.sampled_from([b"", extensions.pack({5: b"later"})])
# A host's own last record, the longest one among them, and the authority's signature; of version 2 and 3.
LONGEST = delegated("barge1", delegation("barge1" + "x" * (MAX_PREFIX - 6), subnets=(record(1).subnet,)))
FORMER_LONGEST = delegated(
    "barge1", delegation("barge1" + "x" * (FORMER_PREFIX - 6), subnets=(record(1).subnet,), version=FORMER)
)
records = st.sampled_from([record(2, leaving=True), record(1, seq=MAX_SEQ - 1, by=LONGEST, leaving=True)])
former_records = st.sampled_from(
    [
        record(2, leaving=True, version=FORMER),
        record(1, seq=MAX_SEQ - 1, by=FORMER_LONGEST, leaving=True, version=FORMER),
    ]
)
left = st.builds(
    lambda seq, key, last, more: tombstones.of_leaving(replace(last, seq=seq, public_key=key, extensions=more)),
    st.integers(1, MAX_SEQ - 1),
    keys,
    records,
    block,
) | st.builds(
    lambda seq, key, last: Tombstone(seq, key, last, identity=last.certificate.identity),
    st.integers(1, MAX_SEQ - 1),
    keys,
    former_records,
)
forgotten = st.builds(
    lambda seq, key, signature: Tombstone(seq, key, forgotten=signature),
    st.integers(1, MAX_SEQ - 1),
    keys,
    st.binary(min_size=1, max_size=64),
) | st.builds(
    lambda seq, key, signature, identity, more: Tombstone(
        seq, key, forgotten=signature, identity=identity, extensions=more
    ),
    st.integers(1, MAX_SEQ - 1),
    keys,
    st.binary(min_size=1, max_size=64),
    st.binary(min_size=32, max_size=32),
    block,
)
by_name = st.dictionaries(
    names, st.lists(left | forgotten, min_size=1).map(lambda found: {t.identity: t for t in found}), max_size=20
)
revocations = st.dictionaries(
    st.integers(1, 2**63 - 1),
    st.tuples(names, st.binary(max_size=64)) | st.tuples(names, st.binary(max_size=64), block, st.just(VERSION)),
    max_size=20,
).map(lambda found: {serial: Revocation(serial, *fields) for serial, fields in found.items()})
owners = st.dictionaries(
    names,
    st.builds(
        lambda n, version: certificate("any", serial=n, version=version),
        st.integers(1, 2**63 - 1),
        st.sampled_from([FORMER, VERSION]),
    ),
    max_size=20,
)
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
    for kind in (b"g", b"f", b"F", b""):
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


@pytest.mark.parametrize("identity", [b"", seed("identity")], ids=["version 2", "version 3"])
@pytest.mark.parametrize(
    "change",
    [
        {"seq": 6},
        {"public_key": public_key("barge2")},
        {"identity": seed("another")},
        {"identity": seed("another"), "extensions": b"\x05\x00"},
    ],
)
def test_forget_is_bound_to_one_membership(identity: bytes, change: dict[str, object]) -> None:
    """The authority's forget counts for one name, sequence number, key and identity only."""
    unsigned = Tombstone(5, public_key("barge1"), identity=identity)
    word = certificates.forget(AUTHORITY, "meshd", "barge1", unsigned)
    assert tombstones.is_proved(MESH, "barge1", word)
    assert not tombstones.is_proved(MESH, "barge2", word)
    assert not tombstones.is_proved(MESH, "barge1", replace(word, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("signed", ["revocation", "forget"])
def test_extensions_of_the_authoritys_word_are_signed_and_passed_on(signed: str) -> None:
    """What a later version adds to the authority's word is covered by its signature, and passed on as it came."""
    block = extensions.pack({5: b"later"})
    unsigned = Tombstone(5, public_key("barge1"), identity=seed("identity"), extensions=block)
    revocation = Revocation(7, "barge1", b"", block, VERSION)
    body = certificates._revocation_body("meshd", revocation)
    words = {
        "revocation": Tombstones(revoked={7: replace(revocation, signature=certificates._sign(AUTHORITY, body))}),
        "forget": Tombstones(grave("barge1", certificates.forget(AUTHORITY, "meshd", "barge1", unsigned))),
    }
    (page,) = words[signed].pages(EVENT_LIMIT)
    read = Tombstones.read(page, MESH)
    assert read == words[signed] == read.proved(MESH)
    (spoiled,) = words[signed].pages(EVENT_LIMIT)
    changed = Tombstones.read(spoiled.replace(b"later", b"LATER"), MESH)
    assert changed
    assert not changed.proved(MESH)


def test_critical_extension_leaves_out_its_entry_alone() -> None:
    """What this version must not skip is left out, and the rest of the page is read."""
    critical = extensions.pack({5: b""}, critical={5})
    newer = tombstones.of_leaving(record(2, leaving=True, extensions=critical))
    good = tombstones.of_leaving(record(3, leaving=True))
    (page,) = Tombstones({**grave("barge2", newer), **grave("barge3", good)}).pages(2000)
    assert Tombstones.read(page, MESH) == Tombstones(grave("barge3", good))


def test_entry_of_a_message_may_have_extensions_or_a_later_version() -> None:
    """Unknown extensions of an entry, or of the page, are skipped; a later version, or a critical one, is left out."""
    proof = tombstones.proof(tombstones.of_leaving(record(2, leaving=True)))
    names = ["known", "skipped"]
    entries: list[object] = [
        [3, "known", proof],
        [3, "skipped", proof, {5: b"x"}],
        [3, "critical", proof, {0x85: b"x"}],
        [3, "malformed", proof, {5: "x"}],
        [4, "later", proof],
        [3, "longer", proof, b""],
    ]
    assert sorted(Tombstones.read(msgpack.packb(entries), MESH).gone) == names
    assert sorted(Tombstones.read(msgpack.packb([3, *entries, {5: b"x"}]), MESH).gone) == names
    assert not Tombstones.read(msgpack.packb([3, *entries, {0x85: b"x"}]), MESH)
    assert not Tombstones.read(msgpack.packb([4, *entries]), MESH)


def test_version_2_comes_first_and_is_written_as_it_was() -> None:
    """A host of version 2 reads no page after one of which it can read nothing."""
    gone = {
        "barge1": {b"": Tombstone(5, public_key("barge1"), forgotten=b"f")},
        **grave("barge2", tombstones.of_leaving(record(2, leaving=True))),
        **grave("barge3", tombstones.of_leaving(record(3, leaving=True, version=FORMER))),
    }
    revoked = {7: certificates.revoke(AUTHORITY, "meshd", 7, "barge9")}
    owners = {"barge4": certificate("barge4"), "barge5": certificate("barge5", version=FORMER)}
    entries = [entry for page in Tombstones(gone, revoked, owners).pages(1) for entry in msgpack.unpackb(page)[1:]]
    assert [entry[0] for entry in entries] == ["barge1", "barge3", "barge5", "barge9", 3, 3]


def test_later_tombstone_wins() -> None:
    """Of two tombstones of one host the later one wins."""
    first, second = (
        Tombstones(grave("barge1", Tombstone(seq, public_key("barge1"), forgotten=b"p"))) for seq in (1, 2)
    )
    assert second.without(first) == second
    assert not first.without(second)
    assert not second.without(second)
    assert first.merged(second) == second.merged(first) == second
