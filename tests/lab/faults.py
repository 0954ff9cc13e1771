"""What goes wrong on a host, each fault in one place: tests of one fault and the run of random faults share them."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from meshd.lab import network
from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import eventually, overlay, serf

STATE = "/var/lib/meshd"
KILL_DAEMON = f"kill -KILL $(cat {STATE}/agent.pid)"
SERF = f"$(pgrep -f '^[^ ]*serf agent -config-file={STATE}')"

# The kernel or Docker tells of it; only the timer finds it. Seconds.
TOLD, FOUND = 1.0, 10.0


@dataclass(frozen=True, slots=True)
class Hand:
    """What somebody else does on a host: a shell command, and the seconds within which it is put right.

    In the command, $OWN and $OTHER are the overlay addresses of the host and of another one. `what` is how the log
    names the change that puts it right, `seen` by what means the daemon has come to know: patterns.
    """

    command: str
    what: str
    seen: str
    limit: float = TOLD
    docker: bool = False

    def on(self, host: LabHost, other: LabHost) -> None:
        host.run(["sh", "-ec", self.command], env={"OWN": overlay(host), "OTHER": overlay(other)})


HANDS = {
    "a peer removed": Hand("wg set wg0 peer $(wg show wg0 peers | head -1) remove", "add peer", "timer", FOUND),
    "a route removed": Hand("ip route del $OTHER/24", r"add route 172\.20\.10\d\.0/24", "netlink: route"),
    "the unreachable route removed": Hand(
        "ip route del unreachable 172.20.0.0/16 metric 4278198272", "add route unreachable", "netlink: route"
    ),
    "the address of wg0 removed": Hand("ip addr del $OWN/32 dev wg0", "add address .* dev wg0", "netlink: address"),
    "the address of ovl0 removed": Hand(
        "ip addr del $OWN/16 dev ovl0", "add address .* dev ovl0", "netlink: address", docker=True
    ),
    "wg0 down": Hand("ip link set wg0 down", "set link wg0", "netlink: link wg0"),
    "wg0 deleted": Hand("ip link del wg0", "add wireguard wg0", "netlink: link wg0"),
    "ovl0 down": Hand("ip link set ovl0 down", "set link ovl0", "netlink: link ovl0", docker=True),
    "ovl0 deleted": Hand("ip link del ovl0", "add link ovl0", "netlink: link ovl0", docker=True),
    "another MTU of wg0": Hand("ip link set wg0 mtu 1300", "set link wg0", "netlink: link wg0"),
    "another MTU of ovl0": Hand("ip link set ovl0 mtu 1300", "set link ovl0", "netlink: link ovl0", docker=True),
    "proxy_arp off": Hand(
        "sysctl -qw net.ipv4.conf.ovl0.proxy_arp=0", "set sysctl .*proxy_arp = 1", "netlink: sysctls", docker=True
    ),
    "forwarding of wg0 off": Hand(
        "sysctl -qw net.ipv4.conf.wg0.forwarding=0", "set .*wg0/forwarding = 1", "netlink: sysctls", docker=True
    ),
    "forwarding of ovl0 off": Hand(
        "sysctl -qw net.ipv4.conf.ovl0.forwarding=0", "set .*ovl0/forwarding = 1", "netlink: sysctls", docker=True
    ),
    "ip_forward off": Hand(
        "sysctl -qw net.ipv4.ip_forward=0", "set sysctl .*ip_forward = 1", "netlink: sysctls", docker=True
    ),
    "proxy_delay back": Hand(
        "sysctl -qw net.ipv4.neigh.ovl0.proxy_delay=80", "set sysctl .*proxy_delay = 0", "timer", FOUND, docker=True
    ),
    "a firewall rule removed": Hand(
        "nft delete rule ip meshd_wg0 output handle $(nft -a list chain ip meshd_wg0 output | sed -n 's/.*drop.* //p')",
        "set nftables table ip meshd_wg0",
        "nftables: meshd_wg0",
    ),
    "the firewall table removed": Hand(
        "nft delete table ip meshd_wg0", "add nftables table ip meshd_wg0", "nftables: meshd_wg0"
    ),
    "the firewall table of IPv6 removed": Hand(
        "nft delete table ip6 meshd_wg0", "add nftables table ip6 meshd_wg0", "nftables: meshd_wg0"
    ),
    "IPv6 turned on": Hand("sysctl -qw net.ipv6.conf.all.disable_ipv6=0", "set link wg0", "netlink: address"),
    "a rule put before": Hand(
        "nft insert rule ip meshd_wg0 postrouting masquerade", "set nftables table ip meshd_wg0", "nftables: meshd_wg0"
    ),
    "a rule removed from Docker's chain": Hand(
        "iptables -w -D DOCKER-USER 1", "add iptables rule filter DOCKER-USER", "nftables: DOCKER-USER", docker=True
    ),
    "iptables -F": Hand("iptables -w -F", "add iptables rule filter FORWARD", "nftables: DOCKER-USER", docker=True),
    "nft flush ruleset": Hand("nft flush ruleset", "add nftables table ip meshd_wg0", "nftables: meshd_wg0"),
    "wireguard-go killed": Hand("pkill -KILL -x wireguard-go", "add wireguard wg0", "netlink: link wg0", 3.0),
}
# After these Docker's own rules come back with dockerd alone.
FLUSHED = frozenset({"iptables -F", "nft flush ruleset"})


def kill_daemon(host: LabHost) -> None:
    host.run(["sh", "-ec", KILL_DAEMON])
    host.run(["meshd", "up"])


def kill_serf(host: LabHost) -> None:
    before = host.run(["sh", "-ec", f"echo {SERF}"]).stdout
    host.run(["sh", "-ec", f"kill -KILL {SERF}"])
    _wait_for_another_serf(host, before)


def kill_both(host: LabHost) -> None:
    host.run(["sh", "-ec", f"{KILL_DAEMON}; kill -KILL {SERF}"])
    host.run(["meshd", "up"])


def leave_serf(host: LabHost) -> None:
    """Serf ends with exit code 0, and the others hear that it has left."""
    before = host.run(["sh", "-ec", f"echo {SERF}"]).stdout
    serf(host, "leave")
    _wait_for_another_serf(host, before)


def _wait_for_another_serf(host: LabHost, before: str) -> None:
    eventually(lambda: host.run(["sh", "-c", f"echo {SERF}"]).stdout not in {before, "\n"}, 5, "the daemon starts Serf")


def sync_in_a_loop(host: LabHost) -> None:
    for _ in range(5):
        assert host.run(["meshd", "sync"]).stdout == "no changes\n"


def install(host: LabHost, wheel: Path | None = None) -> None:
    """Put the files of a wheel, or of this package anew, in place on one host.

    In a layer of this host's own over the installation, which all lab hosts share.
    """
    upper, work = (host.directory / "installation" / part for part in ("upper", "work"))
    for folder in (upper, work):
        folder.mkdir(parents=True, exist_ok=True)
    layer = f"lowerdir={sys.prefix},upperdir={upper},workdir={work}"
    mount = f"mount | grep -q 'overlay on {sys.prefix} ' || mount -t overlay -o {layer} overlay {sys.prefix}"
    host.run(["sh", "-ec", mount])
    origin = json.loads(metadata.distribution("meshd").read_text("direct_url.json") or "{}")
    options = ["--quiet", "--no-deps", "--force-reinstall", "--no-build-isolation", "--disable-pip-version-check"]
    editable = ["--editable"] if wheel is None and origin.get("dir_info", {}).get("editable") else []
    package = str(wheel) if wheel is not None else origin["url"].removeprefix("file://")
    host.run([sys.executable, "-m", "pip", "install", *options, *editable, package])
    assert any(upper.rglob("site-packages/meshd*")), "it has gone into the layer"


def upgrade(host: LabHost) -> None:
    """Put the package's files in place anew and restart the daemon, as an upgrade does."""
    install(host)
    kill_daemon(host)


