"""Underlay addresses: what is one, and what only looks like one."""

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.endpoint import Endpoint, IPAddress, LocalAddresses, destination, unusable
from tests.conftest import OVERLAY


@pytest.mark.parametrize(
    "text",
    [
        "10.10.10.101",
        "203.0.113.5",
        "192.168.1.1",
        "169.254.7.7",
        "2001:db8::1",
        "fd00::1",
        "64:ff9b::203.0.113.5",
        "2002:cb00:7105::1",
        "::ffff:0:203.0.113.5",
    ],
)
def test_a_host_can_be_there(text: str) -> None:
    assert unusable(ip_address(text), OVERLAY) == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0.0.0.0", "no address of a host"),
        ("0.1.2.3", "no address of a host"),
        ("127.0.0.1", "no address of a host"),
        ("127.9.9.9", "no address of a host"),
        ("224.0.0.1", "no address of a host"),
        ("255.255.255.255", "no address of a host"),
        ("172.20.7.1", "inside the overlay 172.20.0.0/16"),
        ("::", "no address of a host"),
        ("::1", "no address of a host"),
        ("ff02::1", "no address of a host"),
        ("fe80::1", "local to one link"),
        ("fec0::1", "local to one link"),
        ("::ffff:127.0.0.1", "an IPv4 address in IPv6 spelling"),
        ("::ffff:172.20.101.0", "an IPv4 address in IPv6 spelling"),
        ("::ffff:203.0.113.5", "an IPv4 address in IPv6 spelling"),
        ("::203.0.113.5", "an IPv4 address in IPv6 spelling"),
        ("2001:db8::1%eth0", "an address with a zone, which means something on one host only"),
        ("fe80::1%eth0", "local to one link"),
        ("::ffff:0:172.20.101.0", "inside the overlay 172.20.0.0/16 in IPv6 spelling"),
        ("::ffff:0:127.0.0.1", "no address of a host in IPv6 spelling"),
        ("64:ff9b::127.0.0.1", "no address of a host in IPv6 spelling"),
        ("64:ff9b::172.20.101.0", "inside the overlay 172.20.0.0/16 in IPv6 spelling"),
        ("2002:7f00:0001::", "no address of a host in IPv6 spelling"),
        ("2002:ac14:6500::1", "inside the overlay 172.20.0.0/16 in IPv6 spelling"),
    ],
)
def test_no_host_can_be_there(text: str, reason: str) -> None:
    assert unusable(ip_address(text), OVERLAY) == reason


@given(st.ip_addresses(v=4, network="172.20.0.0/16"))
def test_the_overlay_is_refused_in_every_spelling(address: IPv4Address) -> None:
    number = int(address)
    spellings: list[IPAddress] = [
        address,
        IPv6Address(number),
        IPv6Address(0xFFFF << 32 | number),
        IPv6Address((0x64FF9B << 96) | number),
        IPv6Address((0xFFFF0000 << 32) | number),
        IPv6Address((0x2002 << 112) | (number << 80) | 1),
    ]
    assert all(unusable(spelling, OVERLAY) for spelling in spellings)


def test_endpoint_behind_translator_is_that_of_its_ipv4_address() -> None:
    """Two spellings of one endpoint have one destination; a 6to4 site has many hosts behind one IPv4 address."""
    there = Endpoint(ip_address("203.0.113.5"), 51820)
    for address in ("203.0.113.5", "64:ff9b::203.0.113.5", "::ffff:0:203.0.113.5"):
        assert destination(Endpoint(ip_address(address), 51820)) == there
    for address in ("2001:db8::1", "2002:cb00:7105::1"):
        assert destination(Endpoint(ip_address(address), 51820)) == Endpoint(ip_address(address), 51820)


def test_own_address_is_occupied_by_own_port() -> None:
    """Another host is not at this host's own WireGuard, and at no broadcast address; other ports may be forwarded."""
    local = LocalAddresses(frozenset({ip_address("10.10.10.101")}), frozenset({ip_address("10.10.10.255")}))
    occupied = {
        ("10.10.10.101", 51820): "this host's own",
        ("10.10.10.101", 51821): "",
        ("10.10.10.102", 51820): "",
        ("10.10.10.255", 51821): "a broadcast address",
    }
    for (address, port), problem in occupied.items():
        assert local.occupied(Endpoint(ip_address(address), port), 51820) == problem


@given(st.text(max_size=40))
def test_any_text_is_an_endpoint_or_a_value_error(text: str) -> None:
    try:
        endpoint = Endpoint.parse(text, 7946)
    except ValueError:
        return
    assert Endpoint.parse(str(endpoint)) == endpoint
