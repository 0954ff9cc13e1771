"""Where the daemon's log goes: lines with a time, or, to the journal, lines with a priority (sd-daemon(3))."""

import logging
import os
from typing import Any, TextIO

from meshd.printable import printable

PLAIN = "%(asctime)s %(levelname)s %(message)s"
# The levels of syslog(3), for the journal: error, warning, info, debug.
PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.NOTSET, 7))


# Longer than any message of meshd's own.
LONGEST = 4096


class LineFormatter(logging.Formatter):
    """One line a message, whatever is in it: members and other programs write parts of many.

    The lines of a traceback are indented: the text of an exception may have lines that look like others of the log.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        record.message = printable(record.message, LONGEST)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802  as above
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  {printable(line, LONGEST)}" for line in lines)


class JournalFormatter(LineFormatter):
    """Lines for the journal, which has a time for each of them by itself."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next(number for level, number in PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def is_journal(stream: TextIO) -> bool:
    """Return whether systemd has connected this stream to the journal (JOURNAL_STREAM in systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def configure(stream: TextIO) -> None:
    """Log to a stream from now on."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JournalFormatter("%(message)s") if is_journal(stream) else LineFormatter(PLAIN))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
