"""What only the holder of the authority's key can do: invite, confirm, forget and revoke, and hand the key on.

`issued.json` keeps what was signed, so that it can be revoked before it was ever used.
"""

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Network
from typing import Any

from meshd.endpoint import Endpoint
from meshd.errors import InputError
from meshd.mesh import certificates, endings
from meshd.mesh.invitations import Invitation
from meshd.mesh.model import (
    DEFAULT_HOSTS,
    MAX_HOSTS,
    VERSION,
    Certificate,
    Delegation,
    Record,
    Revocation,
    Tombstone,
    identity_serial,
    is_name,
)
from meshd.mesh.records import MAX_PREFIX
from meshd.mesh.roster import Roster
from meshd.mesh.tombstones import dead
from meshd.state.directory import State

EXPORT = "meshd-authority 1"
_FOREVER = 0
# Numbers of records begin with Unix time and grow by one: no clock ever gives this one.
RUNAWAY = 2**40
USED_UP = (
    "{label} is used up: the authority has confirmed {most} by it, and confirms no others. Run 'meshd invite "
    "--reusable --hosts N' for more hosts, and 'meshd revoke {label}' if others than yours come by it"
)


@dataclass(frozen=True, slots=True)
class Terms:
    """What an invitation allows: until when (Unix seconds, 0 for ever), and which subnets if not all."""

    expires: int = _FOREVER
    subnets: tuple[IPv4Network, ...] = ()


def key(state: State) -> bytes:
    """Return the authority's seed. Raises InputError on a host that does not hold it."""
    seed = state.authority_key
    if seed is None:
        raise InputError(
            f"this host does not hold the authority of the mesh {state.settings.mesh!r}: run this on the host where "
            "'meshd init' ran, or bring the authority here ('meshd authority export' there, 'import' here)"
        )
    return seed


def found(state: State, mesh: str, name: str) -> None:
    """Make the authority of a new mesh, and the first certificate, which is this host's."""
    seed, own = certificates.new_seed(), certificates.new_seed()
    state.save_authority_key(seed)
    state.save_authority(certificates.public(seed))
    certificate = _new_certificate(state, name, certificates.public(own), Terms())
    state.save_certificate(certificates.certify(seed, mesh, name, certificate), own)
    _note(state, certificate.serial, name, _FOREVER, certificate.identity)


def invite(state: State, name: str, terms: Terms) -> Invitation:
    """Return an invitation for one host: its name, its identity, and the certificate of both."""
    seed, own = key(state), certificates.new_seed()
    if not is_name(name):
        raise InputError(f"the host name {name!r} is not 1 to 63 letters, digits, dots and dashes")
    _check(state, terms)
    certificate = _new_certificate(state, name, certificates.public(own), terms)
    certificate = certificates.certify(seed, state.settings.mesh, name, certificate)
    _note(state, certificate.serial, name, terms.expires, certificate.identity)
    return _invitation(state, own, name=name, certificate=certificate)


def invite_many(state: State, prefix: str, terms: Terms, hosts: int = DEFAULT_HOSTS) -> Invitation:
    """Return an invitation for so many hosts that come before it expires, and whose names begin with `prefix`."""
    seed, own = key(state), certificates.new_seed()
    if len(prefix) > MAX_PREFIX or (prefix and not is_name(prefix.rstrip("-.") or "-")):
        raise InputError(f"the prefix {prefix!r} is not at most {MAX_PREFIX} letters, digits, dots and dashes")
    if not terms.expires:
        raise InputError("a reusable invitation must expire: pass --ttl")
    if not 1 <= hosts <= MAX_HOSTS:
        raise InputError(f"a reusable invitation is for 1 to {MAX_HOSTS} hosts, not {hosts}: make several")
    _check(state, terms)
    serial = _new_serial(state)
    delegation = Delegation(serial, terms.expires, certificates.public(own), prefix, terms.subnets, hosts=hosts)
    delegation = certificates.delegate(seed, state.settings.mesh, delegation)
    _note(state, serial, label(serial), terms.expires, None)
    return _invitation(state, own, delegation=delegation)


def label(serial: int) -> str:
    """Return the name by which a reusable invitation is revoked."""
    return f"invitation-{serial:x}"


def _check(state: State, terms: Terms) -> None:
    settings = state.settings
    for subnet in terms.subnets:
        if not subnet.subnet_of(settings.overlay) or subnet.prefixlen > settings.subnet_length:
            raise InputError(
                f"{subnet} has no room for a /{settings.subnet_length} of the overlay {settings.overlay}: "
                "no host could have a subnet there"
            )


def _invitation(
    state: State,
    seed: bytes,
    *,
    name: str | None = None,
    certificate: Certificate | None = None,
    delegation: Delegation | None = None,
) -> Invitation:
    settings = state.settings
    return Invitation(
        settings.mesh,
        settings.overlay,
        settings.subnet_length,
        state.gossip_key,
        settings.gossip_port,
        state.mesh.trust.authority,
        seed,
        name,
        certificate,
        delegation,
        (Endpoint(state.advertised, settings.gossip_port),),
    )


