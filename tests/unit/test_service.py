"""The systemd unit, as text and as systemd itself reads it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from meshd.daemon import service
from meshd.state.directory import DEFAULT, State


def directives(state: State) -> dict[str, str]:
    lines = [line for line in service.unit(state).splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_orders_meshd_before_docker_and_is_started_at_boot(state: State) -> None:
    unit = directives(state)
    assert "docker.service" in unit["Before"].split()
    assert unit["WantedBy"] == "multi-user.target"
    assert unit["Type"] == "notify"


def test_a_restart_of_the_unit_ends_the_daemon_alone(state: State) -> None:
    unit = directives(state)
    assert unit["KillMode"] == "process"
    assert unit["Restart"] == "always"


def test_no_number_of_failed_starts_ends_the_unit_for_good(state: State) -> None:
    assert directives(state)["StartLimitIntervalSec"] == "0"
    assert "StartLimitIntervalSec" in service.unit(state).partition("[Service]")[0], (
        "systemd ignores it in any other section"
    )


def test_the_unit_runs_this_python_isolated_with_this_state_directory(state: State) -> None:
    command = directives(state)["ExecStart"]
    assert command.split()[1:4] == ["-I", "-m", "meshd"]
    assert command.endswith(f'--state-dir "{state.directory}" agent')


@pytest.mark.parametrize(
    ("directory", "name"),
    [(DEFAULT, "meshd.service"), (Path("/srv/my mesh/"), "meshd-srv-my-mesh.service")],
    ids=str,
)
def test_each_state_directory_has_a_unit_of_its_own(directory: Path, name: str) -> None:
    assert service.unit_name(State(directory)) == name


def test_systemd_finds_nothing_wrong_with_it(state: State, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    assert program, "apt install systemd"
    path = tmp_path / "meshd.service"
    path.write_text(service.unit(state))
    done = subprocess.run([program, "verify", "--man=no", str(path)], capture_output=True, text=True, check=False)
    own = [line for line in done.stderr.splitlines() if "meshd" in line]
    assert (done.returncode, own) == (0, [])
