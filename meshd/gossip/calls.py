"""What this host asks and tells the other hosts over Serf. Each call raises SerfError without an agent."""

import math
import random
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from meshd.endpoint import Endpoint
from meshd.errors import SerfError
from meshd.gossip.messages import (
    BURY,
    CONFIRM,
    EVENT_LIMIT,
    GONE,
    HOLDS,
    NONCE,
    RECORD,
    TWINS,
    WHERE,
    Answer,
    AskConfirmation,
    AskRecord,
    AskTombstones,
    Holds,
    Sighting,
    TellRecord,
    TellTwins,
    Where,
)
from meshd.gossip.reach import answering
from meshd.gossip.responder import signed
from meshd.gossip.serf_agent import rpc
from meshd.mesh.certificates import CredentialError
from meshd.mesh.model import Certificate, Host, Record
from meshd.mesh.records import RecordError, encode, from_wire, to_wire
from meshd.mesh.terms import Mesh
from meshd.mesh.tombstones import Tombstones
from meshd.mesh.twins import Place, Twins
from meshd.state.directory import State

# Members asked at once. Their names travel in the query; one of them would do.
MOST_ASKED = 5
ASK = 1.0
# Seconds for all answers to one question for tombstones.
ASK_FOR = 30.0
# A host without a daemon answers when it has acted on what it is told, and Serf may have other handlers to run first.
TELL = 3.0
# Longer than Serf tries one address, and waits for one that it tries already.
JOIN = 30.0


@dataclass(frozen=True, slots=True)
class Found:
    """Where else this host runs.

    `is_live` says that another machine has said so by itself, now or a moment ago; `is_answer`, to this very question.
    """

    place: Place | None = None
    is_live: bool = False
    is_answer: bool = False


def rejoin(state: State, endpoints: Collection[Endpoint], seconds: float = math.inf, *, replay: bool = False) -> int:
    """Join hosts by their addresses, those first that answer first; return how many did in time. Raises SerfError.

    Serf itself remembers too little of whom it knew: after a restart or a long partition only this brings it back.
    """
    joined, until = 0, time.monotonic() + seconds
    for endpoint in answering(endpoints, until):
        left = min(until - time.monotonic(), JOIN)
        if left > 0:
            with rpc(state) as client, suppress(SerfError):
                client.wait_at_most(left)
                joined += client.join([str(endpoint)], replay=replay)
    return joined


def sync_with(state: State, names: Collection[str], seconds: float, *, replay: bool = False) -> int:
    """Exchange everything with hosts that gossip does not reach; return how many were met. Raises SerfError.

    Serf passes an event or a query on to a few members picked at random, dead ones among them, and may miss one. Two
    agents that join exchange over TCP all that they know. The latest events are sent to those that are met, and with
    `replay` received from them as well.
    """
    return rejoin(state, [e for name, e in state.contacts().items() if name in names], seconds, replay=replay)


def rebroadcast(state: State, seconds: float) -> None:
    """Re-broadcast the own tags: gossip picks members at random, so one round can miss some.

    This waits at most `seconds`; Serf continues by itself.
    """
    if (claim := state.claim()) is not None:
        with suppress(SerfError), rpc(state) as client:
            client.wait_at_most(seconds)
            client.tags(encode(claim.record), [])


def broadcast_tombstones(state: State, tombstones: Tombstones) -> None:
    """Broadcast tombstones to all members. Raises SerfError."""
    with rpc(state) as client:
        for page in tombstones.pages(EVENT_LIMIT):
            client.event(GONE, page)


def deliver_tombstones(state: State, tombstones: Tombstones, hosts: Collection[Host]) -> set[str]:
    """Send tombstones to these hosts; return the names of those that confirm having all of them. Raises SerfError."""
    having = {host.name for host in hosts}
    for page in tombstones.pages(EVENT_LIMIT):
        if having:
            asked = [host for host in hosts if host.name in having]
            having &= {name for name, refusal in ask_hosts(state, BURY, page, asked, TELL) if not refusal}
    return having


