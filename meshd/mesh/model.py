"""The nouns of a mesh, as frozen dataclasses: `Member` (Serf's view), `Record` (what a host publishes), and more.

Those of a machine (`Link`, `Route`, `Peer`, …) are in meshd.net.resources.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from ipaddress import IPv4Address, IPv4Network

from meshd.endpoint import Endpoint, IPAddress

# The version of records, certificates and delegations that this meshd makes, and the one that it reads as well.
VERSION, FORMER = 3, 2
# For how many hosts a reusable invitation is that does not say it, as those of version 2; and for how many at most.
DEFAULT_HOSTS, MAX_HOSTS = 64, 1000

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")


def is_name(text: str) -> bool:
    """Return whether a text can name a host or a mesh: the alphabet of DNS labels, and dots; at most 63 characters.

    Serf itself checks nothing, and a name reaches logs, tables and commands.
    """
    return _NAME.fullmatch(text) is not None


class Status(StrEnum):
    """A member's state, in Serf's words."""

    ALIVE = "alive"
    LEAVING = "leaving"
    LEFT = "left"
    FAILED = "failed"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Member:
    """A member as Serf lists it; everything in it was written by someone else."""

    name: str
    address: IPAddress
    port: int
    status: Status
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Delegation:
    """The authority's leave to certify hosts, which a reusable invitation carries.

    `expires` is Unix seconds, 0 for never; names begin with `prefix`; without `subnets` every subnet is allowed.
    `hosts` is how many hosts the authority confirms by it, 0 in version 2 (see `most`). `extensions` are a block
    (meshd.mesh.extensions).
    """

    serial: int
    expires: int
    key: bytes
    prefix: str = ""
    subnets: tuple[IPv4Network, ...] = ()
    signature: bytes = b""
    hosts: int = 0
    extensions: bytes = b""
    version: int = VERSION

    @property
    def most(self) -> int:
        """How many hosts the authority confirms by it, and how many of others are taken at once (mesh.shares)."""
        return self.hosts or DEFAULT_HOSTS


def identity_serial(identity: bytes) -> int:
    """Return the serial of each certificate that a delegation signs for an identity, which stands for the identity."""
    return int.from_bytes(blake2b(identity, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, slots=True)
class Certificate:
    """Whose a name is: the Ed25519 key that signs its records, vouched for by the authority or by a delegation.

    With a delegation, `serial` is the key's digest, and `expires`, `subnets` and `version` are the delegation's.
    Without one, `since` is when the host became a member (Unix seconds), which a renewal keeps, and `extensions` are a
    block (meshd.mesh.extensions).
    """

    serial: int
    expires: int
    identity: bytes
    subnets: tuple[IPv4Network, ...] = ()
    delegation: Delegation | None = None
    signature: bytes = b""
    since: int = 0
    extensions: bytes = b""
    version: int = VERSION

    @property
    def serials(self) -> frozenset[int]:
        """The numbers under which it can be revoked: its own, its identity's, and its delegation's.

        An identity may have certificates of which the host that revokes knows nothing: each host that has the authority
        keeps its own list.
        """
        by = {self.delegation.serial} if self.delegation else set[int]()
        return frozenset({self.serial, identity_serial(self.identity)} | by)

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Its place when two hosts claim one subnet: the lower one wins. The authority alone chooses these numbers."""
        return self.delegation is not None, self.since, self.serial

    @property
    def is_final(self) -> bool:
        """Whether the authority has nothing better to give: its own word, in this version."""
        return self.delegation is None and self.version >= VERSION

    def improves(self, other: "Certificate") -> bool:
        """Return whether it is one of this identity that its host puts in the place of another one."""
        is_better = self.delegation is None and (other.delegation is not None or self.version > other.version)
        return is_better and self.identity == other.identity

    def supersedes(self, other: "Certificate") -> bool:
        """Return whether the authority has given a name to this identity after it gave it to that of `other`.

        Of two identities that the authority itself certified for one name, the one with the later certificate counts.
        """
        both = self.delegation is None and other.delegation is None
        return both and self.identity != other.identity and self.serial > other.serial


