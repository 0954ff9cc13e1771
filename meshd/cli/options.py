"""Options that commands share: those of the settings, as they are declared, and a few more."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from meshd.cli.types import Address, OrWord, Prefix
from meshd.errors import InputError
from meshd.state import machine_id, settings
from meshd.state.directory import State
from meshd.state.settings import AUTO, DEFAULTS, OPTIONS, UP, Option, Scope

F = TypeVar("F", bound=Callable[..., Any])
READY_TIMEOUT = 30.0
# What is typed for an empty list.
NOTHING = "none"
TYPES: dict[str, Any] = {
    settings.TEXT.what: str,
    settings.NUMBER.what: int,
    settings.SWITCH.what: bool,
    settings.ADDRESS.what: Address(),
    settings.PREFIX.what: Prefix(),
    settings.OVERLAY.what: OrWord(Prefix(), AUTO),
    settings.TEXTS.what: str,
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
        type=click.Choice(option.choices) if option.choices else TYPES[option.kind.what],
        multiple=option.kind is settings.TEXTS,
        default=default,
        envvar=option.variable,
        show_envvar=True,
        show_default=words or True,
        help=option.help,
    )


def changing_options() -> Callable[[F], F]:
    """Add an option for each setting of a host that has joined; those that are fixed are only there to be refused.

    No environment variable counts: what is set for `meshd join` must change nothing at each `meshd up`.
    """

    def decorate(command: F) -> F:
        for name, option in reversed(OPTIONS.items()):
            command = _changing_option(name, option)(command)
        return command

    return decorate


def _changing_option(name: str, option: Option) -> Callable[[F], F]:
    kind: Any = click.Choice(option.choices) if option.choices else TYPES[option.kind.what]
    back, is_list = _word_back(name, option), option.kind is settings.TEXTS
    replaces = " It replaces what was there before;" if is_list else ""
    return click.option(
        option.flag,
        name,
        type=kind if back is None or is_list else OrWord(click.types.convert_type(kind), back),
        multiple=is_list,
        default=None,
        hidden=option.later != UP,
        help=f"{option.help}{replaces} '{back}': {option.default}." if back else option.help,
    )


def _word_back(name: str, option: Option) -> str | None:
    """Return the word by which a setting has no value again, None for one that always has a value."""
    if option.kind is settings.TEXTS:
        return NOTHING
    return AUTO if DEFAULTS[name] is None else None


def changed(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given to `changing_options`, and None or an empty tuple where they go back."""
    values = {name: value for name, value in options.items() if value not in (None, ())}
    back = {name: _word_back(name, OPTIONS[name]) for name in values}
    return {n: None if v == back[n] else () if v == (back[n],) else v for n, v in values.items()}


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


def as_host(command: F) -> F:
    """Require that the state is this machine's before the command does anything: it acts as the host in there."""

    @wraps(command)
    def checked(state: State, *arguments: Any, **options: Any) -> Any:
        machine_id.check(state)
        return command(state, *arguments, **options)

    return checked  # type: ignore[return-value]


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
wait_option = click.option(
    "--timeout", type=float, default=READY_TIMEOUT, show_default=True, help="Seconds to wait for the other hosts."
)
strict_option = click.option("--strict", is_flag=True, help="Exit with code 3 if some hosts are not ready in time.")
