"""wireguard-go's text: goldens of what it says, and anything else is an ApplyError."""

import socket
import threading
import time
from ipaddress import IPv4Network, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.endpoint import Endpoint
from meshd.errors import ApplyError
from meshd.keys import public_key
from meshd.net.resources import Action, Change, Peer
from meshd.net.wireguard import uapi, userspace
from meshd.net.wireguard.contract import PeerUpdate, decode_key, encode_key, peer_update

ONE, TWO = bytes(range(32)), bytes(range(32, 64))

# As wireguard-go 0.0.20220316 answers, with an IPv6 allowed IP and a key of the future added.
ANSWER = f"""\
private_key={"a5" * 32}
listen_port=51820
fwmark=4
public_key={TWO.hex()}
preshared_key={"00" * 32}
protocol_version=1
endpoint=[2001:db8::2]:51821
last_handshake_time_sec=1700000000
last_handshake_time_nsec=500000000
tx_bytes=1234
rx_bytes=5678
persistent_keepalive_interval=25
allowed_ip=172.20.9.0/24
allowed_ip=fd00::/64
allowed_ip=172.20.7.0/24
public_key={ONE.hex()}
preshared_key={"00" * 32}
protocol_version=1
last_handshake_time_sec=0
last_handshake_time_nsec=0
tx_bytes=0
rx_bytes=0
persistent_keepalive_interval=0
some_new_thing=yes
errno=0

"""


def test_parse_answer() -> None:
    """The answer of wireguard-go is read as a device with its peers."""
    state = uapi.parse(ANSWER)
    assert (state.private_key, state.port) == ("a5" * 32, 51820)
    one, two = state.peers
    assert one == Peer(encode_key(ONE), None, ())
    blocks = (IPv4Network("172.20.7.0/24"), IPv4Network("172.20.9.0/24"))
    assert two == Peer(encode_key(TWO), Endpoint.parse("[2001:db8::2]:51821"), blocks, 25)
    assert (two.handshake, two.received, two.sent) == (1700000000.5, 5678, 1234)


def test_parse_answer_of_fresh_device() -> None:
    """A fresh device has no key and no peers."""
    assert uapi.parse("errno=0\n\n") == uapi.State("", 0, ())


def test_repr_hides_private_key() -> None:
    """The repr of a device contains no private key."""
    assert "a5a5" not in repr(uapi.parse(ANSWER))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ends early"),
        ("errno=0\n", "ends early"),
        ("listen_port=1\n\n", "without an errno"),
        ("errno=\n\n", "without an errno"),
        ("errno=-22\n\n", "refused: Invalid argument"),
        ("errno=98\n\n", "refused: Address already in use"),
        ("errno=99999999\n\n", "refused: error 99999999"),
        ("errno=0\nerrno=0\n\n", "line 'errno=0'"),
        ("listen_port=65536\nerrno=0\n\n", "listen_port '65536'"),
        ("listen_port=-1\nerrno=0\n\n", "listen_port '-1'"),
        ("listen_port=\u0663\nerrno=0\n\n", "line"),
        ("listen_port\nerrno=0\n\n", "line 'listen_port'"),
        ("\nerrno=0\n\n", "line ''"),
        (f"x={'y' * 4096}\nerrno=0\n\n", "line 'x=yyy"),
        ("public_key=abc\nerrno=0\n\n", "public_key is not 64 hexadecimal digits"),
        (f"public_key={'AB' * 32}\nerrno=0\n\n", "public_key is not 64"),
        (f"public_key={'ab' * 32}\npublic_key={'ab' * 32}\nerrno=0\n\n", "twice"),
        (f"public_key={'ab' * 32}\nendpoint=nowhere:1\nerrno=0\n\n", "endpoint 'nowhere:1'"),
        (f"public_key={'ab' * 32}\nallowed_ip=10.0.0.1/24\nerrno=0\n\n", "allowed_ip"),
        (f"public_key={'ab' * 32}\nrx_bytes=1e9\nerrno=0\n\n", "rx_bytes"),
    ],
)
def test_parse_error_names_bad_line(text: str, message: str) -> None:
    """The error for a bad answer names what is wrong."""
    with pytest.raises(ApplyError, match=message):
        uapi.parse(text)


@pytest.mark.parametrize("value", ["a5" * 31, "a5" * 31 + "zz", "a5" * 3000, "\ta5"])
def test_parse_error_hides_private_key(value: str) -> None:
    """The error for a spoiled private key does not contain it."""
    with pytest.raises(ApplyError) as caught:
        uapi.parse(f"private_key={value}\nerrno=0\n\n")
    assert "a5" not in str(caught.value)


LINES = st.sampled_from([*ANSWER.splitlines(), "", "errno=0", "errno=1", "=", "endpoint=", "listen_port=9" + "9" * 40])
MUTATED = st.builds(
    lambda text, at, cut, new: text[:at] + new + text[at + cut :],
    st.just(ANSWER),
    st.integers(0, len(ANSWER)),
    st.integers(0, 80),
    st.text(max_size=8),
)


