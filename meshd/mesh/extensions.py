"""What later versions of meshd add to records, certificates, delegations, tombstones and messages. Pure.

An extension has a number, 1 to 127, and a value. A critical one is refused by who does not know it; any other one that
is not known is skipped, and passed on bit by bit with what it is a part of.

A block of them is the bytes of each in turn: its type, which is its number and CRITICAL or not, the length of its value
in a byte, and the value. They ascend by number, and each comes once, so that a block has one spelling.
"""

from collections.abc import Collection, Mapping

from meshd.errors import InputError

CRITICAL = 0x80
# The length of a block, and that of a value, is one byte.
LONGEST = 255
# The numbers that this version of meshd knows.
KNOWN: frozenset[int] = frozenset()


class ExtensionError(InputError):
    """An extension that this version of meshd must not skip, or no extension at all."""


def pack(values: Mapping[int, bytes], critical: Collection[int] = ()) -> bytes:
    """Return a block of extensions."""
    return b"".join(
        bytes([number | CRITICAL * (number in critical), len(value)]) + value
        for number, value in sorted(values.items())
    )


def read(block: bytes) -> dict[int, bytes]:
    """Return the extensions in a block by number. Raises ExtensionError for a malformed block, or a critical one."""
    found: dict[int, bytes] = {}
    rest, last = block, 0
    while rest:
        kind, length, value = rest[0], rest[1] if len(rest) > 1 else LONGEST + 1, rest[2:]
        number = kind & ~CRITICAL
        if number <= last or len(value) < length:
            raise ExtensionError("its extensions are malformed")
        check(kind)
        found[number], rest, last = value[:length], value[length:], number
    return found


def check(kind: int) -> None:
    """Raise ExtensionError for the type of an extension that is critical, and that this version does not know."""
    if must_not_skip(kind):
        raise ExtensionError(f"it needs a newer version of meshd (critical extension {kind & ~CRITICAL})")


def must_not_skip(kind: int) -> bool:
    """Return whether what has an extension of this type is not to be read by this version of meshd."""
    number = kind & ~CRITICAL
    return bool(kind & CRITICAL) and number not in KNOWN
