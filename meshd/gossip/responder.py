"""What is done with another host's message, by the daemon and by a handler without one."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from meshd.gossip.messages import (
    BURY,
    REASON_LIMIT,
    WHERE,
    Answer,
    Applied,
    AskConfirmation,
    AskRecord,
    AskTombstones,
    Holds,
    Message,
    TellRecord,
    TellTombstones,
    TellTwins,
    Where,
)
from meshd.mesh import certificates, membership
from meshd.mesh.certificates import CredentialError
from meshd.mesh.model import Host, Record
from meshd.mesh.records import RecordError, from_wire, to_wire
from meshd.mesh.tombstones import Tombstones
from meshd.mesh.twins import Place
from meshd.printable import printable
from meshd.state import authority
from meshd.state.directory import State


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a message: the answer to a query, if there is one, and what this host did not know.

    `tombstones` are on disk already and wait for a reconcile. `record` is the signed record of `name`.
    """

    answer: bytes | None = None
    tombstones: Tombstones | None = None
    name: str = ""
    record: Record | None = None


NOTHING = Reply()
NOBODY: Mapping[str, Record] = {}


def respond(
    state: State, message: Message, query: bytes | None = None, *, waiting: Mapping[str, Record] = NOBODY
) -> Reply:
    """Take in what a message says, and return what to answer. Raises InputError for damaged state.

    `query` is the payload of the query that it came by, None for an event. `waiting` are the records of members that
    are no hosts only because their invitation's share is used up (see Roster). The answers to Applied and Holds are the
    daemon's, or the handler's: these have reconciled. What TellTwins says is the daemon's as well.
    """
    answer: bytes | None
    match message:
        case TellTombstones():
            return _told(state, message.tombstones, query)
        case TellRecord():
            return _announced(state, message)
        case Applied() | Holds() | TellTwins():
            return NOTHING
        case Where():
            answer = _place(state, message, query)
        case AskTombstones():
            answer = message.page(state.roster().all_tombstones)
        case AskConfirmation():
            answer = _confirmation(state, message.name, waiting)
        case AskRecord():
            answer = _record(state, message.name)
    return Reply(answer)


def signed(state: State, name: str, query: bytes, refusal: str = "") -> bytes:
    """Return this host's answer to a query of this name and payload: yes, or why not."""
    settings, refusal = state.settings, printable(refusal, REASON_LIMIT)
    signature = certificates.answer(state.identity_key, settings.mesh, settings.name, name, query, refusal=refusal)
    return Answer(refusal, signature).payload()


def _told(state: State, tombstones: Tombstones, query: bytes | None) -> Reply:
    is_news = merge_tombstones(state, tombstones)
    has_all = not tombstones.without(state.roster().all_tombstones)
    answer = signed(state, BURY, query) if has_all and query is not None else None
    return Reply(answer, tombstones if is_news else None)


def _record(state: State, name: str) -> bytes | None:
    if name == state.settings.name:
        claim = state.claim()
        return to_wire(claim.record) if claim is not None and claim.settled else None
    record = state.roster().hosts.get(name)
    return to_wire(record) if record is not None else None


def _place(state: State, question: Where, query: bytes | None) -> bytes | None:
    """Return where this host runs, if it is the one that is asked for."""
    if query is None or question.name != state.settings.name or question.identity != state.certificate.identity:
        return None
    claim = state.claim()
    if claim is None or not claim.settled or claim.record.leaving:
        return None
    return signed(state, WHERE, query, str(Place.of(claim.record)))


def _confirmation(state: State, name: str, waiting: Mapping[str, Record]) -> bytes | None:
    if state.authority_key is None:
        return None
    claim = state.claim() if name == state.settings.name else None
    record = claim.record if claim is not None else state.roster().hosts.get(name, waiting.get(name))
    certificate = authority.confirm(state, name, record) if record is not None else None
    return AskConfirmation.answer(certificate) if certificate is not None else None


def _announced(state: State, message: TellRecord) -> Reply:
    mesh = state.mesh
    try:
        record = from_wire(message.wire, mesh.overlay, mesh.subnet_length)
        mesh.check(message.name, record)
    except (RecordError, CredentialError):
        return NOTHING
    return Reply(name=message.name, record=record)


def merge_tombstones(state: State, tombstones: Tombstones) -> bool:
    """Keep tombstones from other hosts for the next reconcile to act on; return whether one of them is news."""
    with state.lock():
        known, claim = state.roster(), state.claim()
        host = Host(state.settings.name, claim.record) if claim is not None else None
        if host is not None and host.record.leaving:
            # What this host signs as it leaves is no news to itself.
            others = {name: ones for name, ones in tombstones.gone.items() if name != host.name}
            tombstones = replace(tombstones, gone=others)
        roster = membership.merge_tombstones(known, state.mesh, tombstones, host, time.time())
        if roster.all_tombstones == known.all_tombstones:
            return False
        state.save_roster(roster)
        return True
