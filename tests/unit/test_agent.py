"""What the daemon makes of its hints; tests/lab has it at work."""

import subprocess
import sys
import time
from ipaddress import IPv4Network

import pytest

from meshd.daemon import agent as daemon
from meshd.daemon.agent import Agent
from meshd.daemon.exchange import ASKED
from meshd.errors import MeshdError
from meshd.gossip.messages import APPLIED, YES, Question
from meshd.mesh.membership import Roster
from meshd.mesh.model import Goodbye
from meshd.net import links
from meshd.net.resources import Action, Change, Route
from meshd.reconcile.machine import Failure
from meshd.reconcile.run import Report
from meshd.state.directory import State
from tests.conftest import record

ADDED = Change(Action.ADD, Route(IPv4Network("172.20.7.0/24"), "wg0"))
TOLD = "netlink: route 172.20.7.0/24 changed"


def test_what_the_kernel_tells_of_the_last_pass_is_no_reason_for_another(state: State) -> None:
    agent = Agent(state)
    agent.echoes = links.told([ADDED])
    agent.hint(TOLD)
    assert agent._wait(0.1) == []
    agent.hint(TOLD)
    assert agent._wait(0.1) == [TOLD], "the second one is somebody else's"


def test_an_echo_does_not_hide_what_came_with_it(state: State) -> None:
    agent = Agent(state)
    agent.echoes = links.told([ADDED])
    agent.logged = time.monotonic() - daemon.HELD_BACK
    for text in (TOLD, "serf: member-join", TOLD):
        agent.hint(text)
    assert agent._wait(0.1) == [TOLD, "serf: member-join"]


def test_a_handler_tells_nothing_new_of_what_serf_has_logged(state: State) -> None:
    agent = Agent(state)
    agent.hint("serf: member-join")
    assert agent._wait(0.1) == ["serf: member-join"]
    agent.logged = time.monotonic()
    agent.hint("serf: member-join")
    agent.hint("serf: member-update")
    assert agent._wait(0.1) == []
    agent.hint("netlink: link wg0 removed")
    assert agent._wait(0.1) == ["netlink: link wg0 removed"]


def test_a_question_that_the_last_pass_has_answered_makes_no_other(state: State) -> None:
    agent, answers = Agent(state), list[bytes]()
    agent.exchange._asked(APPLIED, Question("barge2", 5).payload(), answers.append)
    assert agent._wait(0.1) == [ASKED], "it waits for a pass"
    agent.hint(ASKED)
    agent.exchange.after(Report(Roster({"barge2": record(2, seq=5)})))
    assert answers == [YES]
    assert agent._wait(0.1) == []


def test_a_handshake_is_begun_anew_at_its_times_and_each_of_them_counts_once(state: State) -> None:
    agent, now = Agent(state), time.monotonic()
    agent.unmet = {"one": (now - 2, now - 1, now + 60), "two": (now + 60,), "three": ()}
    assert agent._overdue() == {"one"}
    assert agent._overdue() == set()
    assert agent.unmet == {"one": (now + 60,), "two": (now + 60,), "three": ()}


def test_a_signal_at_any_moment_ends_the_daemon_and_never_hangs_it(state: State) -> None:
    """Its handler runs between any two steps of the main thread, which may hold the lock of a queue or an event."""
    script = (
        "import pathlib, signal, sys, time\n"
        "from meshd.daemon import agent\n"
        "from meshd.state.directory import State\n"
        "daemon, agent.SETTLE, end = agent.Agent(State(pathlib.Path(sys.argv[1]))), 0, time.monotonic() + 2\n"
        "signal.signal(signal.SIGALRM, lambda *_: daemon.stop())\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\n"
        "while time.monotonic() < end:\n"
        "    daemon.hint('any')\n"
        "    daemon._wait(0)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(state.directory)], check=True, timeout=20)


def test_a_goodbye_that_the_disk_has_not_taken_is_not_confirmed() -> None:
    roster = Roster({"barge2": record(2, seq=5)}, {"barge3": Goodbye(7, "key", b"")})
    assert Report(roster).applied == {"barge2": 5, "barge3": 7}
    assert Report(roster, failures=(Failure("hosts", MeshdError("full")),)).applied == {"barge2": 5}


@pytest.mark.parametrize(("hosts", "seconds"), [(0, 10), (3, 10), (200, 10), (1000, 50), (1500, 60), (10000, 60)])
def test_looking_in_vain_comes_more_rarely_the_more_hosts_there_are(hosts: int, seconds: float) -> None:
    assert daemon._interval(hosts) == seconds
