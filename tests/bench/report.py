"""What a measurement gives, and how it is told: a table on the terminal, JSON, and an SVG for each figure."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Target:
    """A figure and the most that it should be, or the least."""

    what: str
    figure: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit

    def __str__(self) -> str:
        said = "met" if self.is_met else "MISSED"
        return f"{said:>6}  {self.what}: {self.figure:.4g} {self.unit} (target: {self.limit:g})"


@dataclass(frozen=True, slots=True)
class Result:
    """One measurement: rows of a table, targets, and what draws its figure on a matplotlib Axes."""

    name: str
    title: str
    rows: Sequence[dict[str, Any]]
    targets: tuple[Target, ...]
    draw: Callable[[Any], None]


def text(result: Result) -> str:
    """Give the table and the targets for a terminal."""
    lines = [list(result.rows[0]), *([str(value) for value in row.values()] for row in result.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([result.title, *table, *map(str, result.targets), ""])


def write(results: Sequence[Result], directory: Path) -> None:
    """Write an SVG and a JSON file for each result; each JSON file says on which machine."""
    directory.mkdir(parents=True, exist_ok=True)
    here = machine()
    for result in results:
        targets = [{"what": t.what, "figure": t.figure, "limit": t.limit, "unit": t.unit} for t in result.targets]
        values = {"title": result.title, "machine": here, "rows": list(result.rows), "targets": targets}
        (directory / f"{result.name}.json").write_text(json.dumps(values, indent=1) + "\n")
        figure = Figure(figsize=(8, 4.3), layout="constrained")
        axes = figure.add_subplot()
        result.draw(axes)
        axes.set_title(result.title, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        # Without a date: the same figures give the same file.
        figure.savefig(directory / f"{result.name}.svg", metadata={"Date": None})


def machine() -> dict[str, str]:
    """Describe what the figures were taken on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(memory[1]) // 2**20} GiB" if memory else "",
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("serf", "wireguard-go")},
    }


def _version(package: str) -> str:
    done = subprocess.run(["dpkg-query", "-Wf", "${Version}", package], capture_output=True, text=True, check=False)
    return done.stdout
