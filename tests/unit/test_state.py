"""What must survive a reboot survives it, whole; what is damaged is named and left alone."""

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from meshd import files
from meshd.endpoint import Endpoint
from meshd.errors import InputError, MeshdError
from meshd.gossip.responder import merge_tombstones
from meshd.mesh.model import Host, Revocation, Tombstone
from meshd.mesh.records import MAX_SEQ
from meshd.mesh.roster import Roster
from meshd.mesh.tombstones import Tombstones, of_leaving
from meshd.state.claim import ended, endpoint, publish, refresh
from meshd.state.directory import _OURS, Claim, State
from meshd.state.settings import Settings
from tests.conftest import MESH, certificate, delegated, delegation, public_key, record


def test_the_roster_round_trips(state: State) -> None:
    roster = Roster(
        {"barge2": record(2, seq=7), "barge4": record(4, by=delegated("barge4", delegation()))},
        {"barge3": Tombstone(4, public_key("barge3"), forgotten=b"proof")},
        revoked={9: Revocation(9, "barge5", b"signature")},
    )
    state.save_roster(roster)
    assert State(state.directory).roster() == roster


def test_a_sequence_number_grows_exactly_with_the_record(state: State) -> None:
    subnet, endpoint = record(1).subnet, record(1).endpoint
    first = publish(state, state.claim(), subnet=subnet, endpoint=endpoint, settled=False)
    again = publish(State(state.directory), state.claim(), subnet=subnet, endpoint=endpoint, settled=True)
    assert again == Claim(first.record, settled=True)
    moved = publish(state, state.claim(), subnet=subnet, endpoint=Endpoint(endpoint.address, 51821), settled=True)
    assert moved.record.seq > first.record.seq
    goodbye = publish(
        state, state.claim(), subnet=subnet, endpoint=Endpoint(endpoint.address, 51821), settled=True, leaving=True
    )
    assert goodbye.record.seq > moved.record.seq
    assert goodbye.record.leaving


def test_what_is_published_is_signed_and_a_new_certificate_is_published(state: State) -> None:
    subnet, endpoint = record(1).subnet, record(1).endpoint
    first = publish(state, state.claim(), subnet=subnet, endpoint=endpoint, settled=True).record
    MESH.trust.check("barge1", first)
    state.save_certificate(certificate("barge1", serial=99))
    second = publish(state, state.claim(), subnet=subnet, endpoint=endpoint, settled=True).record
    MESH.trust.check("barge1", second)
    assert second.seq > first.seq
    assert second.certificate.serial == 99


def test_a_sequence_number_survives_a_clock_that_went_back(state: State) -> None:
    far = Claim(record(1, seq=2**40), settled=True)
    state.save_claim(far)
    assert (
        publish(state, state.claim(), subnet=record(1).subnet, endpoint=record(1).endpoint, settled=True).record.seq
        == 2**40 + 1
    )


def test_publish_outdoes_earlier_host_of_name(state: State) -> None:
    subnet, endpoint = record(1).subnet, record(1).endpoint
    first = publish(state, state.claim(), subnet=subnet, endpoint=endpoint, settled=True)
    beyond = publish(state, state.claim(), subnet=subnet, endpoint=endpoint, settled=True, beyond=2**40)
    assert (first.record.seq < 2**40, beyond.record.seq) == (True, 2**40 + 1)
    assert publish(state, state.claim(), subnet=subnet, endpoint=endpoint, settled=True, beyond=2**40) == beyond, "once"
    last = publish(state, state.claim(), subnet=subnet, endpoint=endpoint, settled=True, beyond=MAX_SEQ - 1)
    assert last.record.seq == MAX_SEQ - 1


def test_a_goodbye_of_an_earlier_host_of_the_name_is_gone_beyond_and_that_of_this_one_is_its_end(state: State) -> None:
    claim = publish(state, state.claim(), subnet=record(1).subnet, endpoint=endpoint(state), settled=True)
    own, far = claim.record, 2**40
    earlier = of_leaving(record(1, seq=far, key="earlier", leaving=True))
    assert merge_tombstones(state, Tombstones({"barge1": earlier}))
    known = state.roster()
    assert ended(Host("barge1", own), known, time.time()) == ""
    assert refresh(state, claim, known).record.seq == far + 1
    again = state.claim()
    assert again is not None
    mine = Tombstone(far + 1, own.public_key, forgotten=b"f")
    assert "has forgotten this host" in ended(Host("barge1", own), Roster(gone={"barge1": mine}), 0)
    assert refresh(state, again, Roster(gone={"barge1": mine})) == again


