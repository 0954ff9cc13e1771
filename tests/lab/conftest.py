"""Labs for tests: real hosts in namespaces, in a directory of their own."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from meshd.lab import images, network
from meshd.lab.hosts import Lab, LabHost
from meshd.state.directory import State
from tests.conftest import eventually as eventually  # noqa: PLC0414  for the tests beside this file

Wait = Callable[..., None]

# `make test-long`: attacks last longer, and more is drawn at random.
LONG = os.environ.get("MESHD_LONG") == "1"

# Seconds in which Serf lists a dead member as failed. It suspects one for up to 24 s where few can confirm that, and is
# slower to begin with when its own machine is busy.
SUSPECTED = 60

# A container's web server, which answers with the address that it sees.
SERVER = (
    "mkdir -p /www/cgi-bin && printf '#!/bin/sh\\necho; echo $REMOTE_ADDR\\n' > /www/cgi-bin/peer && "
    "chmod +x /www/cgi-bin/peer && exec httpd -f -p 0.0.0.0:80 -h /www"
)


@contextmanager
def empty_lab(prefix: str = "meshd-lab-") -> Iterator[Lab]:
    """An empty lab; everything in it is gone afterwards."""
    # dockerd's overlay2 wants a real disk, and a unix socket's path is short.
    with tempfile.TemporaryDirectory(prefix=prefix, dir="/var/tmp", ignore_cleanup_errors=True) as directory:
        lab = Lab(Path(directory) / "lab")
        try:
            yield lab
        finally:
            lab.down()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """An empty lab for the tests of one module."""
    with empty_lab() as lab:
        yield lab


@contextmanager
def capture(lab: Lab, expression: str = "not arp and not icmp6") -> Iterator[list[bytes]]:
    """Hear the packets on the underlay while the block runs; afterwards the list holds the whole capture."""
    heard: list[bytes] = []
    with capturing(lab, expression) as path:
        yield heard
    heard.append(path.read_bytes())
    path.unlink()


@contextmanager
def capturing(lab: Lab, expression: str) -> Iterator[Path]:
    """Hear the packets on the underlay while the block runs; the file holds what was heard so far."""
    path = lab.directory / f"capture-{time.monotonic_ns()}"
    command = ["tcpdump", "-ni", network.BRIDGE, "--immediate-mode", "-U", "-w", str(path), expression]
    dump = lab.switch.popen(command, stderr=subprocess.PIPE)
    assert dump.stderr is not None
    try:
        while "listening on" not in dump.stderr.readline():
            assert dump.poll() is None
        yield path
        assert dump.poll() is None, "tcpdump has heard it to the end"
    finally:
        lab.switch.run(["pkill", "-INT", "-f", str(path)], check=False)
        dump.communicate(timeout=10)


@contextmanager
def dropping(lab: Lab, size: int) -> Iterator[None]:
    """Have the switch drop what is larger than so many bytes, without a word, while the block runs."""
    chain = f"chain forward {{ type filter hook forward priority 0; meta length > {size} drop; }}"
    lab.switch.run(["nft", "-f", "-"], text=f"table bridge narrow {{ {chain}; }}")
    try:
        yield
    finally:
        lab.switch.run(["nft", "delete", "table", "bridge", "narrow"])


def tcpdump(host: LabHost, link: str, expression: str, count: int = 1) -> "subprocess.Popen[str]":
    """Start a tcpdump that ends after so many packets, or 20 s, and prints a line for each; return when it listens."""
    command = ["timeout", "20", "tcpdump", "-lnqc", str(count), "-i", link, "--immediate-mode", expression]
    dump = host.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert dump.stderr is not None
    while "listening on" not in dump.stderr.readline():
        assert dump.poll() is None
    return dump


PCAP_HEADER = 24
# From whatever source: a host that sends by another way than wg0 puts its underlay address there. The switch, which is
# the neighbour in some tests, may try.
IN_CLEAR = f"dst net 172.20.0.0/16 and not src host {network.GATEWAY}"
# A subnet that no host of a lab has.
NOBODYS = "172.20.250.1"
# Says that it is there; sends to each address until its input ends, whatever comes of it.
TALK = """
import select, socket, sys
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print("here", flush=True)
while not select.select([sys.stdin], [], [], 0.02)[0]:
    for target in sys.argv[1:]:
        try:
            sender.sendto(b"of the overlay", (target, 9))
        except OSError:
            pass
