"""Handles one Serf event on a host that runs no daemon: reconciles at once, and answers the other hosts' queries.

Started by handlers/meshd_event.py under anyone's plain `serf agent`, for a host that was set up with `--no-daemon`.
"""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from meshd.errors import MeshdError
from meshd.gossip import messages
from meshd.gossip.messages import APPLIED, EVENT, QUERY, Applied
from meshd.gossip.responder import NOTHING, respond, signed
from meshd.printable import printable
from meshd.state import machine_id
from meshd.state.directory import DEFAULT, State

# How often one event tries to start a first handshake again, while messages of the other side keep putting that off.
STARTS = 3


def main() -> None:
    """Handle the event in Serf's environment. Serf logs what goes to stderr; stdout is the answer to a query."""
    state = State(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT)
    try:
        handle(state, os.environ, sys.stdin.buffer.read(4096))
    except MeshdError as error:
        sys.exit(f"meshd: {printable(error)}")


def handle(state: State, environment: Mapping[str, str], payload: bytes) -> None:
    """Handle one event, unless a daemon does so or nothing is set up.

    Serf's own events are of members, and lead to a reconcile. Queries and user events carry a message, and lead to one
    if it is news or asks for it.
    """
    if not state.exists or state.settings.daemon or state.is_down:
        return
    machine_id.check(state)
    kind = environment.get("SERF_EVENT", "")
    name = environment.get("SERF_QUERY_NAME") or environment.get("SERF_USER_EVENT") or ""
    message = messages.read(kind, name, payload, state.mesh) if kind in {QUERY, EVENT} else None
    if kind in {QUERY, EVENT}:
        reply = respond(state, message, payload if kind == QUERY else None) if message is not None else NOTHING
        if kind == QUERY:
            _answer(reply.answer)
        if reply.tombstones is None and not isinstance(message, Applied):
            return
    _reconcile(state, message if isinstance(message, Applied) else None, payload)


def _reconcile(state: State, question: Applied | None, payload: bytes) -> None:
    # Imports that most messages do without.
    from meshd.gossip import calls  # noqa: PLC0415
    from meshd.reconcile.handshakes import UNDER_WAY, crossed  # noqa: PLC0415
    from meshd.reconcile.run import WITHOUT_DOCKER, Options, sync  # noqa: PLC0415

    # Serf runs handlers one after the other. `meshd init/join/up` have asked Docker, and nothing here changes that.
    report = sync(state, Options(kinds=WITHOUT_DOCKER))
    late = crossed(report.unmet or {})
    # Nobody looks again at a later time, as the daemon does. The other side repeats its initiation: one that comes in
    # meanwhile looks like the rest of a handshake, and puts the start off.
    for _ in range(STARTS):
        if not late:
            break
        time.sleep(UNDER_WAY)
        report = sync(state, Options(kinds=WITHOUT_DOCKER, overdue=late))
        late = {key: count for key, count in crossed(report.unmet or {}).items() if key not in report.restarted}
    for failure in report.failures:
        print(f"meshd: {printable(failure)}", file=sys.stderr)  # noqa: T201  Serf's log
    if question is not None:
        refusal = report.obstacle(question, state.mesh)
        if refusal is None and question.is_answered_by(report.applied):
            refusal = ""
        if refusal is not None:
            _answer(signed(state, APPLIED, payload, refusal))
    elif report.roster.hosts and state.certificate.delegation is not None:
        calls.request_confirmation(state)


def _answer(answer: bytes | None) -> None:
    sys.stdout.buffer.write(answer or b"")


if __name__ == "__main__":
    main()
