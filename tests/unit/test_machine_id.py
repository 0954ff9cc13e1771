"""To which machine the state belongs."""

import resource
from pathlib import Path

import pytest

from meshd.errors import InputError, MeshdError, WrongMachineError
from meshd.state import machine_id
from meshd.state.directory import State

ID, OTHER = "0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210"


@pytest.fixture
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The machine-id of this machine."""
    path = tmp_path_factory.mktemp("etc") / "machine-id"
    path.write_text(f"{ID}\n")
    return path


def test_state_is_bound_at_first_start(state: State, here: Path) -> None:
    """A state that is not bound yet, as that of an earlier version, is bound; then it counts on this machine alone."""
    machine_id.check(state, here)
    machine_id.check(state, here)
    here.write_text(f"{OTHER}\n")
    with pytest.raises(WrongMachineError, match=r"that of barge1 on another machine.*'meshd up --moved'") as error:
        machine_id.check(state, here)
    assert f"remove {state.directory}" in str(error.value)
    assert error.value.exit_code == 78
    machine_id.bind(state, here)
    machine_id.check(state, here)


def test_id_itself_is_not_kept(state: State, here: Path) -> None:
    """The id must not leave the machine: what is kept tells nothing of it."""
    machine_id.check(state, here)
    kept = (state.directory / "machine").read_text()
    assert len(kept) == 64
    assert ID not in kept


@pytest.mark.parametrize("content", [None, "", "uninitialized\n", ID[:31], f"{ID}0"])
def test_machine_without_id_is_not_bound(state: State, here: Path, content: str | None) -> None:
    """A machine without an id, or without one yet, binds nothing and refuses nothing."""
    here.unlink()
    if content is not None:
        here.write_text(content)
    machine_id.check(state, here)
    assert not (state.directory / "machine").exists()
    here.write_text(ID)
    machine_id.check(state, here)
    here.write_text(content or "")
    machine_id.check(state, here)


def test_directory_without_mesh_is_left_alone(tmp_path: Path, here: Path) -> None:
    machine_id.check(State(tmp_path), here)
    assert list(tmp_path.iterdir()) == []


def test_damaged_file_is_named(state: State, here: Path) -> None:
    (state.directory / "machine").write_text("x")
    with pytest.raises(InputError, match="machine is damaged: remove it"):
        machine_id.check(state, here)


def test_state_that_cannot_be_written_is_bound_later(state: State, here: Path) -> None:
    """Neither a full disk nor a read-only one stops a host."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        machine_id.check(state, here)
        with pytest.raises(MeshdError):
            machine_id.bind(state, here)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