"""


@contextmanager
def nothing_in_clear(lab: Lab, *hosts: LabHost) -> Iterator[None]:
    """Fail if a packet for the overlay is on the underlay outside of WireGuard while the block runs.

    All the while `hosts` and their containers `box` send to each other, and to a subnet that nobody has.
    """
    with capture(lab, IN_CLEAR) as heard, ExitStack() as stack:
        for host in hosts:
            stack.enter_context(talking(host, *hosts))
        yield
    assert len(heard[0]) == PCAP_HEADER, f"overlay traffic in clear: {heard[0][:200]!r}"


@contextmanager
def talking(host: LabHost, *others: LabHost) -> Iterator[None]:
    """Let a host and its container `box` send to the others and theirs, and to a subnet that nobody has."""
    targets = [NOBODYS, *(overlay(other, last) for other in others if other != host for last in (0, 1))]
    command = [sys.executable, "-I", "-c", TALK, *targets]
    box = host.run(["sh", "-c", "docker inspect -f '{{.State.Pid}}' box 2>/dev/null"], check=False).stdout.strip()
    inside = [["nsenter", f"--target={box}", "--net", *command]] if box else []
    talkers = [host.popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for words in (command, *inside)]
    try:
        # What the block does may end the container: on a busy machine before anybody has entered it.
        assert all(talker.stdout and talker.stdout.readline() for talker in talkers), "they talk"
        yield
        assert all(talker.poll() is None for talker in talkers), "they talk all the while"
    finally:
        for talker in talkers:
            talker.communicate()


def assemble(
    lab: Lab, *, docker: int, plain: int = 0, root: Path | None = None, underlay: str = "ipv4"
) -> list[LabHost]:
    """Bring up a mesh of `docker` hosts with Docker and, after them, `plain` ones without, each by the one before.

    Those with Docker have a container `box` at their .1. The engine is that of the folder `root` if given.
    """
    lab.up(docker + plain, docker=False, underlay=underlay)
    hosts = lab.hosts()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda host: lab.start_docker(host, root), hosts[:docker]))
        list(pool.map(images.build, hosts[:docker]))
    invitation = init(hosts[0], *options(0, docker))
    for number in range(1, len(hosts)):
        join(hosts[number], hosts[number - 1], invitation, *options(number, docker))
    for host in hosts[:docker]:
        run_box(host)
    return hosts


def options(number: int, docker: int) -> list[str]:
    return [] if number < docker else ["--no-docker"]


def run_container(host: LabHost, name: str, *arguments: str) -> None:
    """Start a container on the overlay; `arguments` are more options, the image and its command."""
    options = ["--init", "--network", "ovl0", "--name", name, "--hostname", f"{host.name}-{name}"]
    host.run(["docker", "run", "-d", *options, *arguments])


def run_box(host: LabHost) -> None:
    """Start the container `box`, which comes back with its engine."""
    run_container(host, "box", "--restart", "always", "meshd/serf", "sleep", "100000")


def overlay(host: LabHost, last: int = 0) -> str:
    """The overlay address of a host, or of its container `last`, in a lab where nobody had to move."""
    return f"172.20.{host.address.packed[-1]}.{last}"


def address_of(host: LabHost) -> IPv4Address:
    """The overlay address of a host, also of one that had to move: what its daemon has on disk."""
    claim = State(host.directory / "meshd").claim()
    assert claim is not None
    return claim.record.address


def members(host: LabHost) -> dict[str, dict[str, str]]:
    """What `meshd members --json` says on a host, by name."""
    return {row["name"]: row for row in json.loads(host.run(["meshd", "members", "--json"]).stdout)}


def full_reach(hosts: Sequence[LabHost]) -> bool:
    """Tell whether every host reaches the overlay address of every other one."""
    targets = [str(address_of(host)) for host in hosts]
    pairs = [(host, target) for host in hosts for target in targets]
    with ThreadPoolExecutor(len(pairs)) as pool:
        return all(pool.map(ping, *zip(*pairs, strict=True)))


def settled(hosts: Sequence[LabHost]) -> bool:
    """Tell whether all hosts list exactly each other, alive, and none has anything to change."""
    names = sorted(host.name for host in hosts)
    for host in hosts:
        rows = members(host)
        if sorted(name for name, row in rows.items() if row["state"] == "alive") != names:
            return False
        if host.run(["meshd", "plan"], check=False).stdout != "no changes\n":
            return False
    return True


def peers(host: LabHost) -> list[str]:
    """The public keys that a host's WireGuard has as peers."""
    return sorted(host.run(["wg", "show", "wg0", "peers"]).stdout.split())


def invitation(host: LabHost, *options: str) -> str:
    """What `meshd invite --reusable`, on the host that holds the authority, gives to the next hosts."""
    return host.run(["meshd", "invite", "--reusable", *options]).stdout.split("MESHD_INVITE=")[1].split()[0]


# In a shell, the key of the RPC as Serf wants it.
RPC_KEY = "$(base64 -d /var/lib/meshd/rpc.key | od -An -tx1 | tr -d ' \\n')"


