"""What all hosts of a mesh agree on, and how a member's tags are read by it. Pure."""

from dataclasses import dataclass
from ipaddress import IPv4Network

from meshd.mesh.certificates import Trust
from meshd.mesh.model import Member, Record, is_name
from meshd.mesh.records import RecordError, decode


@dataclass(frozen=True, slots=True)
class Mesh:
    """What all hosts of a mesh agree on."""

    overlay: IPv4Network
    subnet_length: int
    trust: Trust

    def read(self, member: Member) -> Record:
        """Return the record in a member's tags, which its owner has signed. Raises RecordError or CredentialError."""
        if not is_name(member.name):
            raise RecordError("its name is not 1 to 63 letters, digits, dots and dashes")
        record = decode(member.tags, self.overlay, self.subnet_length)
        self.trust.check(member.name, record)
        return record
