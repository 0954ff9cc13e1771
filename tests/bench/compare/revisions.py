"""A revision of meshd, ready to run: the wheel in a virtual environment of its own, and the revision's own tests.

A measurement uses the `meshd` command and whole processes. What it needs of the inside of a revision is in `stand.py`
and in the revision's own `tests.bench.daemon`: the modules of meshd have other names in other revisions.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

# Also where a copy of the tests runs, inside of the checkout.
CHECKOUT = next((p for p in Path(__file__).parents if (p / ".git").exists()), Path(__file__).parents[3])
BUILT = CHECKOUT / ".make" / "revisions"
# The revision's tests import them.
FOR_TESTS = ("pytest", "hypothesis")


@dataclass(frozen=True, slots=True)
class Revision:
    """A commit, and the directory where it is built: `venv/` has its wheel, `tests/` are its own."""

    commit: str
    directory: Path

    def __str__(self) -> str:
        return self.commit[:7]

    @property
    def python(self) -> Path:
        return self.directory / "venv" / "bin" / "python"

    @property
    def meshd(self) -> str:
        """The command, by its path: the hosts of a lab find the `meshd` of this checkout first."""
        return str(self.directory / "venv" / "bin" / "meshd")

    def popen(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start this revision's Python where `tests` is its own, and `meshd` the wheel's."""
        command = [str(self.python), *arguments]
        return subprocess.Popen(
            command,
            cwd=self.directory,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(self.directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


def built(name: str) -> Revision:
    """Return the revision of this name, and build it unless that was done. Raises ClickException if there is none."""
    revision = _revision(name)
    # Both get the same versions of all libraries: only meshd is to make a difference.
    packages = _output([sys.executable, "-m", "pip", "freeze", "--exclude", "meshd"])
    stamp = revision.directory / "packages.txt"
    if not stamp.is_file() or stamp.read_text() != packages:
        click.echo(f"Building {revision}", err=True)
        _build(revision, packages)
        stamp.write_text(packages)
    return revision


def built_wheel(name: str) -> Path:
    """Return the wheel alone of the revision of this name. Raises ClickException if there is no such revision."""
    revision = _revision(name)
    wheels = revision.directory.with_suffix(".wheel")
    if not list(wheels.glob("*.whl")):
        source = wheels / "source"
        shutil.rmtree(wheels, ignore_errors=True)
        _build_wheel(revision, source, wheels)
        shutil.rmtree(source)
    return next(wheels.glob("*.whl"))


def _revision(name: str) -> Revision:
    commit = _output(["git", "rev-parse", "--verify", f"{name}^{{commit}}"]).strip()
    return Revision(commit, BUILT / commit[:12])


def _build(revision: Revision, packages: str) -> None:
    directory = revision.directory
    shutil.rmtree(directory, ignore_errors=True)
    source, wheels, constraints = (directory / part for part in ("source", "wheels", "constraints.txt"))
    _build_wheel(revision, source, wheels)
    constraints.write_text(packages)
    _output([sys.executable, "-m", "venv", str(directory / "venv")])
    pip = [str(revision.python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    _output([*pip, *map(str, wheels.glob("*.whl")), *FOR_TESTS])
    # Without its sources: Python would import meshd from there.
    (source / "tests").rename(directory / "tests")
    shutil.rmtree(source)


def _build_wheel(revision: Revision, source: Path, wheels: Path) -> None:
    """Put the revision's files into `source`, and the wheel of them into `wheels`."""
    source.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", revision.commit], cwd=CHECKOUT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
    _output([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(source)])


def _output(command: Sequence[str]) -> str:
    """Return what a command prints. Raises ClickException with its errors if it fails."""
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise click.ClickException(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def has_uncommitted_changes() -> bool:
    """Return whether the checkout differs from its commit, in what a measurement would run."""
    return bool(_output(["git", "status", "--porcelain", "--", "meshd", "handlers", "images", "tests"]))
