"""What a user types, as values: addresses, prefixes, time spans."""

import re
from ipaddress import IPv4Network, ip_address, ip_network
from typing import Any

import click

from meshd.endpoint import IPAddress

_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Address(click.ParamType[IPAddress]):
    """An IPv4 or IPv6 address."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> IPAddress:
        try:
            return ip_address(value)
        except ValueError:
            self.fail(f"{value!r} is not an IP address", param, ctx)


class Prefix(click.ParamType[IPv4Network]):
    """An IPv4 prefix like 172.20.0.0/16."""

    name = "prefix"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> IPv4Network:
        try:
            prefix = ip_network(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not isinstance(prefix, IPv4Network):
            self.fail(f"{value} is IPv6; the overlay is IPv4", param, ctx)
        return prefix


class OrWord(click.ParamType[Any]):
    """A value of another type, or one word."""

    def __init__(self, inner: click.ParamType[Any], word: str) -> None:
        self.inner, self.word = inner, word
        self.name = f"{inner.name}|{word}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == self.word else self.inner.convert(value, param, ctx)


class Duration(click.ParamType[int]):
    """A time span like 90m, 24h, 30d or 8w, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([1-9][0-9]{0,4})([mhdw])", value)
        if found is None:
            self.fail(f"{value!r} is not a time span like 90m, 24h, 30d or 8w", param, ctx)
        return int(found[1]) * _UNITS[found[2]]
