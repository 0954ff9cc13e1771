"""The run: draw a fault, do it, wait until all is well, and say what was not."""

import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from random import Random

from meshd.errors import MeshdError
from meshd.lab.hosts import Lab, LabHost
from tests.chaos.checks import Logs, Underlay, Verdict, agree, explained, reach
from tests.chaos.faults import FAULTS, NAMES, WITH_DOCKER, Draw, Fault, Scene, draws, hand_on
from tests.lab.conftest import IN_CLEAR, assemble, capturing, talking
from tests.lab.traffic import unbroken

# Seconds on top of what is promised: for asking five hosts, on a machine that does other things as well.
SLACK = 5.0
# After a violation all has to be well within this time, or the faults that follow would show nothing.
RECOVER = 90.0
Say = Callable[[str], None]


@dataclass(slots=True)
class Outcome:
    """What a run has seen. `took` are the seconds until all reached all, for each kind of fault."""

    faults: int = 0
    checks: int = 0
    violations: int = 0
    took: dict[str, list[float]] = field(default_factory=dict)


def run(lab: Lab, faults: int, seed: int, say: Say) -> Outcome:
    """Do that many faults on a lab that is not up yet, the same ones for the same seed; `say` is told every line."""
    begun, outcome = time.monotonic(), Outcome()
    say(f"chaos: {faults} faults, seed {seed}; {len(NAMES)} hosts, {len(WITH_DOCKER)} of them with Docker")
    hand_on(*assemble(lab, docker=len(WITH_DOCKER), plain=len(NAMES) - len(WITH_DOCKER)))
    with capturing(lab, IN_CLEAR) as path:
        _run(_Run(lab, Logs(lab.directory), Underlay(path), outcome, say), islice(draws(seed), faults))
    for name, took in sorted(outcome.took.items()):
        say(f"{name}: {len(took)}, all reach all after {max(took):.1f} s at most")
    seconds = time.monotonic() - begun
    say(
        f"chaos: {outcome.faults} faults, {outcome.checks} checks, {outcome.violations} violations; "
        f"seed {seed}, {seconds:.0f} s"
    )
    return outcome


def _run(run: "_Run", drawn: Iterable[Draw]) -> None:
    assert not run.recovered(), "the mesh was well before the first fault"
    run.logs.news()
    before = Fault(lambda _: None)
    for number, draw in enumerate(drawn, 1):
        wrong = run.fault(number, draw, before.says)
        before = FAULTS[draw.name]
        if wrong and (left := run.recovered()):
            run.say(f"     {RECOVER:g} s later it is still so, and the run ends here: " + "; ".join(left))
            return


@dataclass(slots=True)
class _Run:
    lab: Lab
    logs: Logs
    underlay: Underlay
    outcome: Outcome
    say: Say

    def fault(self, number: int, draw: Draw, said_before: Sequence[str]) -> list[str]:
        """Do one fault, check everything, and say it; give what was wrong."""
        fault, begun, details = FAULTS[draw.name], time.monotonic(), list[str]()
        scene = Scene(self.lab, self.lab.host(draw.host), Random(draw.seed), details.append)
        with ExitStack() as stack:
            lost = stack.enter_context(unbroken(_spared(scene, fault)))
            if fault.talk:
                stack.enter_context(talking(scene.host, *self.lab.hosts()))
            failed = _act(fault, scene)
            acted = time.monotonic()
            reached = _in_time(reach, self.lab, acted + fault.reach + SLACK)
            took = time.monotonic() - acted
        agreed = _in_time(agree, self.lab, acted + fault.agree + SLACK)
        news = self.logs.news()
        through = Verdict(len(_spared(scene, fault)), [f"traffic suffered: {line}" for line in lost])
        verdicts = (through, reached, agreed, self.underlay.quiet(), explained(news, (*fault.says, *said_before)))
        wrong = failed + [line for verdict in verdicts for line in verdict.wrong]
        self._count(draw.name, took, verdicts, wrong)
        text = "; ".join([draw.name, *details])
        self.say(f"{number:>4} {draw.host} {text}: {took:.1f} s of {time.monotonic() - begun:.1f} s")
        for line in wrong:
            self.say(f"     VIOLATION {line}")
        if wrong:
            self._tell(news)
        return wrong

    def _count(self, name: str, took: float, verdicts: Sequence[Verdict], wrong: Sequence[str]) -> None:
        self.outcome.faults += 1
        self.outcome.checks += sum(verdict.checks for verdict in verdicts)
        self.outcome.violations += len(wrong)
        self.outcome.took.setdefault(name, []).append(took)

    def _tell(self, news: Mapping[str, Sequence[str]]) -> None:
        for line in (f"       {name}: {line}" for name, lines in news.items() for line in lines[-40:]):
            self.say(line)

    def recovered(self) -> list[str]:
        """Wait until all is well; give what is not, after all that time."""
        deadline = time.monotonic() + RECOVER
        return _in_time(reach, self.lab, deadline).wrong or _in_time(agree, self.lab, deadline).wrong


def _spared(scene: Scene, fault: Fault) -> list[tuple[LabHost, LabHost]]:
    """Pairs of hosts, in a ring, whose traffic must not suffer from the fault."""
    if fault.cuts == "any":
        return []
    hosts = [host for host in scene.lab.hosts() if fault.cuts == "no host" or host.name != scene.host.name]
    return list(zip(hosts, [*hosts[1:], hosts[0]], strict=True))


def _act(fault: Fault, scene: Scene) -> list[str]:
    try:
        fault.act(scene)
    except (AssertionError, LookupError, MeshdError, OSError, ValueError, subprocess.SubprocessError) as error:
        return [f"{type(error).__name__}: {error}"]
    return []


def _in_time(ask: Callable[[Sequence[LabHost]], Verdict], lab: Lab, deadline: float) -> Verdict:
    """Ask until nothing is wrong, and at least once."""
    while (verdict := ask(lab.hosts())).wrong and time.monotonic() < deadline:
        time.sleep(0.1)
    return verdict
