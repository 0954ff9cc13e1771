"""Records survive the way through tags; nothing but a record comes out of tags."""

from dataclasses import replace
from ipaddress import IPv4Network, ip_address

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshd.model import Endpoint, Record
from meshd.tags import LIMIT, RecordError, decode, encode, size
from tests.conftest import OVERLAY, public_key, record


@pytest.mark.parametrize(
    "original",
    [
        record(1),
        record(2, seq=2**48 - 1, leaving=True),
        replace(record(3), endpoint=Endpoint(ip_address("2001:db8::1"), 65535)),
    ],
    ids=["plain", "leaving", "ipv6"],
)
def test_round_trip(original: Record) -> None:
    assert decode(encode(original), OVERLAY, 24) == original


def test_tags_are_readable_and_leave_room_for_a_signature() -> None:
    tags = encode(replace(record(1, seq=2**48 - 1), endpoint=Endpoint(ip_address("2001:db8:1:2:3:4:5:6"), 51820)))
    assert tags["wg"] == public_key("barge1")
    assert tags["subnet"] == "172.20.101.0/24"
    # A certificate (mesh, serial, identity, not-after, signature) and the record's own signature: 270 in base64.
    assert size(tags) + 270 < LIMIT


def test_size_is_what_serf_encodes() -> None:
    # Serf's codec knows no str8: strings of 32 bytes and more take a three-byte header, as msgpack's old format has it.
    tags = encode(record(1))
    assert size(tags) == 1 + len(msgpack.packb(tags, use_bin_type=False))


BAD = {
    "no record": {"meshd": None, "wg": None, "subnet": None},
    "no wg tag": {"wg": None},
    "version '2'": {"meshd": "2;seq=1;ep=10.10.10.101:51820"},
    "lacks seq": {"meshd": "1;ep=10.10.10.101:51820"},
    "unexpected field 'x=1'": {"meshd": "1;seq=1;ep=10.10.10.101:51820;x=1"},
    "unexpected field 'seq=2'": {"meshd": "1;seq=1;seq=2;ep=10.10.10.101:51820"},
    "unexpected field 'leaving=1'": {"meshd": "1;seq=1;ep=10.10.10.101:51820;leaving=1"},
    "sequence number '0'": {"meshd": "1;seq=0;ep=10.10.10.101:51820"},
    "sequence number '-1'": {"meshd": "1;seq=-1;ep=10.10.10.101:51820"},
    "sequence number '٣'": {"meshd": "1;seq=٣;ep=10.10.10.101:51820"},
    "not ADDRESS:PORT": {"meshd": "1;seq=1;ep=barge1:51820"},
    "not ADDRESS:PORT ": {"meshd": "1;seq=1;ep=10.10.10.101:0"},
    "inside of the overlay": {"meshd": "1;seq=1;ep=172.20.1.1:51820"},
    "no address of a host": {"meshd": "1;seq=1;ep=127.0.0.1:51820"},
    "no address of a host ": {"meshd": "1;seq=1;ep=[ff02::1]:51820"},
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
def test_bad_tags_are_refused_with_the_reason(reason: str, change: dict[str, str | None]) -> None:
    tags = {k: v for k, v in (encode(record(1)) | change).items() if v is not None}
    with pytest.raises(RecordError, match=reason.strip().replace("(", r"\(")):
        decode(tags, OVERLAY, 24)


@given(
    st.dictionaries(st.sampled_from(["wg", "subnet", "meshd", "x"]), st.text(max_size=200)),
    st.sampled_from(["wg", "subnet", "meshd", "none"]),
)
@example({"subnet": "1/1"}, "none")
def test_hostile_tags_give_a_record_or_a_record_error(tags: dict[str, str], spoil: str) -> None:
    good = encode(record(1))
    mixed = good | {k: v for k, v in tags.items() if k == spoil} if spoil != "none" else tags
    try:
        result = decode(mixed, OVERLAY, 24)
    except RecordError:
        return
    assert result.subnet.subnet_of(OVERLAY)
    assert result.subnet.prefixlen == 24
    assert result.endpoint.address not in OVERLAY


def test_a_subnet_of_another_overlay_is_refused() -> None:
    with pytest.raises(RecordError, match="outside of the overlay"):
        decode(encode(record(1)), IPv4Network("10.80.0.0/16"), 24)