def _new_serial(state: State, name: str = "") -> int:
    """Return a serial beyond all earlier ones, whatever the clock says: of two for one name the later counts.

    Another copy of the authority may have given the name out, by a clock that was wrong.
    """
    owner = state.roster().owner(name)
    earlier = [*map(int, state.issued()), owner.serial if owner is not None else 0]
    return max(certificates.new_serial(time.time()), max(earlier) + 1)


def _new_certificate(state: State, name: str, identity: bytes, terms: Terms) -> Certificate:
    """Return the certificate, not signed yet, of an identity that is a member from now on."""
    serial = _new_serial(state, name)
    return Certificate(serial, terms.expires, identity, terms.subnets, since=certificates.since(serial))


def _note(state: State, serial: int, name: str, expires: int, identity: bytes | None, *, by: str | None = None) -> None:
    entry = {"name": name, "expires": expires, "identity": identity.hex() if identity else None, "by": by}
    with state.lock():
        state.save_issued({**state.issued(), str(serial): entry})


def confirm(state: State, name: str, record: Record) -> Certificate | None:
    """Return what the authority gives to a host in place of its certificate; None for one that has it, or without key.

    That is its own certificate for a host that joined by a reusable invitation: what the invitation allowed stays, its
    end does not. A host with a certificate of version 2 gets the same in version 3, once its record says that it can
    read it. Asked again it gives the same one. Whatever it gives, the host is a member since it was noted first. A host
    whose membership has ended gets none, nor does one for which its invitation has no place left.
    """
    seed, former = state.authority_key, record.certificate
    version = min(record.version, VERSION)
    if seed is None or (former.delegation is None and former.version >= version) or _has_ended(state, name, record):
        return None
    if former.delegation is None:
        certificate = replace(former, version=version)
    else:
        serial = _confirmed_serial(state, name, former.identity, former.delegation)
        if serial is None:
            return None
        since = certificates.since(serial)
        certificate = Certificate(
            serial, _FOREVER, former.identity, former.delegation.subnets, since=since, version=version
        )
    # Noted first: a revocation at this moment either finds the note, or is found here.
    if _has_ended(state, name, record):
        return None
    return certificates.certify(seed, state.settings.mesh, name, certificate)


def _has_ended(state: State, name: str, record: Record) -> bool:
    return bool(state.roster().ended(name, record, time.time()))


def _confirmed_serial(state: State, name: str, identity: bytes, by: Delegation) -> int | None:
    """Return the serial of an identity's certificate, noted unless it was before; None if no more is to be noted."""
    issued = state.issued()
    known = [int(s) for s, e in issued.items() if (e["name"], e.get("identity")) == (name, identity.hex())]
    if known:
        return min(known)
    if len(_confirmed_by(issued, {label(by.serial)})) >= by.most:
        return None
    serial = _new_serial(state, name)
    _note(state, serial, name, _FOREVER, identity, by=label(by.serial))
    return serial


def used_up(state: State, roster: Roster) -> list[str]:
    """Return, for each invitation that brought more hosts than it is for, that the others are not confirmed.

    Nobody is named: whoever has the invitation brings others all the time.
    """
    hosts = {n: r.certificate for n, r in {**roster.waiting, **roster.hosts}.items() if r.certificate.delegation}
    if not hosts or state.authority_key is None:
        return []
    issued = state.issued()
    noted = {(entry["name"], entry.get("identity")) for entry in issued.values()}
    by = {c.delegation for name, c in hosts.items() if c.delegation and (name, c.identity.hex()) not in noted}
    full = [d for d in by if len(_confirmed_by(issued, {label(d.serial)})) >= d.most]
    return sorted(USED_UP.format(label=label(d.serial), most=d.most) for d in full)


def ending(state: State, roster: Roster, now: float) -> list[str]:
    """Return, where the authority is, a line for each other host whose certificate ends soon (see endings)."""
    found = endings.of_others(roster.hosts, now)
    return found if found and state.authority_key is not None else []


def forget(state: State, name: str, record: Record) -> Tombstone:
    """Sign that a host is dead, by the identity that it has. Raises InputError for one that uses its numbers up."""
    if record.seq >= RUNAWAY:
        raise InputError(
            f"{name} has given its record the number {record.seq}, beyond all that a clock gives: "
            f"run 'meshd revoke {name}' instead"
        )
    return certificates.forget(key(state), state.settings.mesh, name, dead(record))


