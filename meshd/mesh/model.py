"""The nouns of a mesh, as frozen dataclasses: `Member` (Serf's view), `Record` (what a host publishes), and more.

Those of a machine (`Link`, `Route`, `Peer`, …) are in meshd.net.resources.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network

from meshd.endpoint import Endpoint, IPAddress

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
    """

    serial: int
    expires: int
    key: bytes
    prefix: str = ""
    subnets: tuple[IPv4Network, ...] = ()
    signature: bytes = b""


@dataclass(frozen=True, slots=True)
class Certificate:
    """Whose a name is: the Ed25519 key that signs its records, vouched for by the authority or by a delegation.

    With a delegation, `serial` is the key's digest, and `expires` and `subnets` are the delegation's.
    """

    serial: int
    expires: int
    identity: bytes
    subnets: tuple[IPv4Network, ...] = ()
    delegation: Delegation | None = None
    signature: bytes = b""

    @property
    def serials(self) -> frozenset[int]:
        """The numbers under which it can be revoked."""
        return frozenset({self.serial, self.delegation.serial} if self.delegation else {self.serial})

    @property
    def rank(self) -> tuple[bool, int]:
        """Its place when two hosts claim one subnet: the lower one wins. Nobody chooses the authority's serials."""
        return self.delegation is not None, self.serial


@dataclass(frozen=True, slots=True)
class Record:
    """What a host publishes about itself: the tags, parsed and validated (docs/record.md)."""

    public_key: str
    subnet: IPv4Network
    endpoint: Endpoint
    seq: int
    certificate: Certificate
    leaving: bool = False
    signature: bytes = b""

    @property
    def address(self) -> IPv4Address:
        """The host's own overlay address: the first of its subnet, as Docker gives it to the bridge."""
        return self.subnet.network_address


@dataclass(frozen=True, slots=True)
class Host:
    """A member that the mesh has admitted, with the record that is in force for it."""

    name: str
    record: Record


@dataclass(frozen=True, slots=True)
class Tombstone:
    """The end of a host's membership. A host that joins again does so with a new key and a newer record.

    Its proof for others is `record`, the host's own last one, which says that it leaves, or `forgotten`, the
    authority's signature. Without a proof it counts on this host alone.
    """

    seq: int
    public_key: str
    record: Record | None = None
    forgotten: bytes = b""

    @property
    def by(self) -> Certificate | None:
        """The certificate of the host that left; None for the authority's word, and without a proof."""
        return self.record.certificate if self.record is not None else None

    @property
    def is_delegated(self) -> bool:
        """Whether it is the word of an identity that a reusable invitation has made."""
        return self.by is not None and self.by.delegation is not None

    @property
    def has_proof(self) -> bool:
        return self.record is not None or bool(self.forgotten)

    def voids(self, record: Record) -> bool:
        """Return whether a record of this name is of the life that has ended."""
        return record.seq <= self.seq or record.public_key == self.public_key

    def is_outranked(self, by: Certificate) -> bool:
        """Return whether `by`, certified by the authority itself, overrides what another, delegated identity signed.

        Anyone who has, or had, a reusable invitation can sign a tombstone for any name, with the greatest number.
        """
        return self.is_delegated and by.delegation is None and self.by is not None and self.by.identity != by.identity


@dataclass(frozen=True, slots=True)
class Revocation:
    """The authority's word that a certificate, or all that a delegation signed, count no more; `name` is for people."""

    serial: int
    name: str
    signature: bytes