def test_everything_is_private(state: State) -> None:
    state.save_roster(Roster())
    _ = state.wireguard_key, state.gossip_key, state.rpc_key
    modes = {path.name: path.stat().st_mode & 0o777 for path in state.directory.iterdir()}
    assert set(modes.values()) == {0o600}, modes


DAMAGE = {
    "settings.json": lambda s: s.settings,
    "hosts.json": lambda s: s.roster(),
    "claim.json": lambda s: s.claim(),
    "contacts.json": lambda s: s.contacts(),
    "originals.json": lambda s: s.originals(),
    "wireguard.key": lambda s: s.wireguard_key,
    "certificate.json": lambda s: s.certificate,
    "identity.key": lambda s: s.identity_key,
    "authority.pub": lambda s: s.mesh,
    "authority.key": lambda s: s.authority_key,
    "issued.json": lambda s: s.issued(),
}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"x": 1}', b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_and_left_alone(state: State, name: str, content: bytes) -> None:
    path = state.directory / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=name):
        DAMAGE[name](State(state.directory))
    assert path.read_bytes() == content


def test_a_full_disk_leaves_the_old_file_whole(state: State) -> None:
    state.save_roster(Roster())
    before = (state.directory / "hosts.json").read_bytes()
    # /dev/full cannot stand in for a directory, a file size limit of the process can: the write fails half way.
    script = (
        "import resource, signal, sys; from pathlib import Path; from meshd import files; from meshd.errors import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: files.write(Path(sys.argv[1]), b'x' * 1000)\n"
        "except MeshdError as error: sys.exit(str(error))"
    )
    path = state.directory / "hosts.json"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"writing {path}: File too large" in done.stderr
    assert path.read_bytes() == before
    assert not [p for p in state.directory.iterdir() if p.name.startswith(".")]


