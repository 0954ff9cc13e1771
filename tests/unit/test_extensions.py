"""Blocks of extensions: one spelling, unknown ones skipped, critical ones refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.mesh import extensions
from meshd.mesh.extensions import ExtensionError

found = st.dictionaries(st.integers(1, 127), st.binary(max_size=255), max_size=5)


@given(found)
def test_extensions_round_trip(values: dict[int, bytes]) -> None:
    """What is packed is read again."""
    assert extensions.read(extensions.pack(values)) == values


@given(st.binary(max_size=40))
def test_a_block_has_one_spelling(block: bytes) -> None:
    """Any bytes are refused, or are the block of what they give."""
    try:
        values = extensions.read(block)
    except ExtensionError:
        return
    assert extensions.pack(values) == block


@given(found, st.integers(1, 127))
def test_an_unknown_critical_extension_is_refused(values: dict[int, bytes], number: int) -> None:
    """The reason names the number, and what to do."""
    block = extensions.pack({**values, number: b""}, critical={number})
    with pytest.raises(ExtensionError, match=rf"a newer version of meshd \(critical extension {number}\)"):
        extensions.read(block)


def test_a_block_as_bytes() -> None:
    """The layout is that of docs/record.md."""
    assert extensions.pack({9: b"", 5: b"later"}) == b"\x05\x05later\x09\x00"
    assert extensions.pack({5: b"x"}, critical={5}) == b"\x85\x01x"
