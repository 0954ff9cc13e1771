"""`python stand.py DIRECTORY LINK MEMBERS`, by the Python of the revision that is measured: what only it knows.

It fills a state directory, answers there as Serf with so many members until its input ends, and says in a line of JSON
how Serf would start the handler, and at which socket the handler finds the daemon. `tests` is the revision's own.
"""

import json
import shlex
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.bench import members
from tests.bench.stand_in import serving

PORT = 7373


def main() -> None:
    """Serve until standard input ends."""
    directory, link, size = sys.argv[1:]
    state = _first("State", "meshd.state.directory", "meshd.state")(Path(directory))
    handler = _first("handler_command", "meshd.gossip.serf_agent", "meshd.gossip")(state)
    own = members.fill(state, PORT, link)
    listed = [own, *(members.member(number) for number in range(1, int(size) + 1))]
    with serving(PORT, state.rpc_key, listed):
        print(json.dumps({"handler": shlex.split(handler), "socket": str(state.socket)}), flush=True)  # noqa: T201  the answer
        sys.stdin.read()


def _first(name: str, *modules: str) -> Any:
    """Return what has this name in the first of these modules that has it: today's, then those of older revisions."""
    for module in modules:
        with suppress(ImportError, AttributeError):
            return getattr(import_module(module), name)
    raise ImportError(f"{name} is in none of {', '.join(modules)}: add the module of this revision to stand.py")


if __name__ == "__main__":
    main()
