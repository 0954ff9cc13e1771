"""A Serf event without a daemon: make a pass here and now, or answer the query whether one has been made.

Started by handlers/meshd_event.py under anybody's plain `serf agent`, for a host that was set up with `--no-daemon`.
"""

import os
import sys
from pathlib import Path

from meshd.errors import MeshdError
from meshd.gossip import responder
from meshd.gossip.messages import APPLIED, BURY, GONE, YES, Question
from meshd.mesh.tombstones import Graves
from meshd.state.directory import DEFAULT, State


def main() -> None:
    """Handle the event in Serf's environment. Serf logs what goes to stderr; stdout is the answer to a query."""
    state = State(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT)
    try:
        handle(state, os.environ, sys.stdin.buffer.read(4096))
    except MeshdError as error:
        sys.exit(f"meshd: {error}")


def handle(state: State, environment: "os._Environ[str]", payload: bytes) -> None:
    """Make a pass, unless there is a daemon (it reads everything again when it is back) or nothing is set up."""
    if not state.exists or state.settings.daemon or state.is_down:
        return
    # Serf's own events are of members: a pass. The others carry something that anybody may have written.
    event = environment.get("SERF_EVENT")
    name = environment.get("SERF_QUERY_NAME") or environment.get("SERF_USER_EVENT") or ""
    is_tombstones = (event, name) in {("user", GONE), ("query", BURY)}
    # Serf ends what it pipes in with a newline. A tombstone may end with one of its own, and is read with both.
    text = payload.removesuffix(b"\n")
    question = Question.parse(text) if (event, name) == ("query", APPLIED) else None
    if event == "query" and not is_tombstones and question is None:
        _answer(responder.answer(state, name, text))
        return
    if event == "user" and not is_tombstones:
        return
    # Imports that the cases above do without.
    from meshd.gossip import calls  # noqa: PLC0415
    from meshd.gossip.responder import bury  # noqa: PLC0415
    from meshd.reconcile.run import WITHOUT_DOCKER, reconcile  # noqa: PLC0415

    if is_tombstones:
        is_news = bury(state, Graves.read(payload))
        if event == "query":
            _answer(responder.answer(state, name, payload))
        if not is_news:
            return
    # Serf runs handlers one after the other. `meshd init/join/up` have asked Docker, and nothing here changes that.
    report = reconcile(state, kinds=WITHOUT_DOCKER)
    for failure in report.failures:
        print(f"meshd: {failure}", file=sys.stderr)  # noqa: T201  Serf's log
    if question is not None:
        _answer(YES if question.answered_by(report.applied) else None)
    elif report.roster.hosts and state.certificate.delegation is not None:
        calls.confirm(state)


def _answer(answer: bytes | None) -> None:
    sys.stdout.buffer.write(answer or b"")


if __name__ == "__main__":
    main()
