"""A process that passes for the Serf agent of a daemon, with as many simulated members as wanted.

The daemon looks for `serf agent -config-file=…` before it starts one: `start` runs a file `agent` under that name.
"""

import signal
import subprocess
import sys
from pathlib import Path

from meshd.lab.hosts import LabHost
from meshd.state.directory import State
from tests.bench import members as simulated
from tests.bench.stand_in import serving

STATE = Path("/var/lib/meshd")
PORT = 7373
_ROOT = Path(__file__).parents[2]


def start(host: LabHost, size: int) -> None:
    """Fill a host's state directory and answer there for `size` members; it ends with its host."""
    (host.directory / "agent").write_text("from tests.bench.pretend import main\nmain()\n")
    # Python finds the packages of its environment by its own name's folder.
    name = Path(sys.executable).with_name("serf")
    script = f'cd {host.directory} && exec -a {name} {sys.executable} agent "$@"'
    words = ["env", f"PYTHONPATH={_ROOT}", "bash", "-c", script, "bash", f"-config-file={STATE}/serf.json", str(size)]
    process = host.popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.returncode = 0  # it outlives this command


def main() -> None:
    state, size = State(STATE), int(sys.argv[2])
    own = simulated.fill(state, PORT, "wg0", docker=True)
    listed = [own, *(simulated.member(number) for number in range(1, size + 1))]
    with serving(PORT, state.rpc_key, listed, state.gossip_key):
        print("ready", flush=True)  # noqa: T201  the answer
        signal.pause()
