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

from meshd import files, keys
from meshd.endpoint import Endpoint
from meshd.errors import InputError, MeshdError
from meshd.gossip.responder import merge_tombstones
from meshd.mesh.model import FORMER, VERSION, Host, Revocation, Tombstone
from meshd.mesh.records import MAX_SEQ
from meshd.mesh.roster import Roster
from meshd.mesh.tombstones import Tombstones, dead, grave, of_leaving
from meshd.state.claim import LAST, USED_UP, NumbersError, ended, endpoint, publish, refresh
from meshd.state.directory import _OURS, ASIDE, Claim, State
from meshd.state.settings import Settings
from tests.conftest import GOLDEN, MESH, certificate, delegated, delegation, public_key, record, seed


def test_roster_round_trip(state: State) -> None:
    """The roster survives the way to disk and back."""
    roster = Roster(
        {"barge2": record(2, seq=7), "barge4": record(4, by=delegated("barge4", delegation()))},
        grave("barge3", Tombstone(4, public_key("barge3"), forgotten=b"proof")),
        revoked={9: Revocation(9, "barge5", b"signature"), 8: Revocation(8, "b", b"s", b"\x05\x00", VERSION)},
        owners={"barge6": certificate("barge6"), "barge7": certificate("barge7", version=FORMER)},
    )
    state.save_roster(roster)
    assert State(state.directory).roster() == roster


VERSION_2 = ["527c77a", "d164600"]


@pytest.fixture(params=VERSION_2)
def former(request: pytest.FixtureRequest, tmp_path: Path) -> State:
    """The state directory of a host of version 2, as these commits wrote it."""
    written = json.loads((GOLDEN / "version-2" / f"{request.param}.json").read_text())
    for name, content in written["files"].items():
        files.write_json(tmp_path / name, content)
    state = State(tmp_path)
    state.save_authority(MESH.trust.authority)
    keys.save_key(tmp_path / "identity.key", seed("identity of barge1"))
    return state


def test_state_of_version_2_is_read(former: State) -> None:
    """Hosts, tombstones, owners, claim and certificate of version 2 are those that version 2 wrote."""
    known = former.roster()
    by_delegation = delegated("barge6", delegation(version=FORMER))
    assert known.hosts == {
        "barge2": record(2, seq=3, version=FORMER),
        "barge6": record(6, by=by_delegation, version=FORMER),
    }
    assert set(known.gone) == {"barge3", "barge4", "barge7"}
    assert known.gone["barge3"] == grave("barge3", of_leaving(record(3, seq=9, leaving=True, version=FORMER)))["barge3"]
    assert [(t.seq, t.identity) for t in known.gone["barge4"].values()] == [(5, b"")]
    assert set(known.revoked) == {99}
    told = known.all_tombstones
    assert set(told.proved(MESH).gone) == {"barge3", "barge4"}, "the proofs hold"
    assert told.proved(MESH).revoked == told.revoked
    assert told.proved(MESH).owners == told.owners
    assert all(owner == certificate("barge8", version=FORMER) for owner in known.owners.values())
    assert former.certificate.version == former.certificate.delegation.version == FORMER  # type: ignore[union-attr]
    claim = former.claim()
    assert claim is not None
    assert claim.record.certificate == former.certificate
    MESH.trust.check("barge1", claim.record)


def test_state_of_version_2_is_kept_bit_by_bit(former: State) -> None:
    """What version 2 signed is written again as it was, and told to others as it was."""
    known = former.roster()
    before = json.loads((former.directory / "hosts.json").read_bytes())
    former.save_roster(known)
    after = json.loads((former.directory / "hosts.json").read_bytes())
    assert (after["hosts"], after["revoked"]) == (before["hosts"], before["revoked"])
    assert former.roster() == known
    former.save_certificate(former.certificate)
    assert State(former.directory).certificate == former.certificate


def test_upgraded_host_publishes_version_3_once(former: State) -> None:
    """The first record after an upgrade is of version 3, with the certificate that the host has; then it stays."""
    claim = former.claim()
    assert claim is not None
    upgraded = refresh(former, claim, former.roster())
    assert (upgraded.record.version, upgraded.record.certificate) == (VERSION, former.certificate)
    assert upgraded.record.seq > claim.record.seq
    MESH.trust.check("barge1", upgraded.record)
    assert refresh(State(former.directory), upgraded, former.roster()) == upgraded


