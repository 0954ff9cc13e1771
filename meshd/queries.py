"""The query that proves readiness: "have you applied NAME's record SEQ?". Only a yes is ever answered."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from meshd.tags import MAX_SEQ

APPLIED = "meshd-applied"


@dataclass(frozen=True, slots=True)
class Question:
    """Whether a host has in its kernel what `name` published under `seq`, its goodbye included."""

    YES: ClassVar[bytes] = b"yes"
    name: str
    seq: int

    def payload(self) -> bytes:
        return f"{self.name} {self.seq}".encode()

    @classmethod
    def parse(cls, payload: bytes) -> "Question | None":
        """Read what anybody may have sent; None if it is no question."""
        name, _, seq = payload.decode(errors="replace").partition(" ")
        if not (name and seq.isascii() and seq.isdigit() and len(seq) <= 15 and int(seq) < MAX_SEQ):
            return None
        return cls(name, int(seq))

    def answered_by(self, applied: Mapping[str, int]) -> bool:
        return applied.get(self.name, 0) >= self.seq
