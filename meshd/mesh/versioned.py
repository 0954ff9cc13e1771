"""Lists in msgpack as hosts send them to each other: a version before the fields, and extensions behind them. Pure.

Version 2 sent the fields alone, which are read as well. Extensions are a map of numbers to bytes. They go from one host
to the next and no further; what is to be passed on, or believed, is in a record or in the authority's word.
"""

import msgpack

from meshd.mesh import extensions
from meshd.mesh.model import VERSION


def pack(*fields: object) -> bytes:
    """Return the message of these fields."""
    return bytes(msgpack.packb([VERSION, *fields]))


def unpack(payload: bytes) -> list[object]:
    """Return the fields of a message that anyone may have sent; none if it is no message, or of a later version.

    Serf appends a newline to what it pipes into a handler, unless it ends with one already.
    """
    try:
        value = msgpack.unpackb(payload, strict_map_key=False)
    except msgpack.ExtraData as error:
        value = error.unpacked if error.extra == b"\n" else None
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
        return []  # TypeError: a map whose key is a map
    return stripped(value) if isinstance(value, list) else []


def stripped(fields: list[object]) -> list[object]:
    """Return fields without version and extensions; none if this version of meshd must not read them."""
    if is_versioned(fields):
        if fields[0] != VERSION:
            return []
        fields = fields[1:]
    if fields and isinstance(fields[-1], dict):
        return fields[:-1] if all(may_skip(kind, value) for kind, value in fields[-1].items()) else []
    return fields


def may_skip(kind: object, value: object) -> bool:
    """Return whether this is an extension of a message that this version of meshd may skip."""
    if type(kind) is not int or not isinstance(value, bytes):
        return False
    return 0 < kind & ~extensions.CRITICAL < extensions.CRITICAL and not extensions.must_not_skip(kind)


def is_versioned(fields: list[object]) -> bool:
    """Return whether a version comes first: no field that version 2 sent first was a number."""
    return bool(fields) and type(fields[0]) is int
