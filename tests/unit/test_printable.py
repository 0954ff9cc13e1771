"""What others wrote, made safe to show."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.mesh.model import is_name
from meshd.mesh.records import is_public_key
from meshd.printable import printable


@given(st.text(max_size=700))
def test_nothing_that_acts_on_a_terminal_comes_out(text: str) -> None:
    shown = printable(text)
    assert len(shown) <= 512
    assert all(c == " " or unicodedata.category(c)[0] not in "CZ" for c in shown)
    assert len(shown.splitlines()) <= 1


@given(st.text(max_size=60))
def test_harmless_text_stays_and_changed_text_is_no_name_and_no_key(text: str) -> None:
    shown = printable(text)
    if text.isprintable():
        assert shown == text
    else:
        assert "\\" in shown
        assert not is_name(shown)
        assert not is_public_key(shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("web1", "web1"),
        ("über-größe", "über-größe"),
        ("\x1b[2Jweb1", "\\x1b[2Jweb1"),
        ("web1\n2026-11-26 INFO forged", "web1\\x0a2026-11-26 INFO forged"),
        ("web1\u202e1bew", "web1\\u202e1bew"),
        ("a\u2028b\u00a0c", "a\\u2028b\\xa0c"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_examples(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_what_is_long_is_cut() -> None:
    assert printable("x" * 100, 10) == "x" * 9 + "…"
    assert printable("\x00" * 10**6) == "\\x00" * 127 + "\\x0…"