def ask_hosts(
    state: State, query: str, payload: bytes, hosts: Collection[Host], timeout: float
) -> Iterator[tuple[str, str]]:
    """Ask hosts, and yield the name of each that answers: with the empty string for yes, or with why not.

    What the host's own identity has not signed is no answer. End when all have answered, or time is over. Raises
    SerfError.
    """
    left = {host.name: host for host in hosts}
    with rpc(state) as client:
        for sender, raw in client.query(query, payload, timeout=timeout, nodes=_named(left)):
            host, answer = left.get(sender), Answer.read(raw)
            if host is None or answer is None:
                continue
            if state.mesh.trust.is_answer(host, query, payload, answer.refusal, answer.signature):
                del left[sender]
                yield sender, answer.refusal
            if not left:
                return


def ask_holds(state: State, host: Host, voters: Collection[Host]) -> dict[str, bool]:
    """Ask hosts whether this record is the one in force; return what those say who answer. Raises SerfError."""
    question = Holds.of(host, secrets.token_bytes(NONCE)).payload()
    return {name: not refusal for name, refusal in ask_hosts(state, HOLDS, question, voters, ASK)}


def pull_tombstones(state: State, names: Collection[str], known: Tombstones, begin: str = "") -> tuple[Tombstones, str]:
    """Ask members, MOST_ASKED of them at random, for the tombstones that are not among the known. Raises SerfError.

    Also return where to resume if ASK_FOR seconds were not enough to fetch everything.
    """

    def ask(names: Collection[str], begin: str) -> Iterator[tuple[str, bytes]]:
        return _ask(state, GONE, AskTombstones(state.settings.name, known.digest, begin).payload(), sorted(names))

    return gather(ask, _some(names), state.mesh, begin, ASK_FOR)


def gather(
    ask: Callable[[Collection[str], str], Iterable[tuple[str, bytes]]],
    names: Collection[str],
    mesh: Mesh,
    begin: str,
    seconds: float,
) -> tuple[Tombstones, str]:
    """Collect what members answer, page by page; also return where to resume if `seconds` were not enough."""
    found, until = Tombstones(), time.monotonic() + seconds
    after = dict.fromkeys(names, begin)
    while after:
        # A member with the same tombstones answers nothing; one with more than fits into an answer is asked again.
        begin = min(after.values())
        if time.monotonic() >= until:
            return found, begin
        answers = {name: Tombstones.read(page, mesh) for name, page in ask(after.keys(), begin)}
        after = {}
        for name, answer in answers.items():
            proved = answer.proved(mesh)
            found = found.merged(proved)
            # A member that makes them up would never run out of them.
            if proved == answer and answer.last > begin:
                after[name] = answer.last
    return found, ""


def announce(state: State, record: Record) -> None:
    """Publish the own record as an event: Serf carries the tags only where it knows this host. Raises SerfError."""
    with rpc(state) as client:
        client.event(RECORD, TellRecord(state.settings.name, to_wire(record)).payload())


def where(state: State, own: Host, here: Endpoint, asked: Callable[[bytes], object] = lambda _: None) -> Found:
    """Ask where this host runs besides `here`, itself and a few others. Raises SerfError.

    `asked` is told the question before it is asked: who answered it here would be heard in place of the other machine.
    """
    question = Where(own.name, own.record.certificate.identity, secrets.token_bytes(NONCE)).payload()
    asked(question)
    others = random.sample([*state.contacts()], min(len(state.contacts()), MOST_ASKED - 1))
    nodes, found = [own.name, *(name for name in others if name)], Found()
    with rpc(state) as client:
        for sender, raw in client.query(WHERE, question, timeout=ASK, nodes=nodes):
            answer, sighting = Answer.read(raw), Sighting.read(raw, own.name)
            if sender == own.name and answer is not None:
                place = Place.read(answer.refusal)
                is_signed = state.mesh.trust.is_answer(own, WHERE, question, answer.refusal, answer.signature)
                if is_signed and place is not None and place.endpoint != here:
                    return Found(place, is_live=True, is_answer=True)
            elif sighting is not None and not found.is_live:
                found = _sighted(state, own, here, sighting) or found
    return found


