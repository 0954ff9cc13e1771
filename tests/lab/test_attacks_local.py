"""What must not work from close by: local users, containers, and whoever looks at a host from the underlay.

barge1 has Docker, barge2 has not, and barge3 is a stranger beside them.
"""

import base64
import subprocess
import sys

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import assemble, invitation, listening, log, overlay, run_container, serf

pytestmark = [pytest.mark.root, pytest.mark.lab]

STATE = "/var/lib/meshd"
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    hosts = assemble(lab, docker=1, plain=1)
    lab.power_on("barge3")
    return hosts


# --- a local user ----------------------------------------------------------------------------------------------------


def as_nobody(host: LabHost, *command: str) -> "subprocess.CompletedProcess[str]":
    return host.run([*NOBODY, *command], check=False)


def python_as_nobody(host: LabHost, script: str) -> str:
    """Run Debian's own Python as nobody: the test's may be below /root, out of nobody's reach. Give what it says."""
    done = as_nobody(host, "/usr/bin/python3", "-I", "-c", script)
    return done.stdout + done.stderr


def test_local_user_reads_no_secret(hosts: list[LabHost]) -> None:
    """A local user can read no file of the state directory."""
    for host in hosts:
        files = host.run(["find", STATE, "-type", "f"]).stdout.split()
        assert f"{STATE}/gossip.key" in files
        for file in files:
            done = as_nobody(host, "cat", file)
            assert (done.returncode, done.stdout) == (1, ""), file
        modes = host.run(["find", STATE, "-printf", "%y %m\n"]).stdout.splitlines()
        assert set(modes) <= {"d 700", "f 600", "s 600"}, modes


def test_local_user_gets_no_answer_from_serf(hosts: list[LabHost]) -> None:
    """A local user without the RPC key gets no answer from Serf."""
    assert "barge1" in serf(hosts[0], "members"), "with the key it answers"
    for command in (["members"], ["keys", "-list"], ["tags", "-set", "wg=x"], ["leave"]):
        done = as_nobody(hosts[0], "serf", *command)
        assert done.returncode != 0
        assert "barge" not in done.stdout
    assert "barge1" in serf(hosts[0], "members"), "and it is still there"


@pytest.mark.parametrize("path", [f"{STATE}/agent.sock", "/run/wireguard/wg0.sock"])
def test_local_user_reaches_no_socket(hosts: list[LabHost], path: str) -> None:
    """A local user reaches neither the daemon's socket nor that of wireguard-go."""
    kind = "SOCK_DGRAM" if "agent" in path else "SOCK_STREAM"
    script = f"import socket; socket.socket(socket.AF_UNIX, socket.{kind}).connect({path!r})"
    assert hosts[0].run(["/usr/bin/python3", "-I", "-c", script]).stderr == "", "for root it is there"
    assert "PermissionError" in python_as_nobody(hosts[0], script)


def secrets(host: LabHost) -> dict[str, list[str]]:
    """Every secret of a host, in each way that it could be written."""
    found = {}
    for name in ("gossip", "rpc", "wireguard", "identity", "authority"):
        text = host.run(["cat", f"{STATE}/{name}.key"], check=False).stdout.strip()
        if text:
            raw = base64.b64decode(text)
            found[name] = [text.rstrip("="), raw.hex(), base64.urlsafe_b64encode(raw).decode().rstrip("=")]
    return found


def test_no_secret_in_arguments_environment_logs_or_output(hosts: list[LabHost]) -> None:
    """No secret is in arguments, environments, logs or output."""
    offer = invitation(hosts[0])
    for host in hosts:
        # A command that starts the daemon, with an invitation in its environment.
        host.run(["sh", "-ec", f"kill -KILL $(cat {STATE}/agent.pid); kill -KILL $(pgrep -f '^[^ ]*serf agent')"])
        host.run(["meshd", "join", str(hosts[1].address)], env={"MESHD_INVITE": offer})
        look = "for p in $(pgrep -f 'meshd|serf|wireguard-go|dockerd'); do cat /proc/$p/cmdline /proc/$p/environ; done"
        text = host.run(["sh", "-c", look], check=False).stdout
        assert f"{STATE}/serf.json" in text, "Serf is among them"
        text += log(host) + (host.directory / "meshd" / "serf.log").read_text(errors="replace")
        for command in ("members", "status", "plan", "sync"):
            text += host.run(["meshd", command, "--json"], check=False).stdout
        own = secrets(host)
        assert {"gossip", "rpc", "wireguard", "identity"} <= own.keys()
        assert "meshd3." not in text
        assert [name for name, ways in own.items() for way in ways if way in text] == []


# --- a malicious container -------------------------------------------------------------------------------------------


