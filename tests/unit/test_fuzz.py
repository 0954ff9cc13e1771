"""Whatever arrives from others: no crash, no hang, no change of state. The parsers have more of it beside their tests.

`make fuzz` runs all property tests for long.
"""

import json
import socket
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from meshd.daemon import hints
from meshd.daemon.agent import Agent
from meshd.daemon.exchange import Exchange
from meshd.errors import InputError
from meshd.gossip import messages, responder
from meshd.gossip.messages import APPLIED, BURY, CONFIRM, EVENT, GONE, QUERY, RECORD, TWINS, WHERE, TellRecord
from meshd.mesh.model import FORMER
from meshd.mesh.records import to_wire
from meshd.mesh.tombstones import Tombstones, grave, of_leaving
from meshd.state import authority
from meshd.state.directory import Claim, State
from tests.conftest import AUTHORITY, forgotten, record

same_state = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.sampled_from([APPLIED, GONE, BURY, RECORD, CONFIRM, WHERE, TWINS, "other"])
# Noise, and what is nearly right.
STAYING = [record(2), record(2, version=FORMER), record(2, extensions=b"\x05\x01x")]
WIRES = [to_wire(staying) for staying in STAYING]
# The authority's word with what spoils it: another one is not to be had.
DEAD = replace(forgotten(record(2), 2), forgotten=bytes(64))
PAGE = next(Tombstones(grave("barge2", DEAD)).pages(500))
payloads = st.one_of(
    st.binary(max_size=600),
    st.builds(lambda at, raw: raw[:at] + b"\xff" + raw[at + 1 :], st.integers(0, 250), st.sampled_from(WIRES)).map(
        lambda wire: TellRecord("barge2", wire).payload()
    ),
    st.sampled_from([next(Tombstones(grave("barge2", of_leaving(staying))).pages(500)) for staying in STAYING]),
    st.builds(lambda at, with_what: PAGE[:at] + with_what + PAGE[at + 1 :], st.integers(0, 400), st.binary(max_size=2)),
    st.sampled_from([b"barge1 5=00", b"barge1 133=00", b"barge1 0000000000000000  5=", b"\x93\x03\xa6barge1\xc4\x00"]),
    st.sampled_from([b"barge1", b"barge1 5", b"barge2 0000000000000000 ", b"barge1 0000000000000000 x"]),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


def contents(state: State) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in state.directory.iterdir() if path.is_file()}


@pytest.fixture
def member(state: State) -> State:
    """A host that is a member and holds the authority, so that it has everything to lose."""
    state.save_authority_key(AUTHORITY)
    state.save_claim(Claim(record(1), settled=True))
    state.save_roster(state.roster())
    with state.lock():
        return state


@same_state
@given(names, payloads, st.booleans())
def test_fuzz_daemon_messages_change_no_state(member: State, name: str, payload: bytes, query: bool) -> None:
    """Noise in queries and events changes no state of the daemon, and the answers are short."""
    before, answered = contents(member), list[bytes]()
    exchange = Exchange(member, lambda _: None, threading.Event())
    exchange.receive(QUERY if query else EVENT, name, payload, answered.append if query else None)
    assert contents(member) == before
    assert exchange.heard == {}
    assert all(len(answer) <= 1024 for answer in answered)


@same_state
@given(names, payloads, st.sampled_from([QUERY, EVENT]))
def test_fuzz_handler_messages_change_no_state(member: State, name: str, payload: bytes, kind: str) -> None:
    """Noise in queries changes no state of the handler that runs alone, and the answers are short."""
    before = contents(member)
    message = messages.read(kind, name, payload, member.mesh)
    reply = responder.respond(member, message) if message is not None else responder.NOTHING
    assert len(reply.answer or b"") <= 1024
    assert contents(member) == before


FILES: dict[str, Callable[[State], object]] = {
    "hosts.json": lambda s: s.roster(),
    "claim.json": lambda s: s.claim(),
    "contacts.json": lambda s: s.contacts(),
    "originals.json": lambda s: s.originals(),
    "certificate.json": lambda s: s.certificate,
    "issued.json": lambda s: s.issued(),
    "settings.json": lambda s: s.settings,
}
SHAPES = {
    "hosts.json": st.fixed_dictionaries({"hosts": values, "gone": values, "revoked": values, "owners": values}),
    "claim.json": st.fixed_dictionaries({"record": values, "settled": values}),
    "certificate.json": st.fixed_dictionaries({"certificate": values, "delegated": values, "version": values}),
}


@pytest.mark.parametrize("name", FILES)
@same_state
@given(st.data())
def test_fuzz_state_files(state: State, name: str, data: st.DataObject) -> None:
    """A state file of any content is read or raises InputError."""
    before = (state.directory / "settings.json").read_bytes()
    content = data.draw(SHAPES.get(name, values) | values)
    (state.directory / name).write_text(json.dumps(content))
    try:
        FILES[name](State(state.directory))
    except InputError:
        pass
    finally:
        (state.directory / "settings.json").write_bytes(before)


@same_state
@given(st.text(max_size=200) | values.map(json.dumps))
@example('{"format": "meshd-authority 1", "salt": "00", "sealed": "00"}')
def test_fuzz_authority_import(member: State, text: str) -> None:
    """Text that is no export of an authority raises InputError and changes no state."""
    before = contents(member)
    with pytest.raises(InputError):
        authority.restore(member, text, "a passphrase")
    assert contents(member) == before


def test_control_socket_noise_is_printable_hint(state: State) -> None:
    """Whatever the control socket receives becomes a short hint of printable text."""
    agent = Agent(state)
    listener = threading.Thread(target=agent._listen)
    listener.start()
    try:
        while not hints.wake(state.socket, "ready"):
            pass
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.connect(str(state.socket))
            for noise in (b"", b"\x00\x1b[2J\xff", b"x" * 60_000, "\n\r\u202e".encode()):
                client.send(noise)
            client.send(b"last")
        heard: list[hints.Hint] = []
        while not heard or heard[-1].text != "last":
            heard.append(agent.hints.get(timeout=5))
    finally:
        agent.stopping.set()
        # One more datagram: the listener looks at once whether it is to stop.
        while listener.is_alive():
            hints.wake(state.socket, "end")
            listener.join(0.01)
    assert all(hint.text.isprintable() and len(hint.text) <= 512 for hint in heard)
    assert not state.socket.exists()
