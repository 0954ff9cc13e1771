"""What happens on the hosts of a lab, on one clock: the lines of their logs as they are written, and answered pings."""

import os
import re
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from threading import Event, Thread

import click
from pyroute2 import netns

from meshd.lab.hosts import LabHost

PATIENCE = 30.0
QUIET = 2.0
# Seconds between two pings of all hosts together: what watches must not be what keeps the machine busy.
PING_PAUSE = 0.002
_NEWS = re.compile(r"EventMember|member-|user-event| (add|remove|set) ")
_HEADER = re.compile(r"==> .*/([^/]+)/meshd/\w+\.log <==")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a log, and when it was there: seconds of time.monotonic()."""

    at: float
    text: str


@dataclass
class Journal:
    """The lines that each host's Serf and daemon have logged since it was last settled."""

    lines: dict[str, list[Line]] = field(default_factory=dict)

    def first(self, host: LabHost, text: str, after: float = 0.0) -> float | None:
        """Give when the first line with this text, or one of several between `|`, was there; None if there is none."""
        texts = text.split("|")
        lines = (line for line in self.lines[host.name] if line.at >= after)
        return next((line.at for line in lines if any(one in line.text for one in texts)), None)

    def on_each(self, hosts: Sequence[LabHost], text: str, after: Mapping[str, float]) -> dict[str, float]:
        """Wait until every host has logged this text after a moment of its own; give when, by the hosts' names.

        Serf does not tell everybody of everything: a leave may overtake an update. Of ten hosts one may be missing in
        the end, which is said.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            found = {host.name: self.first(host, text, after[host.name]) for host in hosts if host.name in after}
            missing = [name for name, at in found.items() if at is None]
            late = time.monotonic() > deadline
            if late and len(missing) * 10 > len(hosts):
                raise TimeoutError(f"{text!r} is not in the logs of {', '.join(missing)}")
            if late and missing:
                click.echo(f"Not in the logs of {', '.join(missing)}, and left out: {text!r}", err=True)
            if late or not missing:
                return {name: at for name, at in found.items() if at is not None}
            time.sleep(0.05)

    def settle(self) -> None:
        """Wait until nothing has happened in the mesh for QUIET seconds, or PATIENCE is over, and forget all lines."""
        deadline = time.monotonic() + PATIENCE
        while (now := time.monotonic()) < deadline:
            lines = [line for of_host in self.lines.values() for line in of_host]
            if now - max((line.at for line in lines if _NEWS.search(line.text)), default=0.0) > QUIET:
                break
            time.sleep(0.1)
        for name in self.lines:
            self.lines[name] = []


@contextmanager
def watching(hosts: Sequence[LabHost]) -> Iterator[Journal]:
    """Read the logs of these hosts while the block runs, also those that are not there yet."""
    journal = Journal({host.name: [] for host in hosts})
    paths = [f"{host.directory}/meshd/{name}.log" for host in hosts for name in ("serf", "agent")]
    # Serf's log has whole seconds. What tail gives is as sharp as its turn on a processor comes soon.
    command = ["chrt", "--rr", "2", "tail", "--follow=name", "--retry", "--verbose", "--lines=0", *paths]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as tail:
        reader = Thread(target=_read, args=(tail, journal))
        reader.start()
        try:
            time.sleep(0.5)  # it watches what is there from its start on
            yield journal
        finally:
            tail.terminate()
            reader.join()


def _read(tail: "subprocess.Popen[str]", journal: Journal) -> None:
    _hurry()
    assert tail.stdout is not None
    name = ""
    for text in tail.stdout:
        if header := _HEADER.match(text):
            name = header[1]
        elif name:
            journal.lines[name].append(Line(time.monotonic(), text.rstrip()))


def _hurry() -> None:
    """Let this thread run as soon as it can: few processors carry all hosts, and a late observer measures itself."""
    os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))


@contextmanager
def pinging(hosts: Sequence[LabHost], target: IPv4Address, *, patience: float = PATIENCE) -> Iterator[dict[str, float]]:
    """Ping an address from each host until it has answered there once; the dict says when, by the hosts' names.

    Who has got no answer within `patience` seconds after the block is not in it.
    """
    answered: dict[str, float] = {}
    stopping = Event()
    sockets = {_icmp(host): host.name for host in hosts}
    pause = len(hosts) * PING_PAUSE
    thread = Thread(target=_ping, args=(sockets, target, pause, answered, stopping))
    thread.start()
    try:
        yield answered
        deadline = time.monotonic() + patience
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(0.1)
    finally:
        stopping.set()
        thread.join()
        for connection in sockets:
            connection.close()


def _icmp(host: LabHost) -> socket.socket:
    """Give a raw socket in the host's network."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        netns.setns(f"/proc/{host.pid}/ns/net", flags=0)
        return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    finally:
        netns.setns(before)
        os.close(before)


def _ping(
    sockets: dict[socket.socket, str], target: IPv4Address, pause: float, answered: dict[str, float], stopping: Event
) -> None:
    _hurry()
    # An echo request: type 8, code 0, checksum, identifier and number 0.
    request, to = struct.pack("!BBHHH", 8, 0, 0xF7FF, 0, 0), (str(target), 0)
    waiting = dict(sockets)
    while waiting and not stopping.is_set():
        for connection in waiting:
            with suppress(OSError):  # no route yet
                connection.sendto(request, to)
        until = time.monotonic() + pause
        while waiting and (left := until - time.monotonic()) > 0:
            for connection in select.select(list(waiting), [], [], left)[0]:
                packet, (source, _) = connection.recvfrom(1500)
                if source == str(target) and packet[(packet[0] & 15) * 4] == 0:
                    answered[waiting.pop(connection)] = time.monotonic()
