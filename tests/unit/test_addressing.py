"""Subnets are chosen alike by everybody, and never at the overlay's edges."""

from ipaddress import IPv4Network, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import ConflictError, InputError
from meshd.mesh.addressing import capacity, check_overlay, choose, free_overlay, is_usable
from tests.conftest import OVERLAY

UNDERLAY = ip_address("10.10.10.101")


def test_choose_prefers_last_underlay_octet() -> None:
    """A host gets the subnet with the last octet of its underlay address if that one is free."""
    assert choose(OVERLAY, 24, (), UNDERLAY, "barge1") == IPv4Network("172.20.101.0/24")


def test_choose_uses_last_octet_in_any_overlay() -> None:
    """The last octet picks the subnet in overlays of other lengths as well."""
    assert choose(IPv4Network("10.0.0.0/8"), 20, (), UNDERLAY, "x") == IPv4Network("10.6.80.0/20")


def test_choose_keeps_persisted_subnet() -> None:
    """A subnet that the host had before is chosen first."""
    kept = IPv4Network("172.20.7.0/24")
    assert choose(OVERLAY, 24, (), UNDERLAY, "barge1", persisted=kept) == kept


def test_choose_falls_back_to_name_if_octet_taken() -> None:
    """If the preferred subnet is taken, the name decides, so two hosts choose differently."""
    taken = {IPv4Network("172.20.101.0/24")}
    first, second = (choose(OVERLAY, 24, taken, UNDERLAY, name) for name in ("barge1", "barge2"))
    assert first != second
    assert not {first, second} & taken


def test_choose_probes_upwards_and_wraps() -> None:
    """The search goes upwards, wraps at the end, and finds each free subnet before it reports exhaustion."""
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
def test_choose_avoids_overlay_edges(octet: int) -> None:
    """The first and the last subnet of the overlay are never chosen."""
    subnet = choose(OVERLAY, 24, (), ip_address(f"10.0.0.{octet}"), "x")
    assert is_usable(subnet, OVERLAY)


@given(st.ip_addresses(), st.text(), st.integers(18, 30))
def test_choose_returns_usable_subnet(underlay: object, identity: str, length: int) -> None:
    """Every choice lies in the overlay, has the requested length and is usable."""
    subnet = choose(OVERLAY, length, (), underlay, identity)  # type: ignore[arg-type]
    assert subnet.subnet_of(OVERLAY)
    assert subnet.prefixlen == length
    assert is_usable(subnet, OVERLAY)


@pytest.mark.parametrize(
    ("overlay", "length"), [("172.20.0.0/16", 17), ("172.20.0.0/16", 31), ("127.0.0.0/8", 24), ("224.0.0.0/8", 24)]
)
def test_check_overlay_refuses_unusable_overlay(overlay: str, length: int) -> None:
    """An overlay is refused if it is reserved or cannot be cut into subnets of the given length."""
    with pytest.raises(InputError, match="overlay"):
        check_overlay(IPv4Network(overlay), length)


@pytest.mark.parametrize(
    ("taken", "found"),
    [
        ([], "10.80.0.0/16"),
        (["10.80.7.0/24"], "10.81.0.0/16"),
        (["10.80.0.0/12", "10.96.0.0/11", "10.128.0.0/9"], "10.0.0.0/16"),
        (["10.0.0.0/8"], "172.16.0.0/16"),
        (["10.0.0.0/8", "172.16.0.0/12"], "192.168.0.0/16"),
        (["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/17"], "192.168.128.0/17"),
        (["0.0.0.0/0"], None),
        (["10.0.0.0/8", "172.16.0.0/12", *(f"192.168.{n}.0/24" for n in range(0, 256, 4))], None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_free_overlay(taken: list[str], found: str | None) -> None:
    """The first private /16 in a fixed order that overlaps nothing, or the largest range that has room for hosts."""
    expected = IPv4Network(found) if found else None
    assert free_overlay([IPv4Network(each) for each in taken], 24) == expected


@given(
    st.lists(st.builds(lambda a, n: IPv4Network((a, n), strict=False), st.integers(0, 2**32 - 1), st.integers(4, 28)))
)
def test_free_overlay_is_free_and_usable(taken: list[IPv4Network]) -> None:
    """It overlaps nothing that is taken, and an overlay can be made of it."""
    found = free_overlay(taken, 24)
    if found is not None:
        check_overlay(found, 24)
        assert found.is_private
        assert not any(found.overlaps(each) for each in taken)
