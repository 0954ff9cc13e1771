"""Text that someone else wrote, made safe for a log line, a terminal, JSON and a page."""

# A name in Serf has no limit of its own, and neither has a tag before a record is made of it.
LIMIT = 512


def printable(text: str, limit: int = LIMIT) -> str:
    r"""Return a text on one line, in which nothing acts on a terminal; what does is written as `\x1b` or `\u202e`.

    That is what str.isprintable refuses: control, format and bidirectional characters, line separators, surrogates and
    every space but the plain one. A text that was changed is never a valid name, address or key, since it has a
    backslash. What is longer than `limit` characters is cut.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else _escaped(c) for c in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _escaped(character: str) -> str:
    number = ord(character)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
