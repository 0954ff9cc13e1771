"""The state directory: one place, mode 0700, that holds all that a host must remember."""

import base64
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

from meshd import files, keys
from meshd.endpoint import Endpoint, IPAddress
from meshd.errors import InputError
from meshd.mesh.certificates import Trust
from meshd.mesh.membership import usable_contacts
from meshd.mesh.model import FORMER, VERSION, Certificate, Record, Revocation, Tombstone
from meshd.mesh.records import RecordError, from_wire, pack_certificate, read_certificate, to_wire
from meshd.mesh.roster import Roster
from meshd.mesh.terms import Mesh
from meshd.mesh.tombstones import pack_revocation, proof, read_proof, read_revocation
from meshd.mesh.twins import Twins
from meshd.state import locks
from meshd.state import settings as config
from meshd.state.settings import Settings

DEFAULT = Path("/var/lib/meshd")
T = TypeVar("T")
# What becomes of a hosts.json that is too large to be read.
ASIDE = "hosts.json.too-large"
TOO_LARGE = (
    "{path} is larger than {limit} bytes, and is not read: this host learns from the others again who is a host. Look "
    "what filled it, then remove it"
)


@dataclass(frozen=True, slots=True)
class Claim:
    """The own record as it was last published. `settled` says that the mesh has no other claim on the subnet.

    `moved` is when its endpoint's address became another one, in Unix time; 0 for never.
    """

    record: Record
    settled: bool = False
    moved: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """An underlay address and the link that has it, the empty string where that is not known."""

    address: IPAddress
    link: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """Where meshd has found this host on the underlay, and its home: where it goes back to when it can."""

    place: Place
    home: Place


