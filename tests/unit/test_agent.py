"""What the daemon makes of its hints; tests/lab has it at work."""

import subprocess
import sys
import time
from ipaddress import IPv4Network

import pytest

from meshd.daemon import agent as daemon
from meshd.daemon.agent import Agent
from meshd.daemon.hints import READINESS, Hint, Source
from meshd.errors import MeshdError
from meshd.gossip.messages import APPLIED, QUERY
from meshd.mesh.model import Tombstone
from meshd.mesh.roster import Roster
from meshd.mesh.tombstones import grave
from meshd.net import links
from meshd.net.resources import Action, Change, Route
from meshd.reconcile.handshakes import Schedule, Unmet
from meshd.reconcile.machine import Area, Failure
from meshd.reconcile.run import Report
from meshd.state.directory import State
from tests.conftest import applied, record, refusal

ADDED = Change(Action.ADD, Route(IPv4Network("172.20.7.0/24"), "wg0"))
TOLD = Hint(Source.NETLINK, "route 172.20.7.0/24 changed")
JOINED = Hint(Source.HANDLER, "member-join")


def test_links_tell_of_an_own_change_by_the_text_that_is_expected() -> None:
    assert links.told([ADDED]) == {TOLD.text}


def test_echo_does_not_hide_other_hints(state: State) -> None:
    """An echo of the daemon's own change does not hide the hints that came with it."""
    agent = Agent(state)
    agent.echoes.expect([TOLD])
    agent.hints.put(TOLD)
    assert agent._wait(0.1) == []
    agent.echoes.expect([TOLD])
    for hint in (TOLD, JOINED, TOLD):
        agent.hints.put(hint)
    assert agent._wait(0.1) == [TOLD, JOINED]


def test_answered_question_makes_no_reconcile(state: State) -> None:
    """A question that the last reconcile has answered makes no other one."""
    agent, answers = Agent(state), list[bytes]()
    question = applied(record(2, seq=5))
    agent.exchange.receive(QUERY, APPLIED, question, answers.append)
    assert agent._wait(0.1) == [READINESS], "it waits for a reconcile"
    agent.hints.put(READINESS)
    agent.exchange.after(Report(Roster({"barge2": record(2, seq=5)})))
    assert [refusal(APPLIED, question, answer) for answer in answers] == [""]
    assert agent._wait(0.1) == []


def test_a_late_handshake_is_scheduled_unless_the_peers_were_not_read(state: State) -> None:
    agent = Agent(state)
    agent._schedule_handshakes(Report(unmet={"one": Unmet(is_initiator=True, is_alive=True)}))
    assert agent.handshakes.due < time.monotonic() + 1
    agent._schedule_handshakes(Report(unmet=None))
    assert agent.handshakes.due < time.monotonic() + 1
    agent._schedule_handshakes(Report(unmet={}))
    assert agent.handshakes == Schedule()


def test_a_signal_at_any_moment_ends_the_daemon_and_never_hangs_it(state: State) -> None:
    """Its handler runs between any two steps of the main thread, which may hold the lock of a queue or an event."""
    script = (
        "import pathlib, signal, sys, time\n"
        "from meshd.daemon import agent\n"
        "from meshd.daemon.hints import Source\n"
        "from meshd.state.directory import State\n"
        "daemon, agent.SETTLE, end = agent.Agent(State(pathlib.Path(sys.argv[1]))), 0, time.monotonic() + 2\n"
        "signal.signal(signal.SIGALRM, lambda *_: daemon.stop())\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\n"
        "while time.monotonic() < end:\n"
        "    daemon.hint(Source.COMMAND, 'any')\n"
        "    daemon._wait(0)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(state.directory)], check=True, timeout=20)


def test_unsaved_tombstone_is_not_confirmed() -> None:
    """A tombstone that the disk has not taken is not confirmed."""
    roster = Roster({"barge2": record(2, seq=5)}, grave("barge3", Tombstone(7, "key")))
    assert Report(roster).applied == roster
    unsaved = (Failure(Area.DISK, MeshdError("full"), "hosts"),)
    assert Report(roster, failures=unsaved).applied == Roster(roster.hosts)


@pytest.mark.parametrize(("hosts", "seconds"), [(0, 10), (3, 10), (200, 10), (1000, 50), (1500, 60), (10000, 60)])
def test_interval_grows_with_hosts(hosts: int, seconds: float) -> None:
    """The interval between reconciles without a hint grows with the number of hosts."""
    assert daemon._interval(hosts) == seconds
