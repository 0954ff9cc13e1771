"""The systemd unit, as text and as systemd itself reads it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from meshd.daemon import service
from meshd.errors import WrongMachineError
from meshd.state.directory import DEFAULT, State


def directives(state: State) -> dict[str, str]:
    lines = [line for line in service.unit(state).splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_unit_starts_at_boot_before_docker(state: State) -> None:
    """The unit is started at boot and before Docker."""
    unit = directives(state)
    assert "docker.service" in unit["Before"].split()
    assert unit["WantedBy"] == "multi-user.target"
    assert unit["Type"] == "notify"


def test_unit_restart_ends_only_daemon(state: State) -> None:
    """A restart of the unit ends the daemon only; Serf and WireGuard go on."""
    unit = directives(state)
    assert unit["KillMode"] == "process"
    assert unit["Restart"] == "always"


def test_unit_has_no_start_limit(state: State) -> None:
    """systemd starts the unit again however often it has failed."""
    assert directives(state)["StartLimitIntervalSec"] == "0"
    assert "StartLimitIntervalSec" in service.unit(state).partition("[Service]")[0], (
        "systemd ignores it in any other section"
    )


def test_unit_runs_isolated_python(state: State) -> None:
    """The unit runs this Python, isolated, with this state directory."""
    command = directives(state)["ExecStart"]
    assert command.split()[1:4] == ["-I", "-m", "meshd"]
    assert command.endswith(f'--state-dir "{state.directory}" agent')


@pytest.mark.parametrize(
    ("directory", "name"),
    [(DEFAULT, "meshd.service"), (Path("/srv/my mesh/"), "meshd-srv-my-mesh.service")],
    ids=str,
)
def test_unit_name_by_state_directory(directory: Path, name: str) -> None:
    """Each state directory has a unit of its own."""
    assert service.unit_name(State(directory)) == name


@pytest.mark.debian
def test_systemd_verifies_unit(state: State, tmp_path: Path) -> None:
    """`systemd-analyze verify` reports nothing about the unit."""
    program = shutil.which("systemd-analyze")
    assert program, "apt install systemd"
    path = tmp_path / "meshd.service"
    path.write_text(service.unit(state))
    done = subprocess.run([program, "verify", "--man=no", str(path)], capture_output=True, text=True, check=False)
    own = [line for line in done.stderr.splitlines() if "meshd" in line]
    assert (done.returncode, own) == (0, [])


def test_unit_does_not_start_a_copy_again(state: State) -> None:
    """On another machine than that of the state the daemon ends for good, and does not start every second."""
    assert directives(state)["RestartPreventExitStatus"] == str(WrongMachineError.exit_code)