class State:
    """The files of one mesh on one host. Reading raises InputError for what is damaged, and names the file."""

    def __init__(self, directory: Path = DEFAULT) -> None:
        self.directory = directory.absolute()
        self.serf_config = self.directory / "serf.json"
        # A place for a user's own Serf configuration (log_level, statsite_addr, …): *.json, read after serf.json.
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
        """Whether a user took the mesh down here: nobody but `meshd up` brings it back, no event and no boot."""
        return (self.directory / "down").exists()

    def mark_down(self) -> None:
        files.write(self.directory / "down", b"'meshd up' starts it\n")

    def mark_up(self) -> None:
        (self.directory / "down").unlink(missing_ok=True)

    def reload_settings(self) -> None:
        """Read the settings again when they are asked for: a command may have changed them."""
        self.__dict__.pop("settings", None)
        self.__dict__.pop("bind", None)

    def save_settings(self, settings: Settings) -> None:
        found = self.found()
        if found is not None and not (self.directory / "underlay.json").exists():
            self.save_found(found)  # version 1 of the settings, which are overwritten now, kept it
        files.write_json(self.directory / "settings.json", config.to_json(settings))
        self.reload_settings()

    @cached_property
    def bind(self) -> IPAddress:
        """This host's underlay address: the chosen one, or the one that was found last."""
        found = self.settings.bind or self.found_bind()
        if found is None:
            path = self.directory / "underlay.json"
            raise InputError(f"{path} is missing: restore it, or start the daemon, which finds the address again")
        return found

    @property
    def advertised(self) -> IPAddress:
        """The address at which the others reach this host."""
        return self.settings.advertise or self.bind

    def found(self) -> Found | None:
        """Return where meshd has found this host by itself, None if it has not yet."""
        values = self._json("underlay.json")
        if values is not None:
            return self._guard("underlay.json", lambda: _found(values))
        address = config.found_in_version_1(self._json("settings.json") or {})
        return Found(Place(address), Place(address)) if address is not None else None

    def save_found(self, found: Found) -> None:
        home = {"home": _place_values(found.home)} if found.home != found.place else {}
        files.write_json(self.directory / "underlay.json", {**_place_values(found.place), **home})
        self.__dict__.pop("bind", None)

    def found_bind(self) -> IPAddress | None:
        """Return the underlay address that meshd has found by itself, None if it has found none yet."""
        found = self.found()
        return found.place.address if found is not None else None

    def save_found_bind(self, address: IPAddress, link: str = "") -> None:
        """Keep the address at which this host is at home."""
        place = Place(address, link)
        self.save_found(Found(place, place))

    @cached_property
    def wireguard_key(self) -> bytes:
        """The private key; it is made on first use."""
        return keys.key(self.directory / "wireguard.key")

    @cached_property
    def gossip_key(self) -> bytes:
        return keys.key(self.directory / "gossip.key")

    def save_gossip_key(self, key: bytes) -> None:
        keys.save_key(self.directory / "gossip.key", key)
        self.__dict__.pop("gossip_key", None)

    @property
    def rpc_key(self) -> str:
        """The secret that authenticates meshd to its own Serf agent: whoever starts the agent makes a new one."""
        return keys.key(self.directory / "rpc.key").hex()

    def renew_rpc_key(self) -> None:
        keys.save_key(self.directory / "rpc.key", keys.new_key())

    @cached_property
    def mesh(self) -> Mesh:
        """What this host knows of its mesh. Raises InputError if the authority's public key is not there."""
        settings, path = self.settings, self.directory / "authority.pub"
        authority = keys.saved_key(path)
        if authority is None:
            raise InputError(f"{path} is missing: it is the mesh's authority, the same on every host")
        return Mesh(settings.overlay, settings.subnet_length, Trust(settings.mesh, authority))

    def save_authority(self, public_key: bytes) -> None:
        keys.save_key(self.directory / "authority.pub", public_key)
        self.__dict__.pop("mesh", None)

    @property
    def authority_key(self) -> bytes | None:
        """The authority's seed, on the host that holds it."""
        return keys.saved_key(self.directory / "authority.key")

    @property
    def authority_exported(self) -> bool:
        """Whether someone has a copy of the authority besides this host."""
        return (self.directory / "authority.exported").exists()

    def mark_exported(self) -> None:
        files.write(self.directory / "authority.exported", b"")

    def save_authority_key(self, seed: bytes) -> None:
        keys.save_key(self.directory / "authority.key", seed)

    @property
    def identity_key(self) -> bytes:
        """The seed of this host's identity. Raises InputError if it is not there."""
        path = self.directory / "identity.key"
        seed = keys.saved_key(path)
        if seed is None:
            raise InputError(f"{path} is missing: run 'meshd leave --force', and join with a new invitation")
        return seed

    @property
    def certificate(self) -> Certificate:
        """This host's certificate. Raises InputError if it is not there or damaged."""
        values = self._json("certificate.json")
        if values is None:
            raise InputError(f"{self.directory / 'certificate.json'} is missing: join with a new invitation")
        return self._guard("certificate.json", lambda: _certificate(values))

    def save_certificate(self, certificate: Certificate, seed: bytes | None = None) -> None:
        """Keep a certificate, and the seed of its identity if that is a new one."""
        if seed is not None:
            keys.save_key(self.directory / "identity.key", seed)
        files.write_json(self.directory / "certificate.json", _certificate_values(certificate))

    def issued(self) -> dict[str, dict[str, Any]]:
        """Return what this host's authority has signed: serial -> name, expiry, and the identity if it is known."""
        values = self._json("issued.json") or {}
        return self._guard("issued.json", lambda: {str(serial): dict(entry) for serial, entry in values.items()})

    def save_issued(self, issued: Mapping[str, Mapping[str, Any]]) -> None:
        files.write_json(self.directory / "issued.json", issued)

    def claim(self) -> Claim | None:
        values = self._json("claim.json")
        if values is None:
            return None
        return self._guard(
            "claim.json",
            lambda: Claim(self._record(values["record"]), bool(values["settled"]), int(values.get("moved", 0))),
        )

    def save_claim(self, claim: Claim) -> None:
        values = {"record": _text(to_wire(claim.record)), "settled": claim.settled, "moved": claim.moved}
        files.write_json(self.directory / "claim.json", values)

    def roster(self) -> Roster:
        """Return the hosts and tombstones that this host knows of.

        A file that is too large to be read tells of none: they are learnt again from the others.
        """
        try:
            values = self._json("hosts.json") or {"hosts": {}, "gone": {}, "revoked": {}}
        except files.TooLargeError:
            return Roster()
        return self._guard("hosts.json", lambda: self._roster(values))

    def _roster(self, values: dict[str, Any]) -> Roster:
        saved = self._hosts(values["hosts"])
        dropped = {name: record for name, record in saved.items() if self.mesh.misplaced(record)}
        return Roster(
            {name: record for name, record in saved.items() if name not in dropped},
            {str(name): self._graves(entry) for name, entry in values["gone"].items()},
            revoked={int(serial): _revocation(int(serial), r) for serial, r in values["revoked"].items()},
            dropped=dropped,
            owners={str(name): _owner(entry) for name, entry in values.get("owners", {}).items()},
        )

    def _hosts(self, values: Mapping[Any, Any]) -> dict[str, Record]:
        """Return the records that this version can read. Others are learnt again."""
        hosts = {}
        for name, text in values.items():
            with suppress(RecordError):
                hosts[str(name)] = self._record(text)
        return hosts

    def _graves(self, entry: Any) -> dict[bytes, Tombstone]:
        # Up to 0.9 there was one tombstone for a name.
        found = [self._tombstone(g) for g in (entry if isinstance(entry, list) else [entry])]
        return {tombstone.identity: tombstone for tombstone in found}

    def _tombstone(self, values: Mapping[str, Any]) -> Tombstone:
        seq, public_key, raw = int(values["seq"]), str(values["public_key"]), _bytes(values["proof"])
        try:
            return read_proof(seq, public_key, raw, self.mesh)
        except RecordError:
            # It counts here all the same.
            identity, by = _bytes(values.get("identity", "")), values.get("certificate")
            certificate = _certificate(by) if by is not None else None
            return Tombstone(seq, public_key, identity=identity, certificate=certificate)

    def _record(self, text: str) -> Record:
        return from_wire(_bytes(text), self.settings.overlay, self.settings.subnet_length)

    def save_roster(self, roster: Roster) -> None:
        """Keep the hosts and tombstones. A file that is too large to be read is set aside before."""
        path = self.directory / "hosts.json"
        if files.is_too_large(path):
            files.set_aside(path, self.directory / ASIDE)
        files.write_json(
            self.directory / "hosts.json",
            {
                "hosts": {n: _text(to_wire(record)) for n, record in {**roster.dropped, **roster.hosts}.items()},
                "gone": {
                    name: [_tombstone_values(tombstone) for tombstone in ones.values()]
                    for name, ones in roster.gone.items()
                },
                "owners": {name: _certificate_values(c) for name, c in roster.owners.items()},
                "revoked": {str(serial): _revocation_values(r) for serial, r in roster.revoked.items()},
            },
        )

    def set_aside(self) -> list[str]:
        """Return what is wrong with a file of hosts that was, or is, too large to be read; nothing if there is none."""
        names = [name for name in ("hosts.json", ASIDE) if files.is_too_large(self.directory / name)]
        return [TOO_LARGE.format(path=self.directory / names[0], limit=files.LIMIT)] if names else []

    def contacts(self) -> dict[str, Endpoint]:
        """Return the gossip addresses of the hosts that this one knew, to find them again, by name."""
        return usable_contacts(self.saved_contacts(), self.settings.overlay)

    def saved_contacts(self) -> dict[str, Endpoint]:
        """Return the contacts as they are on disk, with those that are not usable."""
        values = self._json("contacts.json") or {}
        return self._guard("contacts.json", lambda: {str(n): Endpoint.parse(e) for n, e in values.items()})

    def save_contacts(self, contacts: Mapping[str, Endpoint]) -> None:
        files.write_json(self.directory / "contacts.json", {name: str(e) for name, e in contacts.items()})

    def twins(self) -> dict[str, Twins]:
        """Return the hosts that run on two machines at once, as far as the daemon knows, by name."""
        values = self._json("twins.json") or {}
        read = self._guard("twins.json", lambda: [Twins.read(str(name), str(text)) for name, text in values.items()])
        return {twins.name: twins for twins in read if twins is not None}

    def save_twins(self, twins: Mapping[str, Twins]) -> None:
        files.write_json(self.directory / "twins.json", {name: one.says for name, one in twins.items()})

    def originals(self) -> dict[str, str]:
        """Return the sysctls as they were before meshd changed them: path below /proc/sys -> value."""
        values = self._json("originals.json") or {}
        return self._guard("originals.json", lambda: {path: str.strip(value) for path, value in values.items()})

    def save_originals(self, originals: dict[str, str]) -> None:
        files.write_json(self.directory / "originals.json", originals)

    def lock(self, timeout: float = 60) -> AbstractContextManager[int]:
        """Hold the lock of whoever changes this host. Raises MeshdError after `timeout` seconds."""
        busy = "another meshd is changing this host for more than a minute"
        return locks.held(self.directory / "lock", timeout, busy)

    def serf_lock(self) -> AbstractContextManager[int]:
        """Hold the lock of whoever starts Serf, so that daemon and command never start two."""
        busy = "another meshd is starting the Serf agent for more than 20 s"
        return locks.held(self.directory / "serf.lock", 20, busy)

    @contextmanager
    def agent_lock(self) -> Iterator[None]:
        """Hold the lock of the one daemon, its process id inside the file. Raises MeshdError if one runs."""
        # Not at once: asking for the process id holds the lock for a moment too, and the start is watched that way.
        busy = "meshd agent is already running for this state directory"
        with locks.held(self.directory / "agent.pid", 0.5, busy) as descriptor:
            locks.sign(descriptor)
            yield

    def agent_pid(self) -> int | None:
        """Return the running daemon's process id: the file counts only while its lock is held."""
        return locks.holder(self.directory / "agent.pid")

    def forget_everything(self) -> None:
        """Remove meshd's files, and the directory if nothing else is in it."""
        # The settings last: until they go, a command that was interrupted can be run again.
        for path in sorted(self.directory.glob("*"), key=lambda path: path.name == "settings.json"):
            if path.name in _OURS or path.name.startswith("."):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.directory.rmdir()

    def _json(self, name: str) -> dict[str, Any] | None:
        return files.read_json(self.directory / name)

    def _guard(self, name: str, reader: Callable[[], T]) -> T:
        try:
            return reader()
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecordError) as error:
            raise InputError(f"{self.directory / name} is damaged: {error!r}; remove it or restore it") from None


