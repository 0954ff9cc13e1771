"""What a host answers to the others' queries, from what it has on disk. With a daemon or by a lone handler."""

import time

from meshd.gossip.messages import BURY, CONFIRM, GONE, RECORD, YES, GoneQuestion, answer_gone, name_question
from meshd.mesh import membership
from meshd.mesh.model import Host
from meshd.mesh.records import pack_certificate, to_wire
from meshd.mesh.tombstones import Graves
from meshd.state import authority
from meshd.state.directory import State


def answer(state: State, query: str, payload: bytes) -> bytes | None:
    """Give the answer to a query that anybody may have sent; None for nothing to say."""
    if query == GONE:
        question = GoneQuestion.parse(payload)
        return answer_gone(question, state.roster().graves) if question is not None else None
    if query == BURY:
        graves = Graves.read(payload)
        return YES if graves and not graves.without(state.roster().graves) else None
    if query == RECORD:
        return _record(state, name_question(payload))
    if query == CONFIRM and state.authority_key is not None:
        return _confirmation(state, name_question(payload))
    return None


def _record(state: State, name: str | None) -> bytes | None:
    claim = state.claim()
    if name == state.settings.name:
        return to_wire(claim.record) if claim is not None and claim.settled else None
    record = state.roster().hosts.get(name or "")
    return to_wire(record) if record is not None else None


def _confirmation(state: State, name: str | None) -> bytes | None:
    record = state.roster().hosts.get(name or "")
    certificate = authority.confirm(state, name, record) if name and record is not None else None
    return pack_certificate(certificate) if certificate is not None else None


def bury(state: State, graves: Graves) -> bool:
    """Keep tombstones that others told of, for the next pass to act on; True if there was one that is news."""
    with state.lock():
        known, claim = state.roster(), state.claim()
        own = state.settings.name
        # What was said of an earlier host of this name is over, and what this host says itself as it leaves is no news;
        # but that it has been forgotten must be known (see ENDED).
        staying = claim.record if claim is not None and not claim.record.leaving else None
        current = {n: g for n, g in graves.gone.items() if n != own or (staying is not None and g.voids(staying))}
        host = Host(own, claim.record) if claim is not None else None
        roster = membership.bury(known, state.mesh, Graves(current, graves.revoked), host, time.time())
        if roster.graves == known.graves:
            return False
        state.save_roster(roster)
        return True
