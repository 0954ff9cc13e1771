"""The proof: three hosts find each other by `meshd join` alone, and the containers on all of them talk.

What is printed is what the commands on the hosts printed; each step is checked, and the first one that is not as it
should be ends the demo with an error and leaves the lab up to look at.
"""

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import click

from meshd.errors import MeshdError
from meshd.lab.hosts import Lab, LabHost

IMAGE = "meshd/serf"
PER_HOST = 2
PORT = 8080
# Answers each request with the address it came from: what the server sees is what has to be preserved.
SERVER = (
    "mkdir -p /www/cgi-bin && printf '#!/bin/sh\\necho; echo $REMOTE_ADDR\\n' > /www/cgi-bin/peer && "
    f"chmod +x /www/cgi-bin/peer && httpd -p 0.0.0.0:{PORT} -h /www"
)


class DemoError(MeshdError):
    """Something was not as the demo promises."""


def run(lab: Lab, count: int = 3) -> None:
    """Bring up `count` hosts and show the mesh. Raises DemoError at the first thing that is not so."""
    begun = time.monotonic()
    if lab.hosts():
        click.echo("A lab is up already: it is removed, the demo shows a mesh from its beginning.")
        lab.down()
    _title(f"{count} hosts, each with its own network, Serf, WireGuard and Docker engine")
    lab.up(count, docker=True)
    hosts = lab.hosts()
    click.echo("\n".join(f"{host.name}  {host.address}" for host in hosts))
    with ThreadPoolExecutor() as pool:
        images = [pool.submit(_prepare_image, host) for host in hosts]
        _assemble(hosts)
        for image in images:
            image.result()
    _start_containers(hosts)
    _show(hosts)
    click.secho(f"\nEverything is as it should be, after {time.monotonic() - begun:.0f} s.", bold=True)
    click.echo(
        "The lab is still up. To look around:\n"
        "    meshd lab exec barge2 -- meshd status\n"
        "    meshd lab exec barge2 -- docker exec serf0 ping -c 3 172.20.101.1\n"
        "    meshd lab shell barge1\n"
        "To remove it:\n"
        "    meshd lab down        (or make demo-down)\n"
        "In a checkout the command is .venv/bin/meshd."
    )


def _assemble(hosts: Sequence[LabHost]) -> None:
    first, *others = hosts
    output = _show_command(first, ["meshd", "init"], hide=r"meshd3\.\S+")
    invitation = re.search(r"MESHD_INVITE=(\S+) meshd join", output)
    if invitation is None:
        raise DemoError("'meshd init' printed no line for the next host")
    via = first
    for host in others:
        command = ["env", f"MESHD_INVITE={invitation[1]}", "meshd", "join", str(via.address)]
        _show_command(host, command, shown=f"MESHD_INVITE=… meshd join {via.address}")
        # Any member will do: each host joins through the one before it.
        via = host


def _prepare_image(host: LabHost) -> None:
    from meshd.lab.images import build  # noqa: PLC0415

    build(host)


def _start_containers(hosts: Sequence[LabHost]) -> None:
    _title(f"{PER_HOST} containers on each host, every one a Serf agent that joins 172.20.101.1")
    for number in range(PER_HOST):
        for host in hosts:
            name = f"{host.name}-serf{number}"
            _check(
                host, ["docker", "run", "-d", "--name", f"serf{number}", "--hostname", name, "--network", "ovl0", IMAGE]
            )
            click.echo(f"{host.name}: docker run --name serf{number} --hostname {name} --network ovl0 {IMAGE}")


def _show(hosts: Sequence[LabHost]) -> None:
    first, last = hosts[0], hosts[-1]
    expected = {
        (f"{host.name}-serf{n}", f"172.20.{str(host.address).rpartition('.')[2]}.{n + 1}:7946", "alive")
        for host in hosts
        for n in range(PER_HOST)
    }

    def complete(output: str) -> bool:
        return {tuple(line.split()[:3]) for line in output.splitlines()} == expected

    _wait_for(last, ["docker", "exec", "serf0", "serf", "members"], complete, "not every container is alive")
    _show_command(last, ["docker", "exec", "serf0", "serf", "members"])

    route = _show_command(last, ["docker", "exec", "serf0", "ip", "route"])
    gateway = f"172.20.{str(last.address).rpartition('.')[2]}.0"
    if not re.search(rf"^default via {re.escape(gateway)} ", route, re.MULTILINE) or "172.20.0.0/16 dev" not in route:
        raise DemoError("the container's routes are not the flat overlay's")

    members = _show_command(first, ["meshd", "members"])
    if len([line for line in members.splitlines() if " alive " in line]) != len(hosts):
        raise DemoError("'meshd members' does not show every host alive")
    _show_traffic(first, last)


def _show_traffic(server: LabHost, client: LabHost) -> None:
    target = f"172.20.{str(server.address).rpartition('.')[2]}.1"
    source = f"172.20.{str(client.address).rpartition('.')[2]}.1"
    ping = _show_command(client, ["docker", "exec", "serf0", "ping", "-c", "3", target])
    if "3 packets received" not in ping:
        raise DemoError("the ping lost packets")
    _check(server, ["docker", "exec", "serf0", "sh", "-c", SERVER])
    url = f"http://{target}:{PORT}/cgi-bin/peer"
    click.echo(f"\nA server on {server.name} answers each request with the address that it came from:")
    seen = _show_command(client, ["docker", "exec", "serf0", "wget", "-q", "-O", "-", url]).strip()
    if seen != source:
        raise DemoError(f"the server saw {seen!r}, the client is {source}")


# --- running and showing ---------------------------------------------------------------------------------------------


def _title(text: str) -> None:
    click.secho(f"\n{text}", bold=True)


def _show_command(host: LabHost, command: Sequence[str], *, shown: str = "", hide: str = "") -> str:
    """Run a command on a host, and print it with its output, without what `hide` matches."""
    click.secho(f"\nroot@{host.name}:~# {shown or ' '.join(command)}", bold=True)
    output = _check(host, command)
    click.echo(re.sub(hide, "…", output).rstrip() if hide else output.rstrip())
    return output


def _check(host: LabHost, command: Sequence[str]) -> str:
    done = host.run(command, check=False, timeout=120)
    if done.returncode != 0:
        raise DemoError(f"on {host.name}: {' '.join(command[:4])} …: {done.stderr.strip() or done.stdout.strip()}")
    return str(done.stdout)


def _wait_for(host: LabHost, command: Sequence[str], done: Callable[[str], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 40
    while not done(output := host.run(command, check=False, timeout=30).stdout):
        if time.monotonic() > deadline:
            raise DemoError(f"{otherwise}:\n{output}")
        time.sleep(0.25)
