"""What all hosts of a mesh agree on, and how a member's tags are read by it. Pure."""

from dataclasses import dataclass
from ipaddress import IPv4Network

from meshd.endpoint import unusable
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
        self.check(member.name, record)
        return record

    def check(self, name: str, record: Record) -> None:
        """Raise RecordError or CredentialError for what can be nobody's record of this name.

        That is one with an endpoint where no host can be, and one that the owner of the name has not signed.
        """
        if problem := self.misplaced(record):
            raise RecordError(problem)
        self.trust.check(name, record)

    def misplaced(self, record: Record) -> str:
        """Return why no host can be at a record's endpoint, the empty string if one can or if it is a goodbye."""
        problem = "" if record.leaving else unusable(record.endpoint.address, self.overlay)
        return f"endpoint {record.endpoint} is {problem}" if problem else ""