def new_key(host: LabHost) -> None:
    """Restart daemon and Serf with another WireGuard key, faster than Serf's events tell of a leave and a join."""
    host.run(["sh", "-ec", f"{KILL_DAEMON}; kill -KILL {SERF}; rm {STATE}/wireguard.key"])
    host.run(["meshd", "up"])


@contextmanager
def rewritten(lab: Lab, host: LabHost, port: int) -> Iterator[None]:
    """Let the others see a host's WireGuard at another port, as behind an address translation that has changed."""
    rules = f"""
    table bridge roam {{
        chain forward {{
            type filter hook forward priority 0;
            iifname "{host.name}" udp sport 51820 udp sport set {port}
            oifname "{host.name}" udp dport {port} udp dport set 51820
        }}
    }}
    """
    lab.switch.run(["nft", "-f", "-"], text=rules)
    try:
        yield
    finally:
        lab.switch.run(["nft", "delete", "table", "bridge", "roam"])


def readdress(host: LabHost, old: str, new: str, without: float = 0.0) -> None:
    """Give a host another address on the underlay, after so many seconds without one."""
    host.run(["ip", "addr", "del", f"{old}/24", "dev", "eth0"])
    time.sleep(without)
    host.run(["ip", "addr", "add", f"{new}/24", "dev", "eth0"])
    host.run(["ip", "route", "add", "default", "via", str(network.GATEWAY)])


def boot(lab: Lab, host: LabHost, *, docker_first: bool = False) -> LabHost:
    """Power on, and start what a service manager starts: meshd before Docker unless told otherwise."""
    with_docker = (host.directory / "docker").exists()
    host = lab.power_on(host.name)
    if with_docker and docker_first:
        lab.start_docker(host)
    daemon = ["sh", "-c", "meshd agent </dev/null >>$0 2>&1 &", f"{STATE}/agent.log"]
    host.run(daemon)
    # What a program on the host sends before the first pass goes by the default route (docs/faults.md).
    laid = ["ip", "route", "show", "type", "unreachable"]
    eventually(lambda: host.run(laid).stdout, 10, "the daemon runs, and has made a pass")
    if with_docker and not docker_first:
        lab.start_docker(host)
    return host


def restart_docker(
    lab: Lab, host: LabHost, number: str = "", root: Path | None = None, options: Sequence[str] = ()
) -> None:
    """End dockerd by a signal and start it, or that of the folder `root`; return when its container `box` runs.

    Without a signal it is ending already. `options` are dockerd's own.
    """
    if number:
        host.run(["sh", "-c", f"kill -{number} $(cat /run/docker.pid)"])
    eventually(lambda: not host.run(["pgrep", "-x", "dockerd"], check=False).stdout, 20, "dockerd has stopped")
    host.run(["sh", "-c", "pkill -KILL -f 'containerd.*--config' ; rm -f /run/docker.pid"], check=False)
    lab.start_docker(host, root, options)
    eventually(lambda: "Up" in host.run(["docker", "ps", "--filter", "name=box"]).stdout, 20, "its container runs")
