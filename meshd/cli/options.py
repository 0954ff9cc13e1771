"""Options that commands share: those of the settings, as they are declared, and a few more."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from meshd.cli.types import Address, Overlay, Prefix
from meshd.errors import InputError
from meshd.state import settings
from meshd.state.settings import DEFAULTS, OPTIONS, Kind, Option, Scope

F = TypeVar("F", bound=Callable[..., Any])
READY_TIMEOUT = 30.0
TYPES: dict[Kind, Any] = {
    settings.TEXT: str,
    settings.NUMBER: int,
    settings.SWITCH: bool,
    settings.ADDRESS: Address(),
    settings.PREFIX: Prefix(),
    settings.OVERLAY: Overlay(),
    settings.TEXTS: str,
}


def setting_options(*, joins: bool) -> Callable[[F], F]:
    """Add an option for each setting. A host that joins gets those of the mesh from the invitation."""

    def decorate(command: F) -> F:
        for name, option in reversed(OPTIONS.items()):
            if not (joins and option.scope is Scope.MESH):
                is_inherited = joins and option.scope is Scope.INHERITED
                command = _option(name, option, None if is_inherited else DEFAULTS[name], is_inherited)(command)
        return command

    return decorate


def _option(name: str, option: Option, default: Any, is_inherited: bool) -> Callable[[F], F]:
    words = "as in the mesh" if is_inherited else option.default
    return click.option(
        option.flag,
        name,
        type=click.Choice(option.choices) if option.choices else TYPES[option.kind],
        multiple=option.kind is settings.TEXTS,
        default=default,
        envvar=option.variable,
        show_envvar=True,
        show_default=words or True,
        help=option.help,
    )


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that have a value; the others take their default."""
    return {name: value for name, value in options.items() if value is not None}


def as_root(command: F) -> F:
    """Require root before the command does anything, and before it asks for a secret."""

    @wraps(command)
    def checked(*arguments: Any, **options: Any) -> Any:
        if os.geteuid() != 0:
            raise InputError("meshd changes links, routes and firewall rules: run it as root (sudo meshd …)")
        return command(*arguments, **options)

    return checked  # type: ignore[return-value]


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
wait_option = click.option(
    "--timeout", type=float, default=READY_TIMEOUT, show_default=True, help="Seconds to wait for the other hosts."
)
strict_option = click.option("--strict", is_flag=True, help="Exit with code 3 if some hosts are not ready in time.")
