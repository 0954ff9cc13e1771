"""What other hosts say about claims that this host cannot settle by itself. Pure.

A host that has just joined knows nobody, and sees two members claim one subnet. The others know which of them has it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from meshd.mesh.model import Record

Claim = tuple[str, bytes]
"""One claim: the name of the host, and the signature of its record."""


def claim_of(name: str, record: Record) -> Claim:
    """Return the claim that a record is."""
    return name, record.signature


@dataclass(frozen=True, slots=True)
class Dispute:
    """Several hosts claim one `place`. `claims` are their records, `voters` the hosts whose word counts, by name.

    Those vote whom the authority itself has certified, and who claim something else. `keeper` has the place until it is
    known whose it is, if one of them has it.
    """

    place: str
    claims: Mapping[str, Record]
    voters: Mapping[str, Record]
    keeper: str | None = None


@dataclass(frozen=True, slots=True)
class Vote:
    """What hosts say of one claim: whether it is in force for them. Not all that were `asked` have answered."""

    asked: frozenset[str] = frozenset()
    said: Mapping[str, bool] = field(default_factory=dict)

    def has(self, answer: bool, voters: Collection[str]) -> set[str]:
        """Return those of the voters that have given this answer."""
        return {voter for voter in voters if self.said.get(voter) is answer}

    def is_heard(self, voters: Collection[str]) -> bool:
        """Return whether more than half of those that were asked have answered."""
        asked = self.asked & {*voters}
        return len(self.said.keys() & asked) * 2 > len(asked)

    def with_answers(self, asked: Collection[str], said: Mapping[str, bool]) -> "Vote":
        """Return the vote after these hosts were asked, some of whom have answered."""
        return Vote(self.asked | {*asked}, {**self.said, **said})


Votes = Mapping[Claim, Vote]
"""The votes on those claims that were asked about."""


def winner(dispute: Dispute, votes: Votes) -> str | None:
    """Return which of the hosts has what they claim; None as long as that is not known.

    It is the only one whose record is in force for others. If all say that none is, nobody is displaced, and the
    certificate's rank decides. Without anyone to ask, a host that the authority itself has certified comes before those
    by a reusable invitation.
    """
    voters = dispute.voters.keys()
    said = {name: votes.get(claim_of(name, record), Vote()) for name, record in dispute.claims.items()}
    certified = {name for name, record in dispute.claims.items() if record.certificate.delegation is None}
    holders = {name for name, vote in said.items() if vote.has(True, voters)}
    if holders:
        # Anyone with a reusable invitation makes any number of claims: not all of those are asked about.
        counted = holders | certified | {name for name, vote in said.items() if vote.asked}
        is_heard = all(said[name].is_heard(voters) for name in counted)
        return holders.pop() if len(holders) == 1 and is_heard else None
    first = min(dispute.claims, key=lambda name: (dispute.claims[name].certificate.rank, name))
    if voters:
        return first if all(vote.has(False, voters) == voters for vote in said.values()) else None
    return first if certified == {first} else None


def most_voted(dispute: Dispute, votes: Votes) -> str | None:
    """Return which of the hosts most voters know as the holder; None if that is not known yet, or nobody is.

    Of two with the same number of voters it is the one whose certificate's rank is first. Both parties come to the same
    answer once all voters have been asked, also after a partition in which each side knew another holder.
    """
    voters, claims = dispute.voters.keys(), dispute.claims
    said = {name: votes.get(claim_of(name, record), Vote()) for name, record in claims.items()}
    holders = {name: len(vote.has(True, voters)) for name, vote in said.items()}
    counted = {name for name, count in holders.items() if count or name == dispute.keeper}
    if not any(holders.values()) or not all(said[name].is_heard(voters) for name in counted):
        return None
    return min(counted, key=lambda name: (-holders[name], claims[name].certificate.rank, name))


def is_open(dispute: Dispute, votes: Votes, own: str) -> bool:
    """Return whether voters are to be asked: until the place is somebody's, and about the own one as long as it lasts.

    Voters change their minds. Two parties that have heard of different times could both keep it.
    """
    return dispute.keeper == own or winner(dispute, votes) is None
