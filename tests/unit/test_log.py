"""What the daemon writes to its log, as another process that has a real pipe or file as its stderr."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import logging, sys
from meshd.daemon import log
log.configure(sys.stderr)
meshd = logging.getLogger("meshd")
meshd.debug("not shown")
meshd.info("one")
meshd.warning("two\\n2026-11-26 INFO forged \\x1b[2J")
try:
    raise ValueError("surprise\\n2026-11-26 INFO forged \\u202e")
except ValueError:
    meshd.exception("three")
"""


def logged(path: Path, journal: str | None) -> list[str]:
    """Run the script with the file as its stderr; `journal` is $JOURNAL_STREAM, by default that of the file."""
    with path.open("w+") as file:
        status = os.fstat(file.fileno())
        variable = f"{status.st_dev}:{status.st_ino}" if journal is None else journal
        environment = {**os.environ, "JOURNAL_STREAM": variable}
        subprocess.run([sys.executable, "-c", SCRIPT], stderr=file, env=environment, check=True, timeout=60)
        file.seek(0)
        return file.read().splitlines()


def test_log_to_journal_has_priorities(tmp_path: Path) -> None:
    """In the journal each line has a priority and no time."""
    lines = logged(tmp_path / "journal", None)
    assert lines[:3] == ["<6>one", "<4>two\\x0a2026-11-26 INFO forged \\x1b[2J", "<3>three"]
    assert lines[3] == "<3>  Traceback (most recent call last):"
    assert lines[-2:] == ["<3>  ValueError: surprise", "<3>  2026-11-26 INFO forged \\u202e"]
    assert all(re.match(r"<[3467]>", line) for line in lines)


def test_log_elsewhere_has_times(tmp_path: Path) -> None:
    """Elsewhere each message has a time and a level, also if a parent of this process had the journal."""
    for number, variable in enumerate(("", "8:1", "nonsense")):
        lines = logged(tmp_path / str(number), variable)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO one", lines[0])
        assert lines[1].endswith(" WARNING two\\x0a2026-11-26 INFO forged \\x1b[2J"), "and forges no line"
        assert lines[-2:] == ["  ValueError: surprise", "  2026-11-26 INFO forged \\u202e"], "nor does a traceback"