def test_what_is_written_is_on_disk_before_it_has_its_name(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut shows it, and a lab host's keeps what the kernel holds: so the calls are watched, and made."""
    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def watched_sync(descriptor: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink()}")
        sync(descriptor)

    def watched_replace(path: Path, target: Path) -> Path:
        done.append(f"replace {target}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    contacts = {"barge2": record(2).endpoint}
    state.save_contacts(contacts)
    path = state.directory / "contacts.json"
    assert done == [f"sync {path.with_name(f'.contacts.json.{os.getpid()}')}", f"replace {path}", f"sync {path.parent}"]
    assert State(state.directory).contacts() == contacts


def test_no_state_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run 'meshd init' or 'meshd join ADDRESS' first"):
        _ = State(tmp_path).settings


def test_the_lock_excludes_and_says_so(state: State) -> None:
    with state.lock(), pytest.raises(MeshdError, match="another meshd"), State(state.directory).lock(timeout=0.05):
        pass


def test_the_daemon_is_known_by_its_lock_not_by_its_file(state: State) -> None:
    assert state.agent_pid() is None
    with state.agent_lock():
        assert state.agent_pid() == os.getpid()
        with pytest.raises(MeshdError, match="already running"), state.agent_lock():
            pass
    assert (state.directory / "agent.pid").exists()
    assert state.agent_pid() is None


def test_who_asks_for_the_daemon_does_not_keep_it_from_starting(state: State) -> None:
    with state.agent_lock():
        pass
    with (state.directory / "agent.pid").open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.1, asking.close).start()
        with state.agent_lock():
            assert state.agent_pid() == os.getpid()


def test_forgetting_leaves_other_peoples_files(state: State) -> None:
    (state.directory / "notes.txt").write_text("mine")
    state.forget_everything()
    assert [path.name for path in state.directory.iterdir()] == ["notes.txt"]


def test_the_settings_are_forgotten_last(tmp_path: Path) -> None:
    """Whatever ends it before: the same command, run again, still finds that a host was set up here."""
    for name in _OURS - {"settings.json"}:
        state = State(tmp_path / name)
        (state.directory / name).mkdir(parents=True)  # what cannot be unlinked
        (state.directory / "settings.json").touch()
        with pytest.raises(OSError, match=name):
            state.forget_everything()
        assert state.exists, name


def test_files_are_readable_json(state: State) -> None:
    files.write_json(state.directory / "hosts.json", {"b": 1, "a": 2})
    assert list(json.loads((state.directory / "hosts.json").read_bytes())) == ["a", "b"]


def test_what_a_host_says_itself_as_it_leaves_does_not_end_it(state: State) -> None:
    """Serf gives a user event to who sends it as well: without a daemon the handler hears of the host's own goodbye."""
    subnet = record(1).subnet
    publish(state, state.claim(), subnet=subnet, endpoint=endpoint(state), settled=True)
    last = publish(state, state.claim(), subnet=subnet, endpoint=endpoint(state), settled=True, leaving=True).record
    assert not merge_tombstones(state, Tombstones({"barge1": of_leaving(last)}))
    assert ended(Host("barge1", last), state.roster(), time.time()) == ""


# What commit 527c77a wrote for `meshd join` without --bind.
VERSION_1 = {
    "version": 1,
    "advertise": None,
    "allow": ["tcp/22"],
    "bind": "10.10.10.101",
    "bind_chosen": False,
    "bridge": "ovl0",
    "daemon": True,
    "docker": False,
    "gossip_port": 7946,
    "keepalive": 25,
    "mesh": "meshd",
    "mtu": None,
    "name": "barge1",
    "overlay": "172.20.0.0/16",
    "rpc_port": 7373,
    "subnet": None,
    "subnet_length": 24,
    "wireguard": "wg0",
    "wireguard_backend": "auto",
    "wireguard_port": 51820,
}


@pytest.mark.parametrize("is_chosen", [False, True])
def test_settings_version_1_are_upgraded(tmp_path: Path, is_chosen: bool) -> None:
    """Settings of version 1 are read, and kept as version 2 with the found address apart."""
    files.write_json(tmp_path / "settings.json", {**VERSION_1, "bind_chosen": is_chosen})
    address = ip_address("10.10.10.101")
    state = State(tmp_path)
    assert state.settings.bind == (address if is_chosen else None)
    assert state.settings.allow == ("tcp/22",)
    assert state.bind == state.advertised == address
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"], "reading changes nothing"

    state.save_settings(replace(state.settings, allow=()))
    state = State(tmp_path)
    assert state.bind == address
    assert json.loads((tmp_path / "settings.json").read_bytes()) == {
        **{name: value for name, value in VERSION_1.items() if name != "bind_chosen"},
        "version": 2,
        "allow": [],
        "bind": str(address) if is_chosen else None,
    }


def test_address_found_after_upgrade_counts(tmp_path: Path) -> None:
    """A host with settings of version 1 that finds another address keeps that one, before its settings are saved."""
    files.write_json(tmp_path / "settings.json", VERSION_1)
    state, found = State(tmp_path), ip_address("10.10.10.109")
    state.save_found_bind(found)
    assert state.bind == State(tmp_path).bind == found
    state.save_settings(state.settings)
    assert State(tmp_path).bind == found


def test_found_address_is_no_setting(tmp_path: Path) -> None:
    """A found address is kept apart from what was chosen."""
    state, found, chosen = State(tmp_path), ip_address("10.10.10.101"), ip_address("10.10.10.102")
    state.save_found_bind(found)
    state.save_settings(Settings(name="barge1"))
    assert (State(tmp_path).settings.bind, State(tmp_path).bind) == (None, found)
    state.save_settings(Settings(name="barge1", bind=chosen))
    assert state.bind == chosen
    state.save_settings(Settings(name="barge1", advertise=chosen))
    assert (state.bind, state.advertised) == (found, chosen)


@pytest.mark.parametrize("content", ["{", "[]", '{"address": "barge1"}', "{}"])
def test_damaged_underlay_file_is_named(tmp_path: Path, content: str) -> None:
    """A damaged or missing underlay.json is named in the error."""
    state = State(tmp_path)
    state.save_settings(Settings(name="barge1"))
    with pytest.raises(InputError, match=r"underlay\.json is missing"):
        _ = state.bind
    (tmp_path / "underlay.json").write_text(content)
    with pytest.raises(InputError, match=r"underlay\.json is damaged"):
        _ = state.bind