def test_publish_raises_seq_only_on_change(state: State) -> None:
    """The sequence number grows if, and only if, the record changes."""
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


def test_publish_signs_and_renews_certificate(state: State) -> None:
    """A published record is signed, and a new certificate is published."""
    subnet, endpoint = record(1).subnet, record(1).endpoint
    first = publish(state, state.claim(), subnet=subnet, endpoint=endpoint, settled=True).record
    MESH.trust.check("barge1", first)
    state.save_certificate(certificate("barge1", serial=99))
    second = publish(state, state.claim(), subnet=subnet, endpoint=endpoint, settled=True).record
    MESH.trust.check("barge1", second)
    assert second.seq > first.seq
    assert second.certificate.serial == 99


def test_publish_seq_survives_clock_going_back(state: State) -> None:
    """The sequence number grows although the clock has gone back."""
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


def test_greatest_number_is_no_exception(state: State) -> None:
    """Where the numbers end the record stays as it is, and the host says so; it can still say goodbye."""
    subnet = record(1).subnet
    claim = publish(state, state.claim(), subnet=subnet, endpoint=endpoint(state), settled=True, beyond=LAST - 1)
    assert claim.record.seq == LAST
    with pytest.raises(NumbersError, match="meshd leave --force"):
        publish(state, claim, subnet=record(2).subnet, endpoint=endpoint(state), settled=True)
    (state.directory / "wireguard.key").unlink()
    assert refresh(State(state.directory), claim, Roster()) == claim
    beyond = replace(dead(replace(claim.record, public_key=public_key("earlier"))), forgotten=b"f")
    assert ended(Host("barge1", claim.record), Roster(gone=grave("barge1", beyond)), 0) == USED_UP
    last = publish(state, claim, subnet=subnet, endpoint=endpoint(state), settled=True, leaving=True)
    assert last.record.seq == MAX_SEQ - 1


def test_renewed_outdoes_tombstone_of_earlier_host_only(state: State) -> None:
    """The record outdoes the tombstone of an earlier host of the name; a tombstone for this host ends it."""
    claim = publish(state, state.claim(), subnet=record(1).subnet, endpoint=endpoint(state), settled=True)
    own, far = claim.record, 2**40
    earlier = of_leaving(record(1, seq=far, key="earlier", leaving=True))
    assert merge_tombstones(state, Tombstones(grave("barge1", earlier)))
    known = state.roster()
    assert ended(Host("barge1", own), known, time.time()) == ""
    assert refresh(state, claim, known).record.seq == far + 1
    again = state.claim()
    assert again is not None
    mine = Tombstone(far + 1, own.public_key, forgotten=b"f")
    assert "has forgotten this host" in ended(Host("barge1", own), Roster(gone=grave("barge1", mine)), 0)
    assert refresh(state, again, Roster(gone=grave("barge1", mine))) == again


def test_state_files_have_mode_0600(state: State) -> None:
    """Only root can read the files of the state directory."""
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
def test_damaged_state_file_is_named_and_kept(state: State, name: str, content: bytes) -> None:
    """A damaged file is named in the error and not changed."""
    path = state.directory / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=name):
        DAMAGE[name](State(state.directory))
    assert path.read_bytes() == content


def test_hosts_that_are_too_large_to_read_stop_nothing(state: State) -> None:
    """The file is as if it were not there. What is written next sets it aside, and that is said until it is removed."""
    state.save_roster(Roster({"barge2": record(2)}))
    assert state.set_aside() == []
    path, aside = state.directory / "hosts.json", state.directory / ASIDE
    with path.open("r+b") as file:
        file.truncate(files.LIMIT + 1)
    assert State(state.directory).roster() == Roster()
    assert path.exists(), "who only reads writes nothing"
    (text,) = state.set_aside()
    assert text.startswith(f"{path} is larger than 16777216 bytes, and is not read: ")
    state.save_roster(Roster({"barge3": record(3)}))
    assert state.roster().hosts == {"barge3": record(3)}
    assert aside.stat().st_size == files.LIMIT + 1
    assert state.set_aside()[0].startswith(f"{aside} is larger")
    aside.unlink()
    assert state.set_aside() == []
    assert ASIDE in _OURS


def test_write_failure_keeps_old_file(state: State) -> None:
    """A write that fails half-way leaves the old file unchanged."""
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


