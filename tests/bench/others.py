"""Other meshes from Debian's packages between two hosts, each with the settings that it comes with."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from meshd.lab.hosts import LabHost
from tests.bench.by_hand import shell
from tests.bench.streams import OWN, End, Way, unpacked
from tests.conftest import eventually

TINC, NEBULA = OWN / "usr/sbin/tincd", OWN / "usr/bin/nebula"

_TINC_UP = """#!/bin/sh
ip address add {address}/24 dev $INTERFACE
ip link set $INTERFACE up
"""

_NEBULA = """
pki: {{ca: ca.crt, cert: {name}.crt, key: {name}.key}}
static_host_map: {{"{lighthouse}": ["{underlay}:4242"]}}
lighthouse: {{am_lighthouse: {is_lighthouse}, hosts: {hosts}}}
listen: {{host: 0.0.0.0, port: 4242}}
tun: {{dev: nebula0}}
firewall:
  outbound: [{{port: any, proto: any, host: any}}]
  inbound: [{{port: any, proto: any, host: any}}]
"""


def tinc(hosts: Sequence[LabHost]) -> Way:
    """Join two hosts by tinc 1.0."""
    ends = [End(host, f"10.1.0.{number}") for number, host in enumerate(hosts, 1)]
    published = [_tinc_host(end) for end in ends]
    for end, other in (ends, ends[::-1]):
        (end.host.directory / "tinc/hosts" / other.host.name).write_text(published[ends.index(other)])
        words = [f"Name = {end.host.name}", f"ConnectTo = {other.host.name}", "Interface = tinc0", ""]
        (end.host.directory / "tinc/tinc.conf").write_text("\n".join(words))
        _start(end.host, [*unpacked(TINC), "-D", "-c", "tinc", "--pidfile=tinc/pid"])
    return _ready(Way("tinc", *ends))


def _tinc_host(end: End) -> str:
    """Make a host's key and its script; give what the other one has to know of it."""
    folder = end.host.directory / "tinc"
    (folder / "hosts").mkdir(parents=True)
    (folder / "tinc.conf").write_text(f"Name = {end.host.name}\n")
    script = folder / "tinc-up"
    script.write_text(_TINC_UP.format(address=end.address))
    script.chmod(0o755)
    own = folder / "hosts" / end.host.name
    own.write_text(f"Address = {end.host.address}\nSubnet = {end.address}/32\n")
    shell(end.host, f"{' '.join(unpacked(TINC))} -c tinc -K 2048 </dev/null")
    return own.read_text()


def nebula(hosts: Sequence[LabHost]) -> Way:
    """Join two hosts by Nebula; the first is the lighthouse."""
    ends = [End(host, f"10.2.0.{number}") for number, host in enumerate(hosts, 1)]
    first = ends[0]
    cert = " ".join(unpacked(OWN / "usr/bin/nebula-cert"))
    shell(first.host, f"{cert} ca -name bench")
    for end in ends:
        name, folder = end.host.name, first.host.directory
        shell(first.host, f"{cert} sign -name {name} -ip {end.address}/24")
        for file in ("ca.crt", f"{name}.crt", f"{name}.key"):
            content = (folder / file).read_bytes()
            (end.host.directory / file).write_bytes(content)
        (end.host.directory / "nebula.yml").write_text(_nebula_config(end, first))
        _start(end.host, [*unpacked(NEBULA), "-config", "nebula.yml"])
    return _ready(Way("Nebula", *ends))


def _nebula_config(end: End, lighthouse: End) -> str:
    return _NEBULA.format(
        name=end.host.name,
        lighthouse=lighthouse.address,
        underlay=lighthouse.host.address,
        is_lighthouse=str(end is lighthouse).lower(),
        hosts="[]" if end is lighthouse else f'["{lighthouse.address}"]',
    )


def _start(host: LabHost, command: Sequence[str]) -> None:
    """Start a program in its host's directory; it ends with its host."""
    log = (host.directory / f"{Path(command[2]).name}.log").open("w")
    words = ["sh", "-c", 'cd "$0" && exec "$@"', str(host.directory), *command]
    process = host.popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    process.returncode = 0  # it outlives this command


def _ready(way: Way) -> Way:
    ping = ["busybox", "ping", "-c", "1", "-W", "1", way.server.address]
    eventually(lambda: way.client.host.run(ping, check=False).returncode == 0, 20, f"{way.name} joins two hosts")
    return way
