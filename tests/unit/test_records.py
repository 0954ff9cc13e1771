"""Records survive the way through tags; nothing but a record comes out of tags."""

import base64
from ipaddress import IPv4Network, ip_address

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshd.endpoint import Endpoint
from meshd.mesh.model import Record
from meshd.mesh.records import LIMIT, MAX_PREFIX, RecordError, decode, encode, from_wire, size, to_wire
from tests.conftest import OVERLAY, certificate, delegated, delegation, public_key, record

LONG = delegation("x" * MAX_PREFIX, subnets=(record(1).subnet,))
IPV6 = Endpoint(ip_address("2001:db8:1:2:3:4:5:6"), 65535)


@pytest.mark.parametrize(
    "original",
    [
        record(1),
        record(2, seq=2**48 - 1, leaving=True),
        record(3, endpoint=IPV6, by=certificate("barge3", expires=2**32 - 1, subnets=(record(3).subnet,) * 4)),
        record(4, by=delegated("barge4", delegation())),
        record(5, by=delegated("barge5", LONG), endpoint=IPV6, leaving=True),
    ],
    ids=["plain", "leaving", "ipv6", "delegated", "all"],
)
def test_record_round_trip(original: Record) -> None:
    """A record survives the way through tags and through its wire format."""
    assert decode(encode(original), OVERLAY, 24) == original
    assert from_wire(to_wire(original), OVERLAY, 24) == original


def test_longest_record_fits_into_tags() -> None:
    """The longest record fits into Serf's tags, and its key and subnet can be read there."""
    tags = encode(record(105, seq=2**48 - 1, by=delegated("barge105", LONG), endpoint=IPV6))
    assert tags["wg"] == public_key("barge105")
    assert tags["subnet"] == "172.20.205.0/24"
    assert size(tags) <= LIMIT
    assert len(to_wire(record(1))) == 223


def test_size_matches_serf_encoding() -> None:
    """The computed size of tags is the one of Serf's encoding."""
    # Serf's codec knows no str8: strings of 32 bytes and more take a three-byte header, as msgpack's old format has it.
    tags = encode(record(1))
    assert size(tags) == 1 + len(msgpack.packb(tags, use_bin_type=False))


def packed(position: int, value: bytes, of: Record | None = None) -> str:
    """The meshd tag of a record with some bytes of it changed."""
    raw = bytearray(base64.urlsafe_b64decode(encode(of or record(1))["meshd"][2:] + "=="))
    raw[position : position + len(value)] = value
    return "2." + base64.urlsafe_b64encode(raw).decode().rstrip("=")


BAD: dict[str, dict[str, str | None]] = {
    "no record": {"meshd": None, "wg": None, "subnet": None},
    "no wg tag": {"wg": None},
    "version '1;seq=1;ep=10'": {"meshd": "1;seq=1;ep=10.10.10.101:51820"},
    "version '3'": {"meshd": "3." + encode(record(1))["meshd"][2:]},
    "ends early": {"meshd": "2."},
    "ends early ": {"meshd": encode(record(1))["meshd"][:-4]},
    "longer than it should be": {"meshd": encode(record(1))["meshd"] + "AAAA"},
    "not base64url": {"meshd": encode(record(1))["meshd"] + "!"},
    "not base64url ": {"meshd": encode(record(1))["meshd"] + "="},
    "flags that this version of meshd does not know": {"meshd": packed(0, b"\x08")},
    "sequence number is 0": {"meshd": packed(1, bytes(6))},
    "no port": {"meshd": packed(11, bytes(2))},
    "too many subnets": {"meshd": packed(13 + 96 + 12, b"\x05")},
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
    with pytest.raises(RecordError, match=reason.strip().replace("(", r"\(")):
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


@given(st.binary(max_size=400), st.integers(0, 399))
def test_hostile_bytes_raise_record_error(noise: bytes, at: int) -> None:
    """Hostile bytes are a valid record with one spelling or raise RecordError."""
    good = to_wire(record(1))
    for raw in (noise, good[:at] + noise + good[at + len(noise) :], good[: len(good) - at] + noise):
        try:
            result = from_wire(raw, OVERLAY, 24)
        except RecordError:
            continue
        assert to_wire(result) == raw, "one record has one spelling"


def test_subnet_of_another_overlay_is_refused() -> None:
    """A subnet outside of the overlay is refused."""
    with pytest.raises(RecordError, match="outside of the overlay"):
        decode(encode(record(1)), IPv4Network("10.80.0.0/16"), 24)
