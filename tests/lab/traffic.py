"""Traffic between containers that has to come through whole, whatever happens meanwhile."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from meshd.lab.hosts import LabHost
from tests.lab.conftest import eventually, overlay

# Pings an address every so many seconds until SIGINT, and says which numbers were answered. It has room for the answers
# of a minute. busybox's ping has room for 20, and loses what comes at once after a busy machine has held it back.
PINGER = """
import os, select, signal, socket, struct, sys, time
target, interval = sys.argv[1], float(sys.argv[2])
stopped, number, due, own = [], 0, time.monotonic(), os.getpid() & 0xffff
signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
pings = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
pings.setsockopt(socket.SOL_SOCKET, 33, 1 << 23)  # SO_RCVBUFFORCE
pings.connect((target, 0))
while not stopped:
    if select.select([pings], [], [], max(0, due - time.monotonic()))[0]:
        kind, _, _, whose, answered = struct.unpack("!BBHHH", pings.recv(2048)[20:28])
        if (kind, whose) == (0, own):
            print(f"seq={answered}", flush=True)
    if time.monotonic() >= due:
        checksum = 0xffff - (0x800 + own + number) % 0xffff
        pings.send(struct.pack("!BBHHH", 8, 0, checksum, own, number))
        number, due = number + 1, max(due + interval, time.monotonic())
print(number, "packets transmitted")
"""


def pinging(target: str, interval: float) -> list[str]:
    return [sys.executable, "-I", "-c", PINGER, target, str(interval)]


@contextmanager
def traffic(source: LabHost, target: LabHost) -> Iterator[None]:
    """100 pings a second and a TCP stream between containers, which both must come through whole.

    Of 200 kB/s: what comes while a busy machine gives wireguard-go no time, fits into its buffer for half a second.
    """
    address, stop = overlay(target, 1), threading.Event()
    # busybox's nc hangs up when its own input ends, so that stays open.
    server = ["docker", "exec", "-i", "box", "sh", "-c", "nc -l -p 7000 | wc -c"]
    receiver = target.popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    eventually(lambda: "7000" in target.run(["docker", "exec", "box", "netstat", "-ltn"]).stdout, 5, "nc listens")
    # A file and not a pipe, which nobody would empty while the fault lasts.
    said = source.directory / "pings"
    with said.open("w") as file:
        box = source.run(["docker", "inspect", "-f", "{{.State.Pid}}", "box"]).stdout.strip()
        pings = source.popen(["nsenter", f"--target={box}", "--net", *pinging(address, 0.01)], stdout=file)
    eventually(lambda: "seq=0" in said.read_text(), 10, "the first ping is answered")
    sender = source.popen(["docker", "exec", "-i", "box", "nc", address, "7000"], stdin=subprocess.PIPE)
    assert sender.stdin is not None
    sent = 0

    def send() -> None:
        nonlocal sent
        assert sender.stdin is not None
        while not stop.wait(0.01):
            sender.stdin.write("x" * 2_000)
            sender.stdin.flush()
            sent += 2_000

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sender.stdin.close()
        sender.wait(timeout=10)
        received, _ = receiver.communicate(timeout=10)
        source.run(["pkill", "-INT", "-f", f"packets transmitted.* {address} "])
        pings.wait(timeout=10)
    lost = lost_pings(said.read_text(), 5)
    assert not lost, lost
    assert int(received) == sent > 0


@contextmanager
def unbroken(pairs: Sequence[tuple[LabHost, LabHost]]) -> Iterator[list[str]]:
    """20 pings a second from one host to the other of each pair; afterwards the list says which have lost some."""
    wrong: list[str] = []
    flows = []
    for number, (source, target) in enumerate(pairs):
        said = source.directory / f"unbroken{number}"
        with said.open("w") as file:
            flows.append((source, target, said, source.popen(pinging(overlay(target), 0.05), stdout=file)))
    try:
        for source, target, said, _ in flows:
            eventually(lambda said=said: "seq=0" in said.read_text(), 10, f"{source.name} reaches {target.name}")  # type: ignore[misc]
        yield wrong
    finally:
        for host in {source.name: source for source, _ in pairs}.values():
            host.run(["pkill", "-INT", "-f", "packets transmitted.* 0.05$"], check=False)
        for *_, flow in flows:
            flow.wait(timeout=10)
    for source, target, said, _ in flows:
        if lost := lost_pings(said.read_text(), 2):
            wrong.append(f"{source.name} to {target.name}: {lost}")


def lost_pings(statistics: str, under_way: int) -> str:
    """Return what ping has lost according to its output, the empty string for nothing.

    All answers have to be there, in whatever order two cores deliver them. The last ones may be on their way back when
    ping is told to stop: on a busy machine 50 ms.
    """
    answered = sorted(int(number) for number in re.findall(r"seq=(\d+)", statistics))
    sent = int(statistics.partition(" packets transmitted")[0].split()[-1])
    if answered == list(range(len(answered))) and sent - len(answered) <= under_way:
        return ""
    return f"of {sent} pings {len(answered)} were answered, not the numbers {sorted({*range(sent)} - {*answered})}"
