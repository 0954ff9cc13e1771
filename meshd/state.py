"""The state directory: one place, mode 0700, that holds all that a host must remember."""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, TypeVar

from meshd import config, files, identity
from meshd.config import Settings
from meshd.errors import InputError, MeshdError
from meshd.membership import Roster
from meshd.model import Endpoint, Goodbye, Record

DEFAULT = Path("/var/lib/meshd")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Claim:
    """The own record as it was last published. `settled` says that the mesh has no other claim on the subnet."""

    record: Record
    settled: bool = False


class State:
    """The files of one mesh on one host. Reading raises InputError for what is damaged, and names the file."""

    def __init__(self, directory: Path = DEFAULT) -> None:
        self.directory = directory.absolute()
        self.serf_config = self.directory / "serf.json"
        # A place for a person's own Serf configuration (log_level, statsite_addr, …): *.json, read after serf.json.
        self.serf_extra = self.directory / "serf.d"
        self.serf_log = self.directory / "serf.log"
        self.agent_log = self.directory / "agent.log"
        self.socket = self.directory / "agent.sock"

    @property
    def exists(self) -> bool:
        """Whether a host was set up here."""
        return (self.directory / "settings.json").exists()

    @cached_property
    def settings(self) -> Settings:
        path = self.directory / "settings.json"
        values = files.read_json(path)
        if values is None:
            raise InputError(f"no mesh is set up in {self.directory}: run 'meshd init' or 'meshd join ADDRESS' first")
        try:
            return config.from_json(values)
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}") from None

    @property
    def is_down(self) -> bool:
        """Whether a person took the mesh down here: nobody but `meshd up` brings it back, no event and no boot."""
        return (self.directory / "down").exists()

    def mark_down(self) -> None:
        files.write(self.directory / "down", b"'meshd up' starts it\n")

    def mark_up(self) -> None:
        (self.directory / "down").unlink(missing_ok=True)

    def save_settings(self, settings: Settings) -> None:
        files.write_json(self.directory / "settings.json", config.to_json(settings))
        self.__dict__.pop("settings", None)

    @cached_property
    def wireguard_key(self) -> bytes:
        """The private key; it is made on first use."""
        return identity.key(self.directory / "wireguard.key")

    @cached_property
    def gossip_key(self) -> bytes:
        return identity.key(self.directory / "gossip.key")

    def save_gossip_key(self, key: bytes) -> None:
        identity.save_key(self.directory / "gossip.key", key)
        self.__dict__.pop("gossip_key", None)

    @cached_property
    def rpc_key(self) -> str:
        """What authenticates meshd to its own Serf agent."""
        return identity.key(self.directory / "rpc.key").hex()

    def claim(self) -> Claim | None:
        values = self._json("claim.json")
        return None if values is None else self._guard("claim.json", lambda: _claim(values))

    def save_claim(self, claim: Claim) -> None:
        files.write_json(
            self.directory / "claim.json", {"record": _record_json(claim.record), "settled": claim.settled}
        )

    def publish(self, *, subnet: IPv4Network, endpoint: Endpoint, settled: bool, leaving: bool = False) -> Claim:
        """Give the claim to publish, kept on disk first. Its sequence number grows exactly when the record changes.

        A number never goes back: it survives reboots in the file, and where the file was lost it starts from the
        clock, which is beyond what one record a second ever reached.
        """
        last = self.claim()
        seq = last.record.seq if last else 0
        record = Record(identity.public_key(self.wireguard_key), subnet, endpoint, seq, leaving)
        if last is None or record != last.record:
            record = Record(record.public_key, subnet, endpoint, max(seq + 1, int(time.time())), leaving)
        claim = Claim(record, settled)
        if claim != last:
            self.save_claim(claim)
        return claim

    def roster(self) -> Roster:
        """Give the hosts and goodbyes that this host knows of."""
        values = self._json("hosts.json") or {"hosts": {}, "gone": {}}
        return self._guard("hosts.json", lambda: _roster(values))

    def save_roster(self, roster: Roster) -> None:
        files.write_json(
            self.directory / "hosts.json",
            {
                "hosts": {name: _record_json(record) for name, record in roster.hosts.items()},
                "gone": {name: {"seq": g.seq, "public_key": g.public_key} for name, g in roster.gone.items()},
            },
        )

    def contacts(self) -> dict[str, Endpoint]:
        """Give the gossip addresses of the hosts that this one knew: name -> address, to find them again."""
        values = self._json("contacts.json") or {}
        return self._guard("contacts.json", lambda: {str(n): Endpoint.parse(e) for n, e in values.items()})

    def save_contacts(self, contacts: Mapping[str, Endpoint]) -> None:
        files.write_json(self.directory / "contacts.json", {name: str(e) for name, e in contacts.items()})

    def originals(self) -> dict[str, str]:
        """Give the sysctls as they were before meshd changed them: path below /proc/sys -> value."""
        values = self._json("originals.json") or {}
        return self._guard("originals.json", lambda: {path: str.strip(value) for path, value in values.items()})

    def save_originals(self, originals: dict[str, str]) -> None:
        files.write_json(self.directory / "originals.json", originals)

    @contextmanager
    def lock(self, timeout: float = 60) -> Iterator[None]:
        """Hold the lock that every pass takes, whoever runs it. Raises MeshdError after `timeout` seconds."""
        with self._locked("lock", timeout, "another meshd is changing this host for more than a minute"):
            yield

    @contextmanager
    def serf_lock(self) -> Iterator[None]:
        """Hold the lock of whoever starts Serf, so that daemon and command never start two."""
        with self._locked("serf.lock", 20, "another meshd is starting the Serf agent for more than 20 s"):
            yield

    @contextmanager
    def agent_lock(self) -> Iterator[None]:
        """Hold the lock of the one daemon, its process id inside of the file. Raises MeshdError if one runs."""
        with self._locked("agent.pid", 0, "meshd agent is already running for this state directory") as descriptor:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield

    def agent_pid(self) -> int | None:
        """Give the running daemon's process id: the file counts only while its lock is held."""
        try:
            with (self.directory / "agent.pid").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            content = (files.read(self.directory / "agent.pid") or b"").strip()
            return int(content) if content.isdigit() else None
        except OSError:
            return None
        return None

    def hint(self, text: str) -> bool:
        """Wake the daemon; False if none listens."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            try:
                client.sendto(text.encode()[:512], str(self.socket))
            except BlockingIOError:
                return True  # its queue is full of hints already
            except OSError:
                return False
        return True

    def forget_everything(self) -> None:
        """Remove meshd's files, and the directory if nothing else is in it."""
        for path in self.directory.glob("*"):
            if path.name in _OURS or path.name.startswith("."):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.directory.rmdir()

    @contextmanager
    def _locked(self, name: str, timeout: float, otherwise: str) -> Iterator[int]:
        path = self.directory / name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MeshdError(f"opening {path}: {error.strerror}") from error
        try:
            deadline = time.monotonic() + timeout
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise MeshdError(otherwise) from None
                    time.sleep(0.01)
            yield descriptor
        finally:
            os.close(descriptor)

    def _json(self, name: str) -> dict[str, Any] | None:
        return files.read_json(self.directory / name)

    def _guard(self, name: str, reader: Callable[[], T]) -> T:
        try:
            return reader()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self.directory / name} is damaged: {error!r}; remove it or restore it") from None