def connects(host: LabHost, address: str, port: int) -> bool:
    """Tell whether the container `box` can open a TCP connection."""
    command = ["docker", "exec", "-i", "box", "nc", "-w", "1", address, str(port), "-e", "true"]
    return host.run(command, check=False).returncode == 0


def test_container_reaches_no_service_of_host(hosts: list[LabHost]) -> None:
    """A container reaches a service of a host only if `--allow` opens it."""
    one, two = hosts
    with listening(one, 2222), listening(two, 2222):
        for address in (overlay(one), overlay(two), str(one.address)):
            assert not connects(one, address, 2222), address
        allow(hosts, "tcp/2222")
        for address in (overlay(one), overlay(two), str(one.address)):
            assert connects(one, address, 2222), f"{address} is open when the operator says so"
        allow(hosts, "none")
        assert not connects(one, overlay(two), 2222)


def allow(hosts: list[LabHost], what: str) -> None:
    for host in hosts:
        host.run(["meshd", "up", "--allow", what])
        rules = host.run(["nft", "list", "chain", "ip", "meshd_wg0", "input"]).stdout
        assert ("dport 2222 accept" in rules) is (what != "none")


def test_container_reaches_no_meshd(hosts: list[LabHost]) -> None:
    """A container reaches neither gossip nor RPC."""
    one, two = hosts
    for address in (overlay(one), overlay(two), str(one.address)):
        for port in (7946, 7373):
            assert not connects(one, address, port), (address, port)


def test_container_cannot_use_foreign_address(hosts: list[LabHost]) -> None:
    """A container cannot send with the address of another host's container."""
    one, two = hosts
    run_container(one, "liar", "--cap-add", "NET_ADMIN", "meshd/serf", "sleep", "1000")
    try:
        liar = ["docker", "exec", "liar"]
        one.run([*liar, "ip", "addr", "add", f"{overlay(two, 9)}/32", "dev", "eth0"])
        dump = one.popen(["timeout", "6", "tcpdump", "-lnqi", "wg0", "icmp"], stdout=-1, stderr=-1)
        assert dump.stderr is not None
        while "listening on" not in dump.stderr.readline():
            assert dump.poll() is None
        for source in ([], ["-I", overlay(two, 9)]):
            one.run([*liar, "ping", "-c", "3", "-i", "0.2", "-W", "1", *source, overlay(two)], check=False)
        one.run(["pkill", "-INT", "-x", "tcpdump"])
        heard = dump.communicate(timeout=10)[0]
        # Three with its own address. Those with the other one would leave too: masqueraded, as from the host itself.
        assert heard.count(f"> {overlay(two)}: ICMP echo request") == 3, heard
        assert overlay(two, 9) not in heard
    finally:
        one.run(["docker", "rm", "-f", "liar"])


# --- from the underlay -----------------------------------------------------------------------------------------------

SCAN = """
import errno, select, socket, sys
found = set()
for first in range(1, 65536, 512):
    poll, waiting = select.poll(), {}
    for port in range(first, min(first + 512, 65536)):
        s = socket.socket(); s.setblocking(False)
        code = s.connect_ex((sys.argv[1], port))
        if code == 0: found.add(port)
        elif code == errno.EINPROGRESS: waiting[s.fileno()] = (s, port); poll.register(s, select.POLLOUT)
    for _ in range(20):
        for fd, _ in poll.poll(50) if waiting else ():
            s, port = waiting.pop(fd); poll.unregister(fd)
            if s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0: found.add(port)
        if not waiting: break
print(sorted(found))
"""


def test_port_scan_finds_only_gossip_and_wireguard(lab: Lab, hosts: list[LabHost]) -> None:
    """A port scan from the underlay finds gossip and WireGuard, nothing else."""
    stranger = lab.host("barge3")
    for host in hosts:
        assert stranger.run([sys.executable, "-I", "-c", SCAN, str(host.address)]).stdout == "[7946]\n"
        sockets = host.run(["sh", "-c", "cat /proc/net/udp /proc/net/udp6"]).stdout.splitlines()
        bound = {line.split()[1] for line in sockets if ":" in line.split()[1]}
        ports = {int(b.rpartition(":")[2], 16) for b in bound if not b.startswith("0100007F")}
        assert ports == {7946, 51820}


def test_container_is_closed_to_underlay(lab: Lab, hosts: list[LabHost]) -> None:
    """A container is closed to the underlay."""
    one, stranger = hosts[0], lab.host("barge3")
    stranger.run(["ip", "route", "add", "172.20.0.0/16", "via", str(one.address)])
    try:
        for target in (overlay(one, 1), overlay(one)):
            done = stranger.run(["busybox", "ping", "-c", "1", "-W", "1", target], check=False)
            assert (done.returncode == 0) is (target == overlay(one)), target
    finally:
        stranger.run(["ip", "route", "del", "172.20.0.0/16"])
