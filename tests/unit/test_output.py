"""Whatever is printed is made printable by the functions that print."""

import json
import logging
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshd.cli import output
from meshd.daemon.log import JournalFormatter, LineFormatter
from meshd.printable import printable_json

EVIL = "web1\x1b[2J\n2026-11-26 12:00:00,000 WARNING refused \u202e\u2028\x85\r"
SHOWN = r"web1\x1b[2J\x0a2026-11-26 12:00:00,000 WARNING refused \u202e\u2028\x85\x0d"
JSON = st.recursive(
    st.text() | st.integers() | st.none(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)
captured = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def is_safe(line: str) -> bool:
    return all(c == " " or unicodedata.category(c)[0] not in "CZ" for c in line)


@captured
@given(st.lists(st.text(), min_size=1))
def test_show_prints_one_safe_line_an_argument(capsys: pytest.CaptureFixture[str], texts: list[str]) -> None:
    """Each argument is one line, in which nothing acts on a terminal."""
    output.show(*texts)
    *lines, last = capsys.readouterr().out.split("\n")
    assert (len(lines), last) == (len(texts), "")
    assert all(map(is_safe, lines))


@captured
@given(st.text())
@pytest.mark.parametrize(("tell", "kind"), [(output.warn, "Warning: "), (output.print_error, "Error: ")])
def test_further_lines_of_messages_are_indented(
    capsys: pytest.CaptureFixture[str], tell: Callable[[object], None], kind: str, text: str
) -> None:
    """A message of several lines stays one, and none of them looks like another message."""
    tell(text)
    first, *more, last = capsys.readouterr().err.split("\n")
    assert first.startswith(kind)
    assert all(line.startswith("  ") for line in more)
    assert last == ""
    assert all(map(is_safe, (first, *more)))


@captured
@given(JSON)
def test_json_has_no_text_that_acts_on_terminal(capsys: pytest.CaptureFixture[str], value: Any) -> None:
    """Texts in JSON are safe when a program like jq prints them as they are, and the rest of it is unchanged."""

    def texts(found: Any) -> list[str]:
        if isinstance(found, dict):
            return [*found, *(text for entry in found.values() for text in texts(entry))]
        return [text for entry in found for text in texts(entry)] if isinstance(found, list) else [found]

    output.print_json(value)
    printed = json.loads(capsys.readouterr().out)
    assert all(is_safe(text) for text in texts(printed) if isinstance(text, str))
    assert printed == printable_json(value)
    assert printable_json(printed) == printed


def test_progress_is_one_safe_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The line of progress is printed over the last one, and goes on in no other."""
    output.show_progress(EVIL)
    assert capsys.readouterr().err == f"\r{SHOWN}"


def entry(message: str, error: BaseException | None = None) -> logging.LogRecord:
    told = (type(error), error, None) if error is not None else None
    return logging.LogRecord("meshd", logging.WARNING, "", 0, "%s", (message,), told)


@given(st.text(), st.text())
def test_log_has_one_safe_line_a_message(message: str, error: str) -> None:
    """A message is one line of the log, whatever is in it; an exception's lines are indented or have a priority."""
    plain, journal = LineFormatter("%(message)s"), JournalFormatter("%(message)s")
    assert "\n" not in plain.format(entry(message))
    first, *more = plain.format(entry(message, ValueError(error))).split("\n")
    assert is_safe(first)
    assert all(line.startswith("  ") and is_safe(line) for line in more)
    assert all(line.startswith("<4>") for line in journal.format(entry(message, ValueError(error))).split("\n"))


def test_log_examples() -> None:
    """What a member's name can hold is written in a way that can be read."""
    assert LineFormatter("%(levelname)s %(message)s").format(entry(EVIL)) == f"WARNING {SHOWN}"


def test_logged_warning_is_printed_by_command(capsys: pytest.CaptureFixture[str]) -> None:
    """What is logged while a command runs is printed as its other warnings are."""
    output.Warnings().handle(entry(EVIL))
    first, second = capsys.readouterr().err.splitlines()
    assert f"{first}\\x0a{second.strip()}" == f"Warning: {SHOWN}"