# Every file that this class, or what it starts, writes here.
_OURS = {
    *("settings.json", "claim.json", "contacts.json", "hosts.json", "originals.json", "serf.json"),
    *(
        "wireguard.key",
        "gossip.key",
        "rpc.key",
        "serf.log",
        "agent.log",
        "agent.pid",
        "agent.sock",
        "lock",
        "serf.lock",
        "down",
    ),
}


def _record_json(record: Record) -> dict[str, Any]:
    return {
        "public_key": record.public_key,
        "subnet": str(record.subnet),
        "endpoint": str(record.endpoint),
        "seq": record.seq,
        "leaving": record.leaving,
    }


def _record(values: dict[str, Any]) -> Record:
    return Record(
        str(values["public_key"]),
        IPv4Network(values["subnet"]),
        Endpoint.parse(values["endpoint"]),
        int(values["seq"]),
        bool(values["leaving"]),
    )


def _claim(values: dict[str, Any]) -> Claim:
    return Claim(_record(values["record"]), bool(values["settled"]))


def _roster(values: dict[str, Any]) -> Roster:
    return Roster(
        {str(name): _record(record) for name, record in values["hosts"].items()},
        {str(name): Goodbye(int(g["seq"]), str(g["public_key"])) for name, g in values["gone"].items()},
    )
