"""Ask and tell the other hosts until all of them have confirmed, or time is over."""

import math
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from meshd.errors import SerfError
from meshd.gossip import calls
from meshd.gossip.messages import APPLIED, NONCE, Applied
from meshd.gossip.serf_agent import members
from meshd.mesh.model import Host, Status
from meshd.mesh.tombstones import Tombstones
from meshd.state.claim import has_ended, settled
from meshd.state.directory import State

# An asker hears within this time from everybody who is ready; who is not is asked again. Gossip takes as long as the
# logarithm of the mesh: of 50 hosts the last hear a question after 0.7 s, and Serf drops what is answered later.
ASK, ASK_TENFOLD = 1.0, 1.5
# How often everybody alive is told of a tombstone: by gossip, and then those who have not said that they have it.
TELLINGS = 4
# Who has not said after so many questions that it is ready may not have heard them.
PATIENCE = 2
# Seconds until a Serf that did not answer is asked again.
AGAIN = 0.2
# Seconds that a Serf which has just started has to find one of the hosts that are known.
FOUND = 5.0
# Seconds for meeting who has not said that it has a tombstone.
MEETING = 10.0


Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Readiness:
    """The outcome of waiting for the others: those who have done what was asked, and those who did not say so.

    `refusals` is why not, by name, of those of the missing who said that.
    """

    ready: frozenset[str]
    missing: frozenset[str]
    refusals: Mapping[str, str] = field(default_factory=dict)


def tell_tombstones(state: State, tombstones: Tombstones) -> Readiness:
    """Tell of tombstones until all alive, admitted hosts say that they have them; who does not asks for them later."""
    having: set[str] = set()
    missing = set(state.roster().hosts)
    with suppress(SerfError):
        for telling in range(TELLINGS):
            asked = [host for host in expected_hosts(state) if host.name not in having]
            missing = {host.name for host in asked}
            if not missing:
                break
            if telling:
                calls.sync_with(state, missing, MEETING)
            having |= calls.deliver_tombstones(state, tombstones, asked)
            missing -= having
    return Readiness(frozenset(having), frozenset(missing))


def wait_ready(
    state: State,
    timeout: float,
    progress: Progress = lambda *_: None,
    *,
    meeting: bool = True,
    is_over: Callable[[Collection[str]], bool] = lambda _: False,
) -> Readiness:
    """Ask the others until all alive, admitted hosts have applied this host's record, or time is over.

    A Serf that lists none of the known hosts alive has FOUND seconds to find one. `progress` gets the number that is
    ready and the number of all, this host included. With `meeting` those who do not answer are met in person.
    `is_over` gets the names of all hosts as long as some of them have not said yes, and says whether to give up.
    """
    nonce = secrets.token_bytes(NONCE)
    ready: set[str] = set()
    refusals: dict[str, str] = {}
    begun = time.monotonic()
    deadline, found = begun + timeout, begun + min(FOUND, timeout)
    asked = 0

    def ask(expected: set[str], missing: list[Host]) -> None:
        if asked:
            calls.rebroadcast(state, ASK)
        if meeting and asked >= PATIENCE:
            calls.sync_with(state, {host.name for host in missing}, ASK)
        wait = min(_ask_timeout(len(expected)), max(ASK, deadline - time.monotonic()))
        # The record of this moment: the authority may confirm it meanwhile.
        question = Applied.of(Host(state.settings.name, settled(state).record), nonce).payload()
        for name, refusal in calls.ask_hosts(state, APPLIED, question, missing, wait):
            if refusal:
                refusals[name] = refusal
            else:
                ready.add(name)
                progress(len(ready & expected) + 1, len(expected) + 1)

    while True:
        try:
            hosts = expected_hosts(state)
            expected = {host.name for host in hosts}
            progress(len(ready & expected) + 1, len(expected) + 1)
            missing = [host for host in hosts if host.name not in ready]
            if not hosts and time.monotonic() < found and state.roster().hosts and not has_ended(state):
                time.sleep(AGAIN)
                continue
            goes_on = missing and time.monotonic() < deadline and not has_ended(state)
            if not goes_on or (asked and is_over(expected)):
                names = frozenset(host.name for host in missing)
                why = {name: refusal for name, refusal in refusals.items() if name in names}
                return Readiness(frozenset(ready & expected), names, why)
            ask(expected, missing)
        except SerfError:
            # This host's own Serf may start again at any moment (see daemon.keeper).
            if time.monotonic() >= deadline:
                raise
            time.sleep(AGAIN)
        asked += 1


def _ask_timeout(hosts: int) -> float:
    """Return the seconds that a question has for its way to so many hosts, and their answers for theirs."""
    return max(ASK, ASK_TENFOLD * math.log10(hosts))


def expected_hosts(state: State) -> list[Host]:
    """Return the admitted hosts that Serf lists alive. Raises SerfError."""
    alive = {member.name for member in members(state) if member.status is Status.ALIVE}
    return [host for host in state.roster().sorted_hosts() if host.name in alive]
