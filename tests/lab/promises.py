"""What users were promised of a mesh of Docker hosts, looked at from the outside."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import SERVER, fetch, overlay, rtt, run_container


def serve(host: LabHost) -> tuple[str, str]:
    """Start two web servers, the first one published as port 8080; give their addresses.

    They are pinned, as a restart of an engine may give containers each other's addresses.
    """
    published, closed = overlay(host, 8), overlay(host, 9)
    for name, address, *options in (("published", published, "-p", "8080:80"), ("closed", closed)):
        options += ["--ip", address, "--restart", "always", "meshd/serf", "sh", "-c", SERVER]
        run_container(host, name, *options)
    return published, closed


def all_reach_all(hosts: Sequence[LabHost], host: LabHost | None = None) -> bool:
    """Tell whether the container `box` of each host reaches that of every other one; with `host`: to and from it."""
    pairs = [pair for pair in permutations(hosts, 2) if host is None or host in pair]
    with ThreadPoolExecutor(4) as pool:
        return all(pool.map(lambda pair: rtt(pair[0], "box", overlay(pair[1], 1)), pairs))


def seen(client: LabHost, address: str) -> str:
    """The source that a web server sees when the container `box` asks it, the empty string without an answer."""
    url = f"http://{address}/cgi-bin/peer"
    return client.run(
        ["docker", "exec", "box", "timeout", "3", "wget", "-q", "-O", "-", url], check=False
    ).stdout.strip()


def published(server: LabHost, client: LabHost) -> bool:
    """Tell whether the published port answers a host on the underlay."""
    return fetch(client, f"http://{server.address}:8080/cgi-bin/peer") == str(client.address)


def from_the_underlay(lab: Lab, host: LabHost, address: str) -> str:
    """What a neighbour gets that routes to a container's address past WireGuard."""
    lab.switch.run(["ip", "route", "add", address, "via", str(host.address)])
    try:
        return fetch(lab.switch, f"http://{address}/cgi-bin/peer")
    finally:
        lab.switch.run(["ip", "route", "del", address])