def _sighted(state: State, own: Host, here: Endpoint, sighting: Sighting) -> Found | None:
    """Return what another host's answer proves of a second machine of this host; None for nothing."""
    for word in sighting.words:
        twins = word.twins
        if twins.one.endpoint != here and twins.is_about(own.record, own=True) and is_word(state, own, word):
            return Found(twins.one, is_live=True)
    with suppress(RecordError, CredentialError):
        record = from_wire(sighting.wire, state.mesh.overlay, state.mesh.subnet_length)
        # Of this host itself, with a number that it has never given.
        is_news = record.certificate.identity == own.record.certificate.identity and record.seq > own.record.seq
        if is_news and not record.leaving and record.endpoint != here:
            state.mesh.check(own.name, record)
            return Found(Place.of(record))
    return None


def is_word(state: State, host: Host, word: TellTwins) -> bool:
    """Return whether a host's identity has signed this."""
    return state.mesh.trust.is_answer(host, TWINS, b"", word.twins.says, word.signature)


def tell_twins(state: State, twins: Twins) -> None:
    """Tell all members that this host runs on another machine as well. Raises SerfError."""
    answer = Answer.read(signed(state, TWINS, b"", twins.says))
    with rpc(state) as client:
        if answer is not None:
            client.event(TWINS, TellTwins(twins, answer.signature).payload())


def look_up_record(state: State, name: str, of: Collection[str]) -> Record | None:
    """Ask members, MOST_ASKED of them at random, for a host's record; return that which counts. Raises SerfError."""
    found: Record | None = None
    for record in look_up_records(state, name, of):
        if found is None or record.replaces(found):
            found = record
    return found


def look_up_records(state: State, name: str, of: Collection[str]) -> list[Record]:
    """Ask members, MOST_ASKED of them at random, for a host's record; return what each has. Raises SerfError."""
    found = []
    for _, raw in _ask(state, RECORD, AskRecord(name).payload(), _some(of)):
        with suppress(RecordError, CredentialError):
            record = from_wire(raw, state.mesh.overlay, state.mesh.subnet_length)
            state.mesh.check(name, record)
            found.append(record)
    return found


def request_confirmation(state: State) -> bool:
    """Replace a delegation's certificate, or one of version 2, by what the authority answers. Raises SerfError.

    The next reconcile publishes it.
    """
    certificate = _ask_confirmation(state)
    if certificate is None:
        return False
    with state.lock():
        # A command may have made this host another one while it asked.
        is_news = certificate.improves(state.certificate)
        if is_news:
            state.save_certificate(certificate)
    return is_news


def _ask_confirmation(state: State) -> Certificate | None:
    own, name = state.certificate, state.settings.name
    for _, raw in _ask(state, CONFIRM, AskConfirmation(name).payload(), ()):
        with suppress(RecordError, CredentialError):
            certificate = AskConfirmation.read_answer(raw)
            state.mesh.trust.check_certificate(name, certificate)
            if certificate.improves(own):
                return certificate
    return None


def _named(nodes: Collection[str]) -> list[str]:
    """Return the names to put into a query, none for a query to all: names travel in it, and only a few fit."""
    return sorted(nodes) if len(nodes) <= MOST_ASKED else []


def _some(names: Collection[str]) -> list[str]:
    return random.sample(sorted(names), min(len(names), MOST_ASKED))


def _ask(
    state: State, name: str, payload: bytes, nodes: Collection[str], timeout: float = ASK
) -> Iterator[tuple[str, bytes]]:
    """Ask these members, or all if none is named; end when those that were named have answered, or time is over."""
    heard: set[str] = set()
    with rpc(state) as client:
        for sender, answer in client.query(name, payload, timeout=timeout, nodes=_named(nodes)):
            yield sender, answer
            heard.add(sender)
            if nodes and heard >= set(nodes):
                return
