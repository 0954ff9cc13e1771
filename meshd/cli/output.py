"""All that commands print goes through here, where it is made printable: one argument is one line."""

import json
import logging
import sys
from collections.abc import Iterable
from typing import Any

import click

from meshd.printable import printable, printable_json


def show(*lines: object, error: bool = False) -> None:
    """Print lines to standard output, or to standard error."""
    for line in lines:
        click.echo(printable(line, None), err=error)


def show_progress(text: str) -> None:
    """Print a text over the last one, at the beginning of the line on standard error."""
    click.echo(f"\r{printable(text)}", nl=False, err=True)


def print_json(value: Any) -> None:
    click.echo(json.dumps(printable_json(value), indent=2))


def warn(text: object) -> None:
    _tell("Warning", text)


def print_error(text: object) -> None:
    _tell("Error", text)


def _tell(kind: str, text: object) -> None:
    """Print a message to standard error. Its further lines are indented, since others may have written a part of it."""
    first, *more = str(text).split("\n")
    show(f"{kind}: {first}", *(f"  {line}" for line in more), error=True)


class Warnings(logging.Handler):
    """Prints as a warning what is logged in a command; the daemon has a log of its own (daemon.log)."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


def exit_if_failed(failures: Iterable[object]) -> None:
    """Print what failed, and exit with an error if something did."""
    texts = [str(failure) for failure in failures]
    for text in texts:
        print_error(text)
    if texts:
        sys.exit(1)
