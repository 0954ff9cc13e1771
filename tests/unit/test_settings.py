"""Settings are right or refused with the value named; the file holds them without loss."""

from ipaddress import IPv4Network, ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import InputError
from meshd.state.settings import Settings, from_json, to_json

BASE: dict[str, Any] = {"name": "barge1", "bind": ip_address("10.10.10.101")}


def test_round_trip_through_json() -> None:
    settings = Settings(
        **BASE, subnet=IPv4Network("172.20.7.0/24"), mtu=1380, advertise=ip_address("2001:db8::1"), docker=False
    )
    assert from_json(to_json(settings)) == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a b"}, "host name 'a b'"),
        ({"name": ""}, "host name ''"),
        ({"name": "a" * 64}, "is not 1 to 63"),
        ({"name": "x\n"}, "host name"),
        ({"mesh": "../etc"}, "mesh name '../etc'"),
        ({"wireguard": "a-very-long-interface"}, "interface name"),
        ({"wireguard": 'wg0" drop'}, "interface name"),
        ({"wireguard": "ovl0"}, "both named ovl0"),
        ({"wireguard_backend": "magic"}, "'magic' is not auto"),
        ({"wireguard_port": 0}, "wireguard port 0"),
        ({"gossip_port": 65536}, "gossip port 65536"),
        ({"rpc_port": 7946}, "gossip and RPC"),
        ({"wireguard_port": 7946}, "gossip and WireGuard"),
        ({"mtu": 100}, "MTU 100"),
        ({"keepalive": -1}, "keepalive -1"),
        ({"subnet_length": 16}, "cannot be cut"),
        ({"subnet": IPv4Network("10.0.0.0/24")}, "subnet 10.0.0.0/24"),
        ({"subnet": IPv4Network("172.20.0.0/24")}, "first or last"),
        ({"bind": ip_address("172.20.1.1")}, "--bind 172.20.1.1 is inside the overlay 172.20.0.0/16"),
        ({"advertise": ip_address("0.0.0.0")}, "--advertise 0.0.0.0 is no address of a host"),
    ],
)
def test_bad_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**{**BASE, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "settings version 2"),
        ({"surprise": 1}, "unknown setting 'surprise'"),
        ({"name": None}, "name None"),
        ({"overlay": "172.20.0.0/99"}, "overlay '172.20.0.0/99'"),
        ({"docker": 1}, "docker 1"),
        ({"gossip_port": True}, "gossip_port True"),
        ({"mtu": "1420"}, "mtu '1420'"),
        ({"overlay": 5}, "overlay 5"),
    ],
)
def test_a_damaged_file_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_json({**to_json(Settings(**BASE)), **change})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x, max_size=2), max_leaves=3
)


@given(st.dictionaries(st.sampled_from(sorted(to_json(Settings(**BASE)))), JSON))
def test_any_json_gives_settings_or_an_input_error(change: dict[str, Any]) -> None:
    try:
        from_json({**to_json(Settings(**BASE)), **change})
    except InputError:
        return
