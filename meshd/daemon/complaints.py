"""What is wrong, logged once when it begins and once when it is over."""

import logging

from meshd.reconcile import plan
from meshd.reconcile.run import Report

log = logging.getLogger("meshd")

# Anyone who has the gossip key can make any number of members that are refused.
MAX_REFUSED = 20
# Serf takes about 45 s to accept a known name at a new address; until then its tags lag behind what was announced.
LAG = 60.0


class Complaints:
    """The problems of one daemon. `now` is always the monotonic clock."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._stale_since: dict[str, float] = {}
        self._misplaced: tuple[str, ...] = ()

    def __contains__(self, text: str) -> bool:
        return text in self._known

    def log(self, texts: set[str]) -> None:
        """Log the texts that are new, and those of the last time that are over."""
        for text in sorted(texts - self._known):
            log.warning("%s", text)
        for text in sorted(self._known - texts):
            log.info("no longer: %s", text)
        self._known = texts

    def of(self, report: Report, now: float) -> set[str]:
        """Return what a reconcile found wrong."""
        refused = [f"refused {name}: {reason}" for name, reason in sorted(report.roster.refused.items())]
        refused += self._replayed(report, now)
        more = {"refused more than these"} if refused[MAX_REFUSED:] else set()
        withheld = {plan.withheld_text(change) for change in report.withheld}
        if report.misplaced is not None:
            self._misplaced = report.misplaced
        said = {*map(str, report.failures), *report.notices, *self._misplaced}
        return {*said, *refused[:MAX_REFUSED], *more, *withheld}

    def _replayed(self, report: Report, now: float) -> list[str]:
        """Return the hosts whose tags have been older than their records for longer than Serf needs."""
        self._stale_since = {name: self._stale_since.get(name, now) for name in report.roster.stale}
        return [
            f"refused the tags of {name}: {reason}"
            for name, reason in sorted(report.roster.stale.items())
            if now - self._stale_since[name] > LAG
        ]