def test_write_syncs_before_rename(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is synced before it is renamed, and then its directory is.

    The calls are watched and made: no power cut is at hand.
    """
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


def test_missing_state_names_next_step(tmp_path: Path) -> None:
    """The error for a missing state names `init` and `join`."""
    with pytest.raises(InputError, match="run 'meshd init' or 'meshd join ADDRESS' first"):
        _ = State(tmp_path).settings


def test_lock_excludes_others(state: State) -> None:
    """The lock excludes others, and the error says who holds it."""
    with state.lock(), pytest.raises(MeshdError, match="another meshd"), State(state.directory).lock(timeout=0.05):
        pass


def test_agent_pid_is_known_by_lock(state: State) -> None:
    """A daemon counts as running by its lock and not by its file."""
    assert state.agent_pid() is None
    with state.agent_lock():
        assert state.agent_pid() == os.getpid()
        with pytest.raises(MeshdError, match="already running"), state.agent_lock():
            pass
    assert (state.directory / "agent.pid").exists()
    assert state.agent_pid() is None


def test_agent_lock_waits_for_reader_of_pid(state: State) -> None:
    """A command that looks for the daemon does not keep it from starting."""
    with state.agent_lock():
        pass
    with (state.directory / "agent.pid").open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.1, asking.close).start()
        with state.agent_lock():
            assert state.agent_pid() == os.getpid()


def test_forget_everything_keeps_foreign_files(state: State) -> None:
    """Files that are not meshd's stay when the state is removed."""
    (state.directory / "notes.txt").write_text("mine")
    state.forget_everything()
    assert [path.name for path in state.directory.iterdir()] == ["notes.txt"]


def test_forget_everything_removes_settings_last(tmp_path: Path) -> None:
    """The settings are removed last, so that the same command, run again, finds a host that was set up."""
    for name in _OURS - {"settings.json"}:
        state = State(tmp_path / name)
        (state.directory / name).mkdir(parents=True)  # what cannot be unlinked
        (state.directory / "settings.json").touch()
        with pytest.raises(OSError, match=name):
            state.forget_everything()
        assert state.exists, name


def test_state_files_are_sorted_json(state: State) -> None:
    """State files are JSON with sorted keys."""
    files.write_json(state.directory / "hosts.json", {"b": 1, "a": 2})
    assert list(json.loads((state.directory / "hosts.json").read_bytes())) == ["a", "b"]


def test_own_leaving_record_does_not_bury_own_host(state: State) -> None:
    """Serf hands a user event to its sender as well: a host's own leaving record does not end it early."""
    subnet = record(1).subnet
    publish(state, state.claim(), subnet=subnet, endpoint=endpoint(state), settled=True)
    last = publish(state, state.claim(), subnet=subnet, endpoint=endpoint(state), settled=True, leaving=True).record
    assert not merge_tombstones(state, Tombstones(grave("barge1", of_leaving(last))))
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


def test_records_of_older_version_stop_no_daemon(state: State) -> None:
    """Endpoints that an older version of meshd took do not make a file count as damaged."""
    mapped = Endpoint(ip_address("::ffff:10.10.10.103"), 51820)
    own = Claim(record(1, endpoint=mapped), settled=True)
    state.save_claim(own)
    assert state.claim() == own, "the own record keeps its subnet and its number"
    state.save_roster(Roster({"barge2": record(2), "barge3": record(3, endpoint=mapped)}))
    known = State(state.directory).roster()
    assert known.hosts == {"barge2": record(2)}
    assert known.dropped == {"barge3": record(3, endpoint=mapped)}
    state.save_roster(known)
    assert state.roster() == known, "it is not lost before anybody is told"
    good = {"barge2": Endpoint(ip_address("10.10.10.102"), 7946)}
    state.save_contacts({**good, "barge3": mapped})
    assert state.contacts() == good


def test_tombstone_with_odd_endpoint_keeps_its_proof(state: State) -> None:
    """The goodbye of a host whose endpoint counts no more is still proved, and passed on."""
    leaving = record(3, endpoint=Endpoint(ip_address("::ffff:10.10.10.103"), 51820), leaving=True)
    told = Tombstones(grave("barge3", of_leaving(leaving)))
    assert merge_tombstones(state, told)
    assert State(state.directory).roster().all_tombstones == told
