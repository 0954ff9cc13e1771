"""Records survive the way through tags; nothing but a record comes out of tags."""

import base64
import json
import re
from collections.abc import Callable
from ipaddress import IPv4Network, ip_address

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshd.endpoint import Endpoint
from meshd.gossip.messages import EVENT_LIMIT, TellRecord
from meshd.mesh import extensions
from meshd.mesh.model import FORMER, VERSION, Certificate, Record
from meshd.mesh.records import (
    FORMER_PREFIX,
    LIMIT,
    MAX_PREFIX,
    RecordError,
    decode,
    encode,
    from_wire,
    pack_certificate,
    read_certificate,
    size,
    to_wire,
)
from tests.conftest import GOLDEN, OVERLAY, certificate, delegated, delegation, public_key, record

SUBNET = record(1).subnet
LONG = delegation("x" * MAX_PREFIX, subnets=(SUBNET,))
FORMER_LONG = delegation("x" * FORMER_PREFIX, subnets=(SUBNET,), version=FORMER)
IPV6 = Endpoint(ip_address("2001:db8:1:2:3:4:5:6"), 65535)
UNKNOWN = extensions.pack({5: b"later", 9: b""})


@pytest.mark.parametrize(
    "original",
    [
        record(1),
        record(2, seq=2**48 - 1, leaving=True),
        record(3, endpoint=IPV6, by=certificate("barge3", expires=2**32 - 1, subnets=(record(3).subnet,) * 4)),
        record(4, by=delegated("barge4", delegation())),
        record(5, by=delegated("barge5", LONG), endpoint=IPV6, leaving=True),
        record(1, extensions=UNKNOWN, by=certificate("barge1", extensions=UNKNOWN)),
        record(5, extensions=UNKNOWN, by=delegated("barge5", delegation(extensions=UNKNOWN))),
        record(1, by=certificate("barge1", version=FORMER)),
        record(5, by=delegated("barge5", FORMER_LONG), endpoint=IPV6),
        record(1, version=FORMER),
        record(2, seq=2**48 - 1, leaving=True, version=FORMER),
        record(5, by=delegated("barge5", FORMER_LONG), endpoint=IPV6, leaving=True, version=FORMER),
    ],
    ids=[
        *("plain", "leaving", "ipv6", "delegated", "all", "extended", "delegated extended"),
        *("version 2 certificate", "version 2 delegation", "version 2", "version 2 leaving", "version 2 all"),
    ],
)
def test_record_round_trip(original: Record) -> None:
    """A record survives the way through tags and through its wire format."""
    assert decode(encode(original), OVERLAY, 24) == original
    assert from_wire(to_wire(original), OVERLAY, 24) == original
    assert encode(decode(encode(original), OVERLAY, 24)) == encode(original), "bit by bit"
    assert to_wire(original) == to_wire(from_wire(to_wire(original), OVERLAY, 24))


ROOM = extensions.pack({127: bytes(22)})
# What takes most room as text: no subnet has more characters.
WIDE = IPv4Network("100.100.100.192/26")
FOUR = (WIDE,) * 4
LONGEST: dict[str, Callable[[bytes], tuple[Certificate, Endpoint | None]]] = {
    "IPv4": lambda more: (certificate("barge1", subnets=FOUR, extensions=more), None),
    "IPv6": lambda more: (certificate("barge1", subnets=FOUR, extensions=more), IPV6),
    "delegated": lambda more: (
        delegated("barge1", delegation("x" * MAX_PREFIX, subnets=(WIDE,), extensions=more)),
        IPV6,
    ),
}


@pytest.mark.parametrize("longest", LONGEST)
def test_24_bytes_of_extensions_fit(longest: str) -> None:
    """Into each kind of record, with the longest of all else, 24 bytes fit: of its own or of what is signed for it."""
    assert len(ROOM) == 24
    for own, others in ((ROOM, b""), (b"", ROOM)):
        by, endpoint = LONGEST[longest](others)
        full = record(1, seq=2**48 - 1, by=by, endpoint=endpoint, subnet=WIDE, extensions=own)
        tags = encode(full)
        assert size(tags) <= LIMIT
        assert decode(tags, IPv4Network("100.64.0.0/10"), 26) == full
        assert len(TellRecord("b" * 63, to_wire(full)).payload()) <= EVENT_LIMIT


def test_longest_record_fits_into_tags() -> None:
    """The sizes that docs/record.md gives are right, and the key and the subnet can be read in the tags."""
    tags = encode(record(105, seq=2**48 - 1, by=delegated("barge105", LONG), endpoint=IPV6))
    assert tags["wg"] == public_key("barge105")
    assert tags["subnet"] == "172.20.205.0/24"
    sizes = [size(encode(record(n, by=by, endpoint=end))) for n, by, end in ((1, None, None), (1, None, IPV6))]
    assert [*sizes, size(tags)] == [326, 341, 479]
    assert len(to_wire(record(1))) == 229