# Every file that this class, or what it starts, writes here.
_OURS = {
    *("settings.json", "claim.json", "contacts.json", "hosts.json", "originals.json", "serf.json"),
    *("underlay.json", "machine", "twins.json", ASIDE),
    *("authority.pub", "authority.key", "authority.exported", "identity.key", "certificate.json"),
    "issued.json",
    *("wireguard.key", "gossip.key", "rpc.key", "serf.log", "agent.log"),
    *("agent.pid", "agent.sock", "lock", "serf.lock", "down"),
}


def _place_values(place: Place) -> dict[str, str]:
    return {"address": str(place.address), "link": place.link}


def _found(values: Mapping[str, Any]) -> Found:
    place = _place(values)
    return Found(place, _place(values["home"]) if "home" in values else place)


def _place(values: Mapping[str, Any]) -> Place:
    # Earlier versions kept the address alone.
    return Place(ip_address(str(values["address"])), str(values.get("link", "")))


def _tombstone_values(tombstone: Tombstone) -> dict[str, Any]:
    values = {
        "seq": tombstone.seq,
        "public_key": tombstone.public_key,
        "proof": _text(proof(tombstone)),
        "identity": _text(tombstone.identity),
    }
    if tombstone.certificate is None:
        return values
    return {**values, "certificate": _certificate_values(tombstone.certificate)}


def _certificate_values(certificate: Certificate) -> dict[str, Any]:
    return {
        "certificate": _text(pack_certificate(certificate)),
        "delegated": certificate.delegation is not None,
        "version": certificate.version,
    }


def _certificate(values: Mapping[str, Any]) -> Certificate:
    """Read what `_certificate_values` returned, and version 2's values, which said nothing of their version."""
    version = int(values.get("version", FORMER))
    return read_certificate(_bytes(values["certificate"]), is_delegated=bool(values["delegated"]), version=version)


def _owner(entry: Any) -> Certificate:
    # Version 2 kept the certificate alone.
    return _certificate(entry if isinstance(entry, dict) else {"certificate": entry, "delegated": False})


def _revocation_values(revocation: Revocation) -> dict[str, Any]:
    if revocation.version < VERSION:
        return {"name": revocation.name, "signature": _text(revocation.signature)}
    return {"name": revocation.name, "packed": _text(pack_revocation(revocation))}


def _revocation(serial: int, values: Mapping[str, Any]) -> Revocation:
    name = str(values["name"])
    if "packed" in values:
        return read_revocation(_bytes(values["packed"]), name)
    return Revocation(serial, name, _bytes(values["signature"]))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
