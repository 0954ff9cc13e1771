"""Keep this host's Serf agent running, and on the mesh's gossip key.

Any member can have all agents install, use and remove keys (`serf keys`). meshd never does, so the agent's log tells
that someone else did. The agent has its keys in memory alone: one that starts again has the mesh's key and no other.
"""

import logging
import math
import random
import re
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from meshd.errors import MeshdError, SerfError
from meshd.gossip import serf, serf_agent
from meshd.mesh.model import Status
from meshd.state.directory import State

log = logging.getLogger("meshd")

# What an agent logs of each such command, whether it could follow it or not. `list-keys` changes nothing.
KEY_COMMAND = re.compile(rb"serf: Received (install|use|remove)-key query")
# Seconds from a command to the new start: the commands come by threes, and all agents at once must not lose each other.
SOONEST, LATEST = 0.5, 1.5
# Seconds from one start to the next, as long as the commands go on.
PAUSE = 5.0
# Names of members to log.
MOST_NAMES = 50


class Keeper:
    """What one daemon does for its Serf agent; `started` is called after each start."""

    def __init__(self, state: State, started: Callable[[], None]) -> None:
        self.state = state
        self.due = math.inf
        """When, in monotonic time, the agent is to start again; infinity while its keys are the mesh's."""
        self._started = started
        self._last_start = -math.inf
        self._log = Log(state.serf_log)
        # The agent whose monitor told of a command: with a `log_level` of someone's own the log may not.
        self._told: int | None = None

    def hear(self, line: str, pid: int | None) -> bool:
        """Return whether a line of the agent's monitor tells of a change of its keys. Any thread may call this."""
        tells = bool(KEY_COMMAND.search(line.encode()))
        if tells:
            self._told = pid
        return tells

    def keep(self) -> str:
        """Start Serf unless it runs, and again after a change of its keys; return why it does not run."""
        pid = serf.running(self.state.serf_config)
        if pid is not None:
            self._look(pid)
            if time.monotonic() < self.due:
                return ""
            serf.stop(pid)
        self.due = math.inf
        try:
            with serf_agent.start(self.state):
                log.info("serf started")
        except MeshdError as error:
            return f"serf: {error}"
        self._last_start = time.monotonic()
        self._started()
        return ""

    def _look(self, pid: int) -> None:
        tells = self._log.tells(pid) or self._told == pid
        if not tells or self.due < math.inf:
            return
        now = time.monotonic()
        self.due = max(now + random.uniform(SOONEST, LATEST), self._last_start + PAUSE)  # noqa: S311  not a secret
        log.warning(
            "a member changed the keys of all Serf agents (serf keys); this host's starts again with the mesh's key "
            "in %.1f s. Members now: %s",
            self.due - now,
            _named(self._alive()),
        )

    def _alive(self) -> list[str]:
        with suppress(SerfError):
            return sorted(m.name for m in serf_agent.members(self.state) if m.status is Status.ALIVE)
        return []


class Log:
    """The log file of the agent, which begins with its start: what it tells was said of the agent that runs.

    The monitor drops lines in a flood, and remembers 512 of those that were logged while no daemon ran.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pid: int | None = None
        self._offset = 0
        self._tells = False

    def tells(self, pid: int) -> bool:
        """Return whether the log of the agent `pid` tells of a change of its keys; reads what was added since."""
        if pid != self._pid:
            self._pid, self._offset, self._tells = pid, 0, False
        with suppress(OSError), self._path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                self._offset = 0  # it was cut
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._tells = self._tells or KEY_COMMAND.search(line) is not None
        return self._tells


def _named(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:MOST_NAMES]) or "unknown"
    return shown if len(names) <= MOST_NAMES else f"{shown} and {len(names) - MOST_NAMES} more"