def serf(host: LabHost, *arguments: str) -> str:
    """Run `serf` on a host with the key of its RPC; give what it prints."""
    return host.run(["sh", "-c", f'SERF_RPC_AUTH={RPC_KEY} serf "$@"', "sh", *arguments]).stdout


def serf_lists(host: LabHost) -> set[str]:
    """The names of those whom Serf on a host lists, in whatever state."""
    return {member["name"] for member in json.loads(serf(host, "members", "-format=json"))["members"]}


def log(host: LabHost) -> str:
    """What the daemon of a host has logged."""
    return (host.directory / "meshd" / "agent.log").read_text()


def init(host: LabHost, *options: str) -> str:
    """Run `meshd init`; give the invitation that it prints."""
    done = host.run(["meshd", "init", *options])
    output = done.stdout
    assert "is blocked by" not in done.stderr, "no false alarm"
    found = re.search(r"MESHD_INVITE=(meshd\d\.\S+) meshd join (\S+)", output)
    assert found, output
    assert found[2] in map(str, host.addresses)
    return found[1]


def join(host: LabHost, via: LabHost, invitation: str, *options: str, version: int = 0) -> str:
    """Run `meshd join` by the other's main address, or by that of an IP version; give what it prints."""
    address = next(a for a in via.addresses if version in {0, a.version})
    done = host.run(["meshd", "join", str(address), *options], env={"MESHD_INVITE": invitation})
    assert "is blocked by" not in done.stderr, "no false alarm"
    return done.stdout


def snapshot(host: LabHost) -> str:
    """What meshd may change on a host: links, addresses, routes, rules, firewall, sysctls; normalised.

    Counters, empty tables and chains, handles and expiring numbers are left out.
    """
    script = r"""
    ip -o link | sed -E 's/^[0-9]+: //; s/@[^:]*//; s/ qdisc .*//' | sort
    ip -o addr | sed -E 's/^[0-9]+: //; s/ valid_lft.*//' | grep -v ' fe80:' | sort
    for v in 4 6; do ip -$v route show table all | grep -vE '^broadcast|fe80:|ff00:' | sort; done
    ip rule
    sysctl -a 2>/dev/null | grep -E -e 'net.ipv4.(ip_forward|conf.*proxy_arp|conf.*rp_filter|neigh.*proxy_delay) ' \
        -e 'net.ipv6.conf.*(forwarding|accept_ra|disable_ipv6) ' | grep -vE '\.(veth|tap)' | sort
    docker network ls --format '{{.Name}} {{.Driver}}' 2>/dev/null | sort
    iptables-save | grep -v '^#' | sed -E 's/\[[0-9:]+\]//'
    """
    text = host.run(["sh", "-c", script]).stdout
    nft = host.run(["nft", "-s", "list", "ruleset"]).stdout
    own = re.findall(r"^table \S+ meshd\S*", nft, re.MULTILINE)
    return _without_empty_tables(text) + "\n".join(own)


def _without_empty_tables(text: str) -> str:
    """Drop iptables tables that hold no rule and no chain of their own: listing one is enough to make it."""
    kept = re.sub(r"^\*\w+\n(?::[A-Z]+ ACCEPT \n)+COMMIT\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^:DOCKER-USER - \n", "", kept, flags=re.MULTILINE)


LISTEN = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
s = socket.create_server((sys.argv[1], int(sys.argv[2])), family=family)
print("here", flush=True)
while True: s.accept()
"""


@contextmanager
def listening(host: LabHost, port: int, address: str = "0.0.0.0") -> Iterator[None]:
    """A service of a host, such as an SSH server."""
    command = [sys.executable, "-I", "-c", LISTEN, address, str(port)]
    process = host.popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == "here\n"
        try:
            yield
        finally:
            host.run(["pkill", "-KILL", "-f", f"create_server.* {port}$"], check=False)
            process.wait(timeout=10)


def rtt(host: LabHost, container: str, target: str, count: int = 1) -> list[float]:
    """Ping from a container; give the round-trip times in milliseconds, in order."""
    done = host.run(
        ["docker", "exec", container, "ping", "-c", str(count), "-i", "0.2", "-W", "2", target], check=False
    )
    return [float(time) for time in re.findall(r"time=([0-9.]+) ms", done.stdout)]


def ping(host: LabHost, target: str) -> bool:
    """Tell whether the host itself reaches an address."""
    return host.run(["busybox", "ping", "-c", "1", "-W", "2", target], check=False).returncode == 0


def fetch(host: LabHost, url: str) -> str:
    """Give what a web server answers to the host itself, the empty string without an answer."""
    # Debian's static busybox cannot: its wget needs the C library's resolver, which is not linked in.
    script = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=3).read().decode())"
    return host.run([sys.executable, "-I", "-c", script, url], check=False).stdout.strip()