@given(st.one_of(st.text(), st.lists(LINES).map("\n".join).map(lambda t: t + "\nerrno=0\n\n"), MUTATED))
def test_hostile_answer_raises_apply_error(text: str) -> None:
    """Hostile text is a valid state or raises ApplyError."""
    try:
        state = uapi.parse(text)
    except ApplyError:
        return
    assert 0 <= state.port < 65536
    assert list(state.peers) == sorted(state.peers, key=lambda p: p.key)


# --- requests ------------------------------------------------------------------------------------------------------


def test_format_device() -> None:
    """A device request has the key, if any, and the port."""
    assert uapi.format_device(ONE, 51820) == f"set=1\nprivate_key={ONE.hex()}\nlisten_port=51820\n\n"
    assert uapi.format_device(None, 7) == "set=1\nlisten_port=7\n\n"


def test_format_peer() -> None:
    """A peer request has all that WireGuard needs to know of the peer."""
    update = PeerUpdate(Endpoint.parse("192.0.2.1:51820"), (IPv4Network("172.20.7.0/24"),), 25, update_only=False)
    assert uapi.format_peer(encode_key(ONE), update) == (
        f"set=1\npublic_key={ONE.hex()}\nendpoint=192.0.2.1:51820\npersistent_keepalive_interval=25\n"
        "replace_allowed_ips=true\nallowed_ip=172.20.7.0/24\n\n"
    )


def test_format_removal() -> None:
    """A removal request names the peer."""
    assert uapi.format_removal(encode_key(ONE)) == f"set=1\npublic_key={ONE.hex()}\nremove=true\n\n"


def test_peer_update_contains_only_differences() -> None:
    """An update of a peer contains only the fields that differ."""
    old = Peer(encode_key(ONE), Endpoint.parse("192.0.2.1:1"), (IPv4Network("172.20.7.0/24"),), 5)
    new = Peer(old.public_key, Endpoint.parse("192.0.2.2:2"), old.allowed_ips, 5)
    assert peer_update(Change(Action.SET, new, old), new) == PeerUpdate(new.endpoint, None, None, update_only=True)
    assert peer_update(Change(Action.SET, new), new) == PeerUpdate(new.endpoint, new.allowed_ips, 5, update_only=False)
    assert peer_update(Change(Action.ADD, new, old), new).allowed_ips == new.allowed_ips


def test_format_peer_refuses_line_break_in_endpoint() -> None:
    """The ipaddress module lets an IPv6 zone hold a line break, and endpoints come from other hosts."""
    endpoint = Endpoint(IPv6Address("fe80::1%x\nprivate_key=" + "00" * 32), 1)
    with pytest.raises(ApplyError, match="endpoint holds characters"):
        uapi.format_peer(encode_key(ONE), PeerUpdate(endpoint, None, None, update_only=False))


@given(st.one_of(st.text(max_size=60), st.binary(max_size=40).map(encode_key)))
def test_decode_key_accepts_only_32_bytes(text: str) -> None:
    """Only the base64 text of 32 bytes is a key."""
    try:
        raw = decode_key(text)
    except ApplyError:
        return
    assert len(raw) == 32


@given(st.binary(min_size=32, max_size=32))
def test_key_round_trip(raw: bytes) -> None:
    """A key survives the way to text and back."""
    assert decode_key(encode_key(raw)) == raw


def test_public_key_matches_rfc_7748() -> None:
    """The public key of Alice's private key is the one of RFC 7748."""
    alice = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
    public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert decode_key(public_key(bytes.fromhex(alice))).hex() == public


# --- the socket ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "ends early"),
        (b"errno=0\n", "ends early"),
        (b"x=y\n" * 1000, "longer than 100 bytes"),
        (b"\xff\n\n", "not ASCII"),
        (None, "timed out"),
    ],
)
def test_exchange_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, message: str
) -> None:
    """An exchange with wireguard-go is bounded in time and in size."""
    monkeypatch.setattr(userspace, "TIMEOUT", 0.2)
    monkeypatch.setattr(userspace, "MAX_ANSWER", 100)
    path, done = tmp_path / "wg0.sock", threading.Event()

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(100)
            if answer is None:
                done.wait(5)
            else:
                connection.sendall(answer)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        started = time.monotonic()
        with pytest.raises(ApplyError, match=message):
            userspace.exchange(path, "get=1\n\n")
        assert time.monotonic() - started < 2
        done.set()
        thread.join()


def test_exchange_without_daemon_raises_apply_error(tmp_path: Path) -> None:
    """A missing socket raises ApplyError with its path."""
    with pytest.raises(ApplyError, match=r"asking wireguard-go at .*wg0\.sock: No such file"):
        userspace.exchange(tmp_path / "wg0.sock", "get=1\n\n")