def revoke(state: State, name: str, *, with_hosts: bool = False) -> dict[int, Revocation]:
    """Sign the revocation of all that was signed for a name, or of a reusable invitation. Raises InputError.

    A reusable invitation by which the host came goes with it: who holds it can come again under any other name. The
    hosts that the authority has confirmed after they came by it go `with_hosts` only.
    """
    seed, mesh, roster, issued = key(state), state.settings.mesh, state.roster(), state.issued()
    wanted: dict[int, str] = {}
    for serial, entry in issued.items():
        if entry["name"] == name:
            wanted |= _numbers(serial, entry) | _came_by(issued, entry.get("by"))
    if name in roster.hosts:
        certificate = roster.hosts[name].certificate
        wanted |= dict.fromkeys(certificate.serials, name)
        if certificate.delegation is not None:
            wanted |= _came_by(issued, label(certificate.delegation.serial))
    if with_hosts:
        for number, whose in _confirmed_by(issued, set(wanted.values())).items():
            if whose != state.settings.name:
                wanted |= _numbers(str(number), issued[str(number)])
    wanted = {serial: whose for serial, whose in wanted.items() if serial not in roster.revoked}
    if not wanted:
        known = sorted({entry["name"] for entry in issued.values()} | roster.hosts.keys())
        raise InputError(f"nothing to revoke for {name!r}; known: {', '.join(known)}")
    return {serial: certificates.revoke(seed, mesh, serial, whose) for serial, whose in sorted(wanted.items())}


def confirmed_by(state: State, names: Collection[str]) -> list[str]:
    """Return the hosts, not revoked, that came by these reusable invitations and that the authority has confirmed."""
    found = _confirmed_by(state.issued(), names)
    return sorted({name for serial, name in found.items() if serial not in state.roster().revoked})


def _confirmed_by(issued: Mapping[str, Mapping[str, Any]], names: Collection[str]) -> dict[int, str]:
    return {int(serial): entry["name"] for serial, entry in issued.items() if entry.get("by") in names}


def _numbers(serial: str, entry: Mapping[str, Any]) -> dict[int, str]:
    """Return what a certificate is revoked by: its own serial, and its identity's, of which there may be others."""
    identity = [identity_serial(bytes.fromhex(entry["identity"]))] if entry.get("identity") else []
    return dict.fromkeys([int(serial), *identity], entry["name"])


def _came_by(issued: Mapping[str, Mapping[str, Any]], invitation: str | None) -> dict[int, str]:
    return {
        int(serial): entry["name"] for serial, entry in issued.items() if invitation and entry["name"] == invitation
    }


# --- the key on its way to another host ----------------------------------------------------------------------------


def export(state: State, passphrase: str) -> str:
    """Return the authority's key and what it has signed, encrypted (Argon2id, XSalsa20-Poly1305)."""
    from nacl import pwhash, secret, utils  # noqa: PLC0415  libsodium takes 30 ms to load

    content = {"mesh": state.settings.mesh, "key": key(state).hex(), "issued": state.issued()}
    salt = utils.random(pwhash.argon2id.SALTBYTES)
    box = secret.SecretBox(_stretched(passphrase, salt))
    sealed = box.encrypt(json.dumps(content).encode())
    state.mark_exported()
    return json.dumps({"format": EXPORT, "salt": salt.hex(), "sealed": sealed.hex()}) + "\n"


def restore(state: State, text: str, passphrase: str) -> None:
    """Take over an exported authority. Raises InputError if it is damaged, another mesh's, or the passphrase wrong."""
    content = _unsealed(text, passphrase)
    seed = bytes.fromhex(content["key"])
    if certificates.public(seed) != state.mesh.trust.authority:
        raise InputError(
            f"this is the authority of another mesh ({content['mesh']!r}), this host is in {state.settings.mesh!r}"
        )
    state.save_issued({**content["issued"], **state.issued()})
    state.save_authority_key(seed)
    state.mark_exported()


def _unsealed(text: str, passphrase: str) -> Mapping[str, Any]:
    from nacl.exceptions import CryptoError  # noqa: PLC0415  as above
    from nacl.secret import SecretBox  # noqa: PLC0415

    try:
        outer = json.loads(text)
        if outer["format"] != EXPORT:
            raise InputError(f"the export is of another version ({str(outer['format'])[:32]!r})")
        salt, sealed = bytes.fromhex(outer["salt"]), bytes.fromhex(outer["sealed"])
        box = SecretBox(_stretched(passphrase, salt))
    except (KeyError, TypeError, ValueError, RecursionError, CryptoError):
        raise InputError("this is not what 'meshd authority export' wrote, or it is damaged") from None
    try:
        content = json.loads(box.decrypt(sealed))
    except (CryptoError, ValueError):
        raise InputError("the passphrase is wrong, or the export is damaged") from None
    if not isinstance(content, dict):
        raise InputError("the export is malformed")
    return content


def _stretched(passphrase: str, salt: bytes) -> bytes:
    from nacl.pwhash import argon2id  # noqa: PLC0415  as above

    return bytes(argon2id.kdf(32, passphrase.encode(), salt, argon2id.OPSLIMIT_MODERATE, argon2id.MEMLIMIT_MODERATE))


def expiry(ttl: float) -> int:
    """Return the Unix time at which something ends that lasts `ttl` seconds from now."""
    return int(time.time() + ttl)