def test_record_that_is_too_long_is_no_set_of_tags() -> None:
    """Serf would refuse it."""
    with pytest.raises(RecordError, match="Serf carries 512"):
        encode(record(1, extensions=extensions.pack({1: bytes(200)})))


def test_size_matches_serf_encoding() -> None:
    """The computed size of tags is the one of Serf's encoding."""
    # Serf's codec knows no str8: strings of 32 bytes and more take a three-byte header, as msgpack's old format has it.
    tags = encode(record(1))
    assert size(tags) == 1 + len(msgpack.packb(tags, use_bin_type=False))


def packed(position: int, value: bytes, of: Record | None = None) -> str:
    """The meshd tag of a record with some bytes of it changed."""
    raw = bytearray(to_wire(of or record(1))[37:])
    raw[position : position + len(value)] = value
    return f"3.{base64.b85encode(raw).decode()}"


def former(position: int, value: bytes) -> str:
    """The same of version 2."""
    raw = bytearray(base64.urlsafe_b64decode(encode(FORMER_RECORD)["meshd"][2:] + "=="))
    raw[position : position + len(value)] = value
    return "2." + base64.urlsafe_b64encode(raw).decode().rstrip("=")


def extended(block: bytes) -> str:
    """The meshd tag of a record with this block of extensions, whatever it is."""
    return encode(record(1, extensions=block))["meshd"]


FORMER_RECORD = record(1, version=FORMER)
PLAIN, OLD = encode(record(1))["meshd"], encode(FORMER_RECORD)["meshd"]
BAD: dict[str, dict[str, str | None]] = {
    "no record": {"meshd": None, "wg": None, "subnet": None},
    "no wg tag": {"wg": None},
    "version '1;seq=1;ep=10'": {"meshd": "1;seq=1;ep=10.10.10.101:51820"},
    "version '4'": {"meshd": "4." + PLAIN[2:]},
    "not of version 3": {"meshd": f"3.{base64.b85encode(to_wire(FORMER_RECORD)[37:]).decode()}"},
    "not of version 2": {"meshd": f"2.{base64.urlsafe_b64encode(to_wire(record(1))[37:]).decode().rstrip('=')}"},
    "not of version 3 ": {"meshd": "3."},
    "ends early": {"meshd": "2."},
    "ends early ": {"meshd": PLAIN[:-5]},
    "ends early  ": {"meshd": OLD[:-4]},
    "longer than it should be": {"meshd": PLAIN + "00000"},
    "longer than it should be ": {"meshd": OLD + "AAAA"},
    "not base 85": {"meshd": PLAIN + '"'},
    "not base 85 ": {"meshd": extended(b"\x05\x00")[:-1] + "~"},
    "not base 85  ": {"meshd": PLAIN + "~~~~~"},
    "not base 85   ": {"meshd": PLAIN + "\n"},
    "not base64url": {"meshd": OLD + "!"},
    "not base64url ": {"meshd": OLD + "="},
    "flags that this version of meshd does not know": {"meshd": packed(0, b"\x90")},
    "flags that this version of meshd does not know ": {"meshd": former(0, b"\x08")},
    "sequence number is 0": {"meshd": packed(1, bytes(6))},
    "sequence number is 0 ": {"meshd": former(1, bytes(6))},
    "no port": {"meshd": packed(11, bytes(2))},
    "too many subnets": {"meshd": packed(13 + 96 + 16, b"\x05")},
    "too many subnets ": {"meshd": former(13 + 96 + 12, b"\x05")},
    "extensions are malformed": {"meshd": extended(b"\x05")},
    "extensions are malformed ": {"meshd": extended(b"\x05\x01")},
    "extensions are malformed  ": {"meshd": extended(b"\x00\x00")},
    "extensions are malformed   ": {"meshd": extended(b"\x05\x00\x05\x00")},
    "extensions are malformed    ": {"meshd": extended(b"\x05\x00\x84\x00")},
    "needs a newer version of meshd (critical extension 5)": {"meshd": extended(b"\x04\x00\x85\x00")},
    "needs a newer version of meshd (critical extension 6)": {
        "meshd": encode(record(1, by=certificate("barge1", extensions=b"\x86\x00")))["meshd"]
    },
    "needs a newer version of meshd (critical extension 7)": {
        "meshd": encode(record(1, by=delegated("barge1", delegation(extensions=b"\x87\x00"))))["meshd"]
    },
    "prefix is too long": {
        "meshd": encode(record(1, by=delegated("barge1", delegation("x" * (MAX_PREFIX + 1)))))["meshd"]
    },
    "not a WireGuard public key": {"wg": "AAAA"},
    "not a WireGuard public key ": {"wg": "A" * 43 + "="},
    "not a WireGuard public key  ": {"wg": public_key("x") + "\n"},
    "is not a prefix": {"subnet": "172.20.101.7/24"},
    "is outside of the overlay": {"subnet": "10.0.0.0/24"},
    "is outside of the overlay ": {"subnet": "0.0.0.0/0"},
    "is not a /24": {"subnet": "172.20.101.0/25"},
    "is at the overlay's edge": {"subnet": "172.20.0.0/24"},
    "is at the overlay's edge ": {"subnet": "172.20.255.0/24"},
    "is not written as": {"subnet": "172.20.101.0/255.255.255.0"},
}


