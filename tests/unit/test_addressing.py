"""Subnets are chosen alike by everybody, and never at the overlay's edges."""

from ipaddress import IPv4Network, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import ConflictError, InputError
from meshd.mesh.addressing import capacity, check_overlay, choose, is_usable
from tests.conftest import OVERLAY

UNDERLAY = ip_address("10.10.10.101")


def test_the_last_octet_of_the_underlay_is_preferred() -> None:
    assert choose(OVERLAY, 24, (), UNDERLAY, "barge1") == IPv4Network("172.20.101.0/24")


def test_the_last_octet_counts_in_other_overlays_too() -> None:
    assert choose(IPv4Network("10.0.0.0/8"), 20, (), UNDERLAY, "x") == IPv4Network("10.6.80.0/20")


def test_a_persisted_subnet_comes_first() -> None:
    kept = IPv4Network("172.20.7.0/24")
    assert choose(OVERLAY, 24, (), UNDERLAY, "barge1", persisted=kept) == kept


def test_a_taken_octet_falls_back_to_the_identity_and_differs_between_hosts() -> None:
    taken = {IPv4Network("172.20.101.0/24")}
    first, second = (choose(OVERLAY, 24, taken, UNDERLAY, name) for name in ("barge1", "barge2"))
    assert first != second
    assert not {first, second} & taken


def test_probing_goes_upwards_and_around() -> None:
    overlay = IPv4Network("10.0.0.0/24")
    taken: set[IPv4Network] = set()
    for _ in range(capacity(overlay, 28)):
        subnet = choose(overlay, 28, taken, ip_address("10.9.9.250"), "x")
        assert subnet not in taken
        taken.add(subnet)
    assert len(taken) == 14
    assert all(is_usable(subnet, overlay) for subnet in taken)
    with pytest.raises(ConflictError, match=r"10\.0\.0\.0/24 is exhausted: all 14"):
        choose(overlay, 28, taken, UNDERLAY, "x")


@pytest.mark.parametrize("octet", [0, 255])
def test_edges_are_never_chosen(octet: int) -> None:
    subnet = choose(OVERLAY, 24, (), ip_address(f"10.0.0.{octet}"), "x")
    assert is_usable(subnet, OVERLAY)


@given(st.ip_addresses(), st.text(), st.integers(18, 30))
def test_every_choice_is_usable(underlay: object, identity: str, length: int) -> None:
    subnet = choose(OVERLAY, length, (), underlay, identity)  # type: ignore[arg-type]
    assert subnet.subnet_of(OVERLAY)
    assert subnet.prefixlen == length
    assert is_usable(subnet, OVERLAY)


@pytest.mark.parametrize(
    ("overlay", "length"), [("172.20.0.0/16", 17), ("172.20.0.0/16", 31), ("127.0.0.0/8", 24), ("224.0.0.0/8", 24)]
)
def test_an_overlay_that_cannot_work_is_refused(overlay: str, length: int) -> None:
    with pytest.raises(InputError, match="overlay"):
        check_overlay(IPv4Network(overlay), length)
