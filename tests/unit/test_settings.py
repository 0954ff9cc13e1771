"""Settings are right or refused with the value named; the file holds them without loss."""

import re
from ipaddress import IPv4Network, ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import InputError
from meshd.state.settings import Settings, from_json, to_json

BASE: dict[str, Any] = {"name": "barge1", "bind": ip_address("10.10.10.101")}


def test_settings_json_round_trip() -> None:
    """Settings survive the way to JSON and back."""
    settings = Settings(
        **BASE, subnet=IPv4Network("172.20.7.0/24"), mtu=1380, advertise=ip_address("2001:db8::1"), docker=False
    )
    assert from_json(to_json(settings)) == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a b"}, "--name must be 1 to 63 letters, digits, dots and dashes, not 'a b'"),
        ({"name": ""}, "--name must be .*, not ''"),
        ({"name": "a" * 64}, "--name must be 1 to 63"),
        ({"name": "x\n"}, "--name must be"),
        ({"mesh": "../etc"}, "--mesh must be .*, not '../etc'"),
        ({"wireguard": "a-very-long-interface"}, "--interface must be 1 to 15"),
        ({"wireguard": 'wg0" drop'}, "--interface must be"),
        ({"bridge": "/"}, "--bridge must be"),
        ({"wireguard": "ovl0"}, "both named ovl0"),
        ({"wireguard_backend": "magic"}, "--wireguard-backend must be auto, kernel or userspace, not 'magic'"),
        ({"wireguard_port": 0}, "--wireguard-port must be 1 to 65535, not 0"),
        ({"gossip_port": 65536}, "--gossip-port must be 1 to 65535, not 65536"),
        ({"rpc_port": 7946}, "gossip and RPC"),
        ({"wireguard_port": 7946}, "gossip and WireGuard"),
        ({"mtu": 100}, "--mtu must be 576 to 65440, not 100"),
        ({"keepalive": -1}, "--keepalive must be 0 to 65535 seconds, not -1"),
        ({"subnet_length": 16}, "cannot be cut"),
        ({"subnet": IPv4Network("10.0.0.0/24")}, "subnet 10.0.0.0/24"),
        ({"subnet": IPv4Network("172.20.0.0/24")}, "first or last"),
    ],
)
def test_settings_error_names_bad_value(change: dict[str, Any], message: str) -> None:
    """The error for a bad setting names the setting and its value."""
    with pytest.raises(InputError, match=message):
        Settings(**{**BASE, **change})


@pytest.mark.parametrize(
    ("option", "address", "reason"),
    [
        ("bind", "172.20.1.1", "inside the overlay 172.20.0.0/16"),
        ("bind", "255.255.255.255", "no address of a host"),
        ("advertise", "127.0.0.1", "no address of a host"),
        ("advertise", "::ffff:cb00:7105", "an IPv4 address in IPv6 spelling"),
        ("advertise", "fe80::1", "local to one link"),
        ("advertise", "2001:db8::1%eth0", "an address with a zone"),
    ],
)
def test_typed_address_of_no_host_is_refused_and_read_from_file(option: str, address: str, reason: str) -> None:
    """A typed address where no host can be is refused; a file of an older version may hold one."""
    settings = Settings(**{**BASE, option: ip_address(address)})
    with pytest.raises(InputError, match=f"--{option} {re.escape(address)} is {reason}"):
        settings.check_addresses()
    assert from_json(to_json(settings)) == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "settings version 3: this version of meshd supports 1 and 2"),
        ({"bind_chosen": False}, "unknown setting 'bind_chosen'"),
        ({"surprise": 1}, "unknown setting 'surprise'"),
        ({"name": None}, "name must be a text, not None"),
        ({"overlay": "172.20.0.0/99"}, "overlay must be the IPv4 prefix of a mesh, not '172.20.0.0/99'"),
        ({"docker": 1}, "docker must be true or false, not 1"),
        ({"gossip_port": True}, "gossip_port must be a whole number, not True"),
        ({"mtu": "1420"}, "mtu must be a whole number, not '1420'"),
        ({"overlay": 5}, "overlay must be the IPv4 prefix of a mesh, not 5"),
    ],
)
def test_settings_refuse_damaged_json(change: dict[str, Any], message: str) -> None:
    """A damaged settings file is refused, and the error names the wrong field."""
    with pytest.raises(InputError, match=message):
        from_json({**to_json(Settings(**BASE)), **change})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x, max_size=2), max_leaves=3
)


@given(st.dictionaries(st.sampled_from(sorted(to_json(Settings(**BASE)))), JSON))
def test_settings_from_any_json(change: dict[str, Any]) -> None:
    """Any JSON is read as settings or raises InputError, nothing else."""
    try:
        from_json({**to_json(Settings(**BASE)), **change})
    except InputError:
        return
