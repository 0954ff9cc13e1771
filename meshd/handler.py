"""A Serf event without a daemon: make a pass here and now, or answer the query whether one has been made.

Started by handlers/meshd_event.py under anybody's plain `serf agent`, for a host that was set up with `--no-daemon`.
"""

import os
import sys
from pathlib import Path

from meshd import answers
from meshd.errors import MeshdError
from meshd.queries import APPLIED, GONE, Question
from meshd.state import DEFAULT, State
from meshd.tombstones import Graves


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
    name = environment.get("SERF_QUERY_NAME") or environment.get("SERF_USER_EVENT")
    question = Question.parse(payload) if (event, name) == ("query", APPLIED) else None
    if event == "query" and question is None:
        sys.stdout.buffer.write(answers.answer(state, name or "", payload) or b"")
        return
    if event == "user" and name != GONE:
        return
    # Imports that the cases above do without.
    from meshd import gossip  # noqa: PLC0415
    from meshd.reconcile import WITHOUT_DOCKER, bury, reconcile  # noqa: PLC0415

    if name == GONE and not bury(state, Graves.read(payload)):
        return
    # Serf runs handlers one after the other. `meshd init/join/up` have asked Docker, and nothing here changes that.
    report = reconcile(state, kinds=WITHOUT_DOCKER)
    for failure in report.failures:
        print(f"meshd: {failure}", file=sys.stderr)  # noqa: T201  Serf's log
    if question is not None:
        sys.stdout.write(Question.YES.decode() if question.answered_by(report.applied) else "")
    elif report.roster.hosts and state.certificate.delegation is not None:
        gossip.confirm(state)


if __name__ == "__main__":
    main()
