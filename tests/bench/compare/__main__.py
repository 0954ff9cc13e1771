"""`python -m tests.bench.compare [--against REVISION] OLD [passes | handler | joins | at-rest …]`."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from tests.bench.compare import at_rest, handler, joins, passes
from tests.bench.compare.pairs import MARGIN, Comparison, Figures, compare
from tests.bench.compare.revisions import built, has_uncommitted_changes
from tests.bench.report import Result, text, write

MEASUREMENTS = {
    "passes": ("Reconciles among 1,000 hosts", passes.run),
    "handler": ("The handler, from exec to exit", handler.run),
    "joins": ("meshd join, the third host of a mesh", joins.run),
    "at-rest": ("The daemon at rest, in a mesh of six hosts with Docker", at_rest.run),
}


@click.command()
@click.option("--against", default="HEAD", show_default=True, help="the new revision")
@click.option("--out", type=click.Path(path_type=Path), default=Path(".make/bench-compare"), show_default=True)
@click.argument("old")
@click.argument("names", nargs=-1, type=click.Choice(list(MEASUREMENTS)))
def main(old: str, names: tuple[str, ...], against: str, out: Path) -> None:
    """Measure the revision OLD and a newer one in turn; print ratios, and write JSON and figures."""
    revisions = [built(old), built(against)]
    if has_uncommitted_changes():
        click.echo("Changes that are not committed are not measured.", err=True)
    for name, (title, run) in MEASUREMENTS.items():
        if name in (names or MEASUREMENTS):
            found = list(compare(list(_counted(name, run(revisions)))))
            result = _result(name, f"{title}: {revisions[1]} to {revisions[0]}", found)
            click.echo(text(result))
            write([result], out)


def _counted(name: str, pairs: Iterable[tuple[Figures, Figures]]) -> Iterator[tuple[Figures, Figures]]:
    """Pass the pairs on, and show on standard error how many there are."""
    for number, pair in enumerate(pairs, 1):
        click.echo(f"\r{name}: pair {number} ", nl=False, err=True)
        yield pair
    click.echo(err=True)


def _result(name: str, title: str, found: Sequence[Comparison]) -> Result:
    rows = [
        {
            "median of": comparison.what,
            "old": f"{comparison.old:.4g}",
            "new": f"{comparison.new:.4g}",
            "new to old": round(comparison.ratio, 3),
            "95 % interval": f"{comparison.low:.3f}–{comparison.high:.3f}",
            "pairs": comparison.pairs,
            "new takes": comparison.verdict,
        }
        for comparison in found
    ]
    return Result(f"compare-{name}", title, rows, (), partial(_draw, found))


def _draw(found: Sequence[Comparison], axes: Any) -> None:
    for place, comparison in enumerate(found):
        spread = [[comparison.ratio - comparison.low], [comparison.high - comparison.ratio]]
        axes.errorbar(comparison.ratio, place, xerr=spread, fmt="D", color="C0", capsize=4)
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.axvspan(1 / MARGIN, MARGIN, color="0.93")
    axes.set(yticks=range(len(found)), yticklabels=[comparison.what for comparison in found])
    axes.set(xlabel="new to old: estimate, 95 % interval; grey: no difference that matters")
    axes.invert_yaxis()


if __name__ == "__main__":
    main()
