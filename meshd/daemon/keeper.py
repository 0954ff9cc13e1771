"""Keep this host's Serf agent running, and on the mesh's gossip key.

Any member can have all agents install, use and remove keys (`serf keys`). meshd never does, so a line of the agent's
log says that someone else did. The agent has its keys in memory alone: one that starts again has the mesh's key and
no other.
"""

import logging
import math
import random
import re
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from threading import Event

from meshd.errors import MeshdError, SerfError
from meshd.gossip import serf, serf_agent
from meshd.mesh.model import Status
from meshd.state.directory import State

log = logging.getLogger("meshd")

# What an agent logs of each such command, whether it could follow it or not. `list-keys` changes nothing. The whole
# line: a member's name may hold anything.
KEY_COMMAND = re.compile(r"\S+ \S+ \[INFO\] serf: Received (install|use|remove)-key query")
# In a flood the monitor leaves out lines, perhaps one of these, and says so.
LINES_LOST = re.compile(r"\S+ \S+ \[WARN\] agent\.ipc: Dropping logs to .*")
# Seconds from a command to the new start: the commands come by threes, and all agents at once must not lose each other.
SOONEST, LATEST = 0.5, 1.5
# Seconds from one start to the next, as long as the commands go on.
PAUSE = 5.0
# Seconds from one question for all members' keys to the next, and for the answer: Serf waits for those who are silent.
ASK_AGAIN, ANSWER = 30.0, 30.0
# Names of members to log.
MOST_NAMES = 50


class Keeper:
    """What one daemon does for its Serf agent. `hint` wakes the daemon, and `started` is called after each start.

    The loop calls `keep`, the thread that follows the agent's monitor `adopt` and `hear`, and one of its own `watch`.
    """

    def __init__(self, state: State, hint: Callable[[str], None], started: Callable[[], None]) -> None:
        self.state = state
        self.due = math.inf
        """When, in monotonic time, the agent is to start again; infinity while its keys are the mesh's."""
        self._hint = hint
        self._on_start = started
        self._started: int | None = None
        self._started_at = -math.inf
        # Whether the agent ran when `keep` last looked, so that its end is news.
        self._ran = False
        # The agent whose keys somebody changed: another process has other keys.
        self._changed: int | None = None
        # Whether a command may have been given that this daemon has not heard of.
        self._doubt = Event()
        self._asked_at = -math.inf

    def keep(self) -> str:
        """Start Serf unless it runs, and again after a change of its keys; return why it does not run."""
        pid = serf.running(self.state.serf_config)
        if pid is not None:
            self._ran = True
            if pid == self._changed and self.due == math.inf:
                self._schedule()
            if time.monotonic() < self.due:
                return ""
            serf.stop(pid)
        elif self._ran and (words := serf.last_words(self.state.serf_log)):
            log.warning("serf ended: %s", words)
        self._ran = False
        self.due = math.inf
        try:
            with serf_agent.start(self.state):
                log.info("serf started")
        except MeshdError as error:
            return f"serf: {error}"
        self._started, self._started_at = serf.running(self.state.serf_config), time.monotonic()
        self._ran = True
        self._contain(self._started)
        self._on_start()
        return ""

    def _schedule(self) -> None:
        now = time.monotonic()
        self.due = max(now + random.uniform(SOONEST, LATEST), self._started_at + PAUSE)  # noqa: S311  not a secret
        log.warning(
            "a member changed the keys of all Serf agents (serf keys); this host's starts again with the mesh's key "
            "in %.1f s. Members now: %s",
            self.due - now,
            named(self._alive()),
        )

    def _alive(self) -> list[str]:
        with suppress(SerfError):
            return sorted(m.name for m in serf_agent.members(self.state) if m.status is Status.ALIVE)
        return []

    def adopt(self, pid: int | None) -> None:
        """Take note of the agent whose monitor is followed from now on: one that ran before may have other keys."""
        if pid != self._started:
            self._doubt.set()
            self._contain(pid)

    @staticmethod
    def _contain(pid: int | None) -> None:
        """Bound the memory of an agent, also of one that an older version has started; log why it cannot be done."""
        try:
            if pid is not None:
                serf.contain(pid)
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended
        except OSError as error:
            log.warning("serf may fill this host's memory: %s", error)

    def hear(self, line: str, pid: int | None) -> None:
        """Take note of a line of the monitor of the agent `pid`."""
        if KEY_COMMAND.fullmatch(line.strip()):
            self._change(pid, line.partition("serf: ")[2])
        elif LINES_LOST.fullmatch(line.strip()):
            self._doubt.set()

    def watch(self) -> None:
        """Ask for the agents' keys once there is doubt about this host's own. Raises SerfError.

        All members are asked, since Serf has no question for one agent alone.
        """
        self._doubt.wait()
        time.sleep(max(0.0, self._asked_at + ASK_AGAIN - time.monotonic()))
        pid = serf.running(self.state.serf_config)
        with serf_agent.rpc(self.state, ANSWER) as client:
            keys = client.keys()
        self._doubt.clear()
        self._asked_at = time.monotonic()
        if keys - {self.state.gossip_key}:
            self._change(pid, "an agent has another key")

    def _change(self, pid: int | None, why: str) -> None:
        if pid != self._changed:
            self._changed = pid
            self._hint(why)


def named(names: Collection[str]) -> str:
    """Return names for a line of the log, not more than MOST_NAMES of them."""
    shown = ", ".join(sorted(names)[:MOST_NAMES]) or "unknown"
    return shown if len(names) <= MOST_NAMES else f"{shown} and {len(names) - MOST_NAMES} more"
