"""What one reusable invitation can make a host keep: its share of hosts and of tombstones. Pure.

Who has a reusable invitation makes any number of identities, and signs what each of them says.
"""

from collections import Counter
from collections.abc import Mapping

from meshd.mesh.model import Delegation, Graves, Record, Tombstone

# By an invitation for N hosts, N are taken at once that the authority has not confirmed. Each of these has a place for
# its tombstone: hosts and tombstones together have 4 N places. Tombstones of identities that were no hosts here leave
# N of them free.
PLACES, FOR_STRANGERS = 4, 3
# From 2 N tombstones on, two hosts need not know the same ones: each keeps those that it has heard first.
SAME = 2
# Upper bound of the places of all invitations together: 8192 tombstones are 5.5 MB in hosts.json.
MOST = 8192


class Shares:
    """The places that are taken, by the serials of the invitations."""

    def __init__(self, hosts: Mapping[str, Record], gone: Graves) -> None:
        certificates = (record.certificate for record in hosts.values())
        self._hosts = Counter(c.delegation.serial for c in certificates if c.delegation is not None)
        self._places = self._hosts + _graves(gone)
        self._total = self._places.total()

    def take_host(self, record: Record) -> bool:
        """Take the place of a host, and so of its tombstone; return whether there is one."""
        delegation = record.certificate.delegation
        if delegation is None:
            return True
        if not self.has_room(delegation, leaving=False):
            return False
        self._hosts[delegation.serial] += 1
        return self._take(delegation, PLACES)

    def take_stranger(self, tombstone: Tombstone) -> bool:
        """Take the place of a tombstone of an identity that was no host here; return whether there is one."""
        delegation = tombstone.delegation
        return delegation is None or self._take(delegation, FOR_STRANGERS)

    def has_room(self, delegation: Delegation, *, leaving: bool) -> bool:
        """Return whether there is a place for one more host, or for the tombstone of one that was none here."""
        if leaving:
            return self._has_place(delegation, FOR_STRANGERS)
        return self._hosts[delegation.serial] < delegation.most and self._has_place(delegation, PLACES)

    def _has_place(self, delegation: Delegation, places: int) -> bool:
        return self._places[delegation.serial] < places * delegation.most and self._total < MOST * places // PLACES

    def _take(self, delegation: Delegation, places: int) -> bool:
        if not self._has_place(delegation, places):
            return False
        self._places[delegation.serial] += 1
        self._total += 1
        return True


def full(gone: Graves) -> frozenset[int]:
    """Return the serials of the invitations by which two hosts need not know the same tombstones."""
    most = {t.delegation.serial: t.delegation.most for ones in gone.values() for t in ones.values() if t.delegation}
    return frozenset(serial for serial, count in _graves(gone).items() if count >= SAME * most[serial])


def _graves(gone: Graves) -> Counter[int]:
    return Counter(t.delegation.serial for ones in gone.values() for t in ones.values() if t.delegation is not None)
