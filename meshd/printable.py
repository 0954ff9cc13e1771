r"""Text that someone else wrote, made safe for a log line, a terminal and JSON.

It is done twice. What other members wrote is made printable and cut where it comes in (gossip.serf.client). Whatever is
printed (cli.output) or logged (daemon.log) is made printable once more, so that a new message needs no thought.
"""

from typing import Any

# A name in Serf has no limit of its own, and neither has a tag before a record is made of it.
LIMIT = 512


def printable(text: object, limit: int | None = LIMIT) -> str:
    r"""Return a text on one line, in which nothing acts on a terminal; what does is written as `\x1b` or `\u202e`.

    That is what str.isprintable refuses: control, format and bidirectional characters, line separators, surrogates and
    every space but the plain one. A text that was changed is never a valid name, address or key, since it has a
    backslash. What is longer than `limit` characters is cut.
    """
    text = str(text)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else _escaped(c) for c in (text if limit is None else text[: limit + 1]))
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def printable_json(value: Any) -> Any:
    """Return a JSON value with all its texts and keys made printable: `jq -r` prints them as they are."""
    if isinstance(value, str):
        return printable(value, None)
    if isinstance(value, dict):
        return {printable(key, None): printable_json(entry) for key, entry in value.items()}
    return [printable_json(entry) for entry in value] if isinstance(value, list | tuple) else value


def _escaped(character: str) -> str:
    number = ord(character)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
