"""Labs for tests: real hosts in namespaces, in a directory of their own."""

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshd.lab.hosts import Lab, LabHost

Wait = Callable[..., None]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """An empty lab for the tests of one module; everything in it is gone afterwards."""
    # dockerd's overlay2 wants a real disk, and a unix socket's path is short.
    with tempfile.TemporaryDirectory(prefix="meshd-lab-", dir="/var/tmp", ignore_cleanup_errors=True) as directory:
        lab = Lab(Path(directory) / "lab")
        try:
            yield lab
        finally:
            lab.down()


def eventually(condition: Callable[[], object], timeout: float, what: str) -> float:
    """Wait until a condition holds; give the seconds it took, and fail with `what` after `timeout`."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < timeout, f"not within {timeout:g} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - begun


def init(host: LabHost, *options: str) -> str:
    """Run `meshd init`; give the invitation that it prints."""
    output = host.run(["meshd", "init", *options]).stdout
    found = re.search(rf"MESHD_INVITE=(meshd1\.\S+) meshd join {re.escape(str(host.address))}", output)
    assert found, output
    return found[1]


def join(host: LabHost, via: LabHost, invitation: str, *options: str) -> str:
    """Run `meshd join`; give what it prints."""
    return host.run(["meshd", "join", str(via.address), *options], env={"MESHD_INVITE": invitation}).stdout


def snapshot(host: LabHost) -> str:
    """What meshd may change on a host: links, addresses, routes, rules, firewall, sysctls; normalised.

    Counters, empty tables and chains, handles and expiring numbers are left out.
    """
    script = r"""
    ip -o link | sed -E 's/^[0-9]+: //; s/@[^:]*//; s/ qdisc .*//' | sort
    ip -o -4 addr | sed -E 's/^[0-9]+: //; s/ valid_lft.*//' | sort
    ip -4 route show table all | grep -v ^broadcast | sort
    ip rule
    sysctl -a 2>/dev/null | grep -E 'net.ipv4.(ip_forward|conf.*proxy_arp|conf.*rp_filter|neigh.*proxy_delay) ' |
        grep -vE '\.(veth|tap)' | sort
    docker network ls --format '{{.Name}} {{.Driver}}' 2>/dev/null | sort
    iptables-save | grep -v '^#' | sed -E 's/\[[0-9:]+\]//'
    """
    text = host.run(["sh", "-c", script]).stdout
    nft = host.run(["nft", "-s", "list", "ruleset"]).stdout
    own = re.findall(r"^table ip meshd\S*", nft, re.MULTILINE)
    return _without_empty_tables(text) + "\n".join(own)


def _without_empty_tables(text: str) -> str:
    """Drop iptables tables that hold no rule and no chain of their own: listing one is enough to make it."""
    kept = re.sub(r"^\*\w+\n(?::[A-Z]+ ACCEPT \n)+COMMIT\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^:DOCKER-USER - \n", "", kept, flags=re.MULTILINE)


def rtt(host: LabHost, container: str, target: str, count: int = 1) -> list[float]:
    """Ping from a container; give the round-trip times in milliseconds, in order."""
    done = host.run(
        ["docker", "exec", container, "ping", "-c", str(count), "-i", "0.2", "-W", "2", target], check=False
    )
    return [float(time) for time in re.findall(r"time=([0-9.]+) ms", done.stdout)]


def ping(host: LabHost, target: str) -> bool:
    """Tell whether the host itself reaches an address."""
    return host.run(["busybox", "ping", "-c", "1", "-W", "2", target], check=False).returncode == 0
