"""`make install` on a machine whose Python was upgraded since. Nothing is downloaded, and nothing reaches this machine.

The new virtual environments see the packages of this one, and /usr/local/bin is another one meanwhile.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.compare.revisions import CHECKOUT

pytestmark = [pytest.mark.root, pytest.mark.lab]

LIBRARY = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
# What `make` takes for Python: what it makes finds the packages of this Python, pip itself left out.
PYTHON = """#!/bin/sh -e
{executable} "$@"
for directory; do :; done
printf '%s\\n' {packages} >"$directory/{library}/site-packages/others.pth"
"""
SHELL = """
mount -t tmpfs none "$1"
mkdir "$1/upper" "$1/work"
mount -t overlay overlay -o "lowerdir=/usr/local/bin,upperdir=$1/upper,workdir=$1/work" /usr/local/bin
make --no-print-directory -C "$2" install PREFIX="$3" PYTHON="$4"
/usr/local/bin/meshd --version
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("python")
    packages = directory / "packages"
    packages.mkdir()
    for package in Path(f"{sys.prefix}/{LIBRARY}/site-packages").iterdir():
        if not package.name.startswith(("pip", "meshd")) and package.suffix != ".pth":
            (packages / package.name).symlink_to(package)
    script = directory / "python"
    executable = f"{sys.base_prefix}/bin/python3"
    script.write_text(PYTHON.format(executable=executable, packages=packages, library=LIBRARY))
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Path:
    """Where meshd is installed; it was a directory of other files before, as /usr/local would be."""
    prefix = tmp_path_factory.mktemp("installed") / "meshd"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "own").touch()
    install(prefix, python)
    return prefix


def install(prefix: Path, python: Path) -> str:
    """Run `make install` and then the command; give what that says."""
    layer = prefix.with_suffix(".layer")
    layer.mkdir(exist_ok=True)
    pip = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = ["unshare", "--mount", "sh", "-ec", SHELL, "sh", *map(str, (layer, CHECKOUT, prefix, python))]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MAKE"))}
    done = subprocess.run(command, env={**kept, **pip}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def without_its_python(prefix: Path) -> None:
    """As after an upgrade that has removed the interpreter itself."""
    (prefix / "bin" / "python3").unlink()
    (prefix / "bin" / "python3").symlink_to("/usr/bin/python3.0")


def with_another_version(prefix: Path) -> None:
    """As after an upgrade that has put another version in the interpreter's place."""
    (prefix / LIBRARY).rename(prefix / "lib" / "python3.0")


def test_install_removes_nothing_unless_python_was_upgraded(prefix: Path, python: Path) -> None:
    """What else is below PREFIX stays, and so does a virtual environment that runs."""
    install(prefix, python)
    assert (prefix / "own").exists()


@pytest.mark.parametrize("upgrade", [without_its_python, with_another_version])
def test_install_after_an_upgrade_of_python(prefix: Path, python: Path, upgrade: Callable[[Path], None]) -> None:
    """meshd runs again after one `make install`, which makes the virtual environment anew."""
    upgrade(prefix)
    broken = subprocess.run(["sh", "-c", f"{prefix}/bin/meshd --version"], capture_output=True, check=False)
    assert broken.returncode != 0
    assert install(prefix, python).startswith("meshd")
    assert not (prefix / "lib" / "python3.0").exists()
