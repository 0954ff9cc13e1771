"""The handler that Serf executes, with a daemon's socket to hint, beside a Python that does nothing."""

import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from meshd.daemon import hints
from meshd.gossip import serf_agent
from meshd.state.directory import State
from tests.bench import members as simulated
from tests.bench.report import Result, Target

EMPTY = [sys.executable, "-I", "-S", "-c", "pass"]


def run(*, quick: bool) -> Result:
    """Run both in turn, each from exec to exit."""
    pairs = 50 if quick else 300
    with tempfile.TemporaryDirectory(prefix="meshd-bench-") as directory:
        state = State(Path(directory))
        simulated.fill(state, 7373, "wg0")
        handler = shlex.split(serf_agent.handler_command(state))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
            server.bind(str(state.socket))
            reader = Thread(target=_drain, args=(server,))
            reader.start()
            times = [(_wall(EMPTY), _wall(handler)) for _ in range(pairs)]
            hints.wake(state.socket, "end")
            reader.join()
    empty, ours = ([pair[place] * 1e3 for pair in times] for place in (0, 1))
    rows = [_row("python3 -I -S -c pass", empty), _row("meshd's handler", ours)]
    target = Target(
        "the handler to an empty Python", statistics.median(ours) / statistics.median(empty), 3, "times its wall time"
    )
    return Result("handler", "The handler", rows, (target,), partial(_draw, empty, ours))


def _drain(server: socket.socket) -> None:
    while server.recv(512) != b"end":
        pass


def _wall(command: list[str]) -> float:
    environment = {"PATH": os.environ["PATH"], "SERF_EVENT": "member-update"}
    begun = time.perf_counter()
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


def _row(name: str, times: list[float]) -> dict[str, Any]:
    median, p90 = statistics.median(times), statistics.quantiles(times, n=10)[-1]
    return {"program": name, "median ms": round(median, 1), "p90 ms": round(p90, 1), "runs": len(times)}


def _draw(empty: list[float], ours: list[float], axes: Any) -> None:
    for times, label in ((empty, "python3 -I -S -c pass"), (ours, "meshd's handler")):
        shares = [(place + 1) / len(times) * 100 for place in range(len(times))]
        axes.step(sorted(times), shares, where="post", label=label)
    axes.set(xlabel="exec to exit, ms", ylabel="of the runs, %", xlim=(0, statistics.quantiles(ours, n=50)[-1] * 1.1))
    axes.legend(frameon=False, loc="lower right")
