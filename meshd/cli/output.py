"""What several commands print in the same way."""

import json
import sys
from collections.abc import Iterable
from typing import Any

import click


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def warn(text: object) -> None:
    click.echo(f"Warning: {text}", err=True)


def exit_if_failed(failures: Iterable[object]) -> None:
    """Print what failed, and exit with an error if something did."""
    texts = [str(failure) for failure in failures]
    for text in texts:
        click.echo(f"Error: {text}", err=True)
    if texts:
        sys.exit(1)