@pytest.mark.parametrize(("reason", "change"), BAD.items(), ids=list(BAD))
def test_bad_tags_are_refused_with_reason(reason: str, change: dict[str, str | None]) -> None:
    """Bad tags are refused with the reason."""
    tags = {k: v for k, v in (encode(record(1)) | change).items() if v is not None}
    with pytest.raises(RecordError, match=re.escape(reason.strip())):
        decode(tags, OVERLAY, 24)


@given(
    st.dictionaries(st.sampled_from(["wg", "subnet", "meshd", "x"]), st.text(max_size=200)),
    st.sampled_from(["wg", "subnet", "meshd", "none"]),
)
@example({"subnet": "1/1"}, "none")
def test_hostile_tags_raise_record_error(tags: dict[str, str], spoil: str) -> None:
    """Hostile tags are a valid record or raise RecordError."""
    good = encode(record(1))
    mixed = good | {k: v for k, v in tags.items() if k == spoil} if spoil != "none" else tags
    try:
        result = decode(mixed, OVERLAY, 24)
    except RecordError:
        return
    assert result.subnet.subnet_of(OVERLAY)
    assert result.subnet.prefixlen == 24


@given(st.binary(max_size=400), st.integers(0, 399), st.sampled_from([FORMER, VERSION]))
def test_hostile_bytes_raise_record_error(noise: bytes, at: int, version: int) -> None:
    """Hostile bytes are a valid record with one spelling or raise RecordError."""
    good = to_wire(record(1, extensions=UNKNOWN * (version == VERSION), version=version))
    for raw in (noise, good[:at] + noise + good[at + len(noise) :], good[: len(good) - at] + noise):
        try:
            result = from_wire(raw, OVERLAY, 24)
        except RecordError:
            continue
        assert to_wire(result) == raw, "one record has one spelling"


@given(st.text("0123456789ABCDEFabcdef!#$%&()*+-;<=>?@^_`{|}~", max_size=500), st.integers(0, 250))
def test_one_record_has_one_spelling(noise: str, at: int) -> None:
    """Text that is nearly a record's is refused, or is that of the record that it gives."""
    for text in (f"3.{noise}", PLAIN[:at] + noise[:1] + PLAIN[at + 1 :], PLAIN[: len(PLAIN) - at] + noise):
        tags = encode(record(1)) | {"meshd": text}
        try:
            result = decode(tags, OVERLAY, 24)
        except RecordError:
            continue
        assert encode(result) == tags


@pytest.mark.parametrize("commit", ["527c77a", "d164600"])
def test_records_of_version_2_are_read(commit: str) -> None:
    """The tags that a host of version 2 published are read, and written again as they were."""
    for tags in json.loads((GOLDEN / "version-2" / f"{commit}.json").read_text())["tags"].values():
        read = decode(tags, OVERLAY, 24)
        assert read.version == read.certificate.version == FORMER
        assert encode(read) == tags


def test_certificate_of_version_2_says_since_when_by_its_serial() -> None:
    """Of the authority's certificates of version 2, the serial begins with the time; a delegated one has none."""
    serial = (1_700_000_000_123 << 20) | 5
    read = record(1, by=certificate("barge1", serial=serial, version=FORMER))
    assert from_wire(to_wire(read), OVERLAY, 24).certificate.since == 1_700_000_000
    assert delegated("barge1", FORMER_LONG).since == delegated("barge1", LONG).since == 0


def test_earlier_member_ranks_before_later_one_whatever_their_serials() -> None:
    """The date of the membership ranks, then the serial; whoever came by a reusable invitation comes last."""
    early, late = Certificate(9, 0, b"a", since=5), Certificate(3, 0, b"b", since=6)
    other = Certificate(4, 0, b"c", since=6)
    ranked = sorted([delegated("barge1", LONG), other, late, early], key=lambda c: c.rank)
    assert ranked == [early, late, other, delegated("barge1", LONG)]


def test_certificates_of_two_versions_are_not_mistaken() -> None:
    """The bytes of one version are none of the other."""
    for version, other in ((2, 3), (3, 2)):
        with pytest.raises(RecordError):
            read_certificate(
                pack_certificate(certificate("barge1", version=version)), is_delegated=False, version=other
            )


def test_subnet_of_another_overlay_is_refused() -> None:
    """A subnet outside of the overlay is refused."""
    with pytest.raises(RecordError, match="outside of the overlay"):
        decode(encode(record(1)), IPv4Network("10.80.0.0/16"), 24)