@dataclass(frozen=True, slots=True)
class Record:
    """What a host publishes about itself: the tags, parsed and validated (docs/record.md).

    `extensions` are a block (meshd.mesh.extensions), kept as it came. `version` is the one that it is written in: its
    signature covers that.
    """

    public_key: str
    subnet: IPv4Network
    endpoint: Endpoint
    seq: int
    certificate: Certificate
    leaving: bool = False
    signature: bytes = b""
    extensions: bytes = b""
    version: int = VERSION

    @property
    def address(self) -> IPv4Address:
        """The host's own overlay address: the first of its subnet, as Docker gives it to the bridge."""
        return self.subnet.network_address

    def replaces(self, other: "Record") -> bool:
        """Return whether this one counts of two valid records of one name, as far as these two tell.

        Of one identity the newer one does, and of two with one number that with the higher key: two machines may use
        one invitation in the same second. Of two identities, that to which the authority itself has given the name, or
        the later.
        """
        mine, others = self.certificate, other.certificate
        if mine.identity == others.identity:
            return (self.seq, self.public_key) > (other.seq, other.public_key)
        return mine.supersedes(others) or (mine.delegation is None and others.delegation is not None)


@dataclass(frozen=True, slots=True)
class Host:
    """A member that the mesh has admitted, with the record that is in force for it."""

    name: str
    record: Record


@dataclass(frozen=True, slots=True)
class Tombstone:
    """The end of a host's membership. A host that joins again does so with a new key and a newer record.

    Its proof for others is `record`, the host's own last one, which says that it leaves, or `forgotten`, the
    authority's signature. Without a proof it counts on this host alone, and `certificate` is the host's. `identity` is
    whose membership it ends; empty, it ends that of any identity, as the authority's word of version 2 does.
    `extensions` are those of the authority's word.
    """

    seq: int
    public_key: str
    record: Record | None = None
    forgotten: bytes = b""
    identity: bytes = b""
    extensions: bytes = b""
    certificate: Certificate | None = None

    @property
    def by(self) -> Certificate | None:
        """The certificate of the host that left; None for the authority's word."""
        return self.record.certificate if self.record is not None else self.certificate

    @property
    def delegation(self) -> Delegation | None:
        """The reusable invitation that has made the identity whose word it is; None for the authority's own."""
        return self.by.delegation if self.by is not None else None

    @property
    def is_delegated(self) -> bool:
        """Whether it is the word of an identity that a reusable invitation has made."""
        return self.delegation is not None

    @property
    def rank(self) -> tuple[bool, int]:
        """Its place among those of one name and identity, of which the highest one is kept.

        One by a reusable invitation counts no longer than that does, and never replaces one that the authority is
        behind.
        """
        return not self.is_delegated, self.seq

    @property
    def has_proof(self) -> bool:
        return self.record is not None or bool(self.forgotten)

    def is_about(self, identity: bytes) -> bool:
        """Return whether it can end the membership of this identity: nobody says goodbye for another one."""
        return self.identity in (b"", identity)

    def voids(self, record: Record) -> bool:
        """Return whether a record of this name is of the membership that has ended.

        What was said by a reusable invitation ends nothing that the authority itself has certified: it counts no longer
        than that invitation does.
        """
        is_old = record.seq <= self.seq or record.public_key == self.public_key
        is_able = not self.is_delegated or record.certificate.delegation is not None
        return is_old and is_able and self.is_about(record.certificate.identity)


Graves = Mapping[str, Mapping[bytes, Tombstone]]
"""Tombstones by the name of the host, and by the identity whose membership has ended."""


@dataclass(frozen=True, slots=True)
class Revocation:
    """The authority's word that a certificate, or all that a delegation signed, count no more; `name` is for people.

    Version 3 differs by `extensions` alone. Without any, version 2 is written, so that its hosts hear of it as well.
    """

    serial: int
    name: str
    signature: bytes
    extensions: bytes = b""
    version: int = FORMER
