"""The lab's hosts: found, started, wired together, and removed without a trace."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshd.endpoint import IPAddress
from meshd.errors import InputError, MeshdError, MissingError
from meshd.lab import docker, network

DEFAULT = Path("/var/lib/meshd-lab")
HOLDER = Path(__file__).with_name("holder.py")
HOLDER_NAME = "meshd/lab/holder.py"
SWITCH = "switch"
MOST = 150
START_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class LabHost:
    """A host that runs. `pid` is its init process as seen from here."""

    name: str
    addresses: tuple[IPAddress, ...]
    pid: int
    directory: Path

    @property
    def address(self) -> IPAddress:
        """Its main address on the underlay."""
        return self.addresses[0]

    @property
    def docker_socket(self) -> Path:
        """Its Docker engine's socket as seen from here."""
        return Path(f"/proc/{self.pid}/root/run/docker.sock")

    def argv(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` inside all the host's namespaces."""
        return [
            "nsenter",
            f"--target={self.pid}",
            "--net",
            "--mount",
            "--uts",
            "--pid",
            "--root",
            "--wd",
            "--",
            *command,
        ]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment: this Python's `meshd` comes first in PATH, and no settings of a mesh come along."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MESHD_", "DOCKER_", "SERF_"))}
        path = f"{Path(sys.executable).parent}:{kept.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        return {**kept, "PATH": path, "LAB_HOST": self.name, **(extra or {})}

    def run(
        self,
        command: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 120,
        text: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end. With `check`, raises MeshdError with its error output when it fails."""
        done = subprocess.run(
            self.argv(command),
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=self.environment(env),
        )
        if check and done.returncode != 0:
            what = " ".join(command)[:200]
            raise MeshdError(
                f"on {self.name}: {what}: exit {done.returncode}: {done.stderr.strip()}{done.stdout[-500:]}"
            )
        return done

    def popen(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
        """Start a command and go on."""
        return subprocess.Popen(self.argv(command), text=True, env=self.environment(), **options)


class Lab:
    """All hosts of one lab directory. Nothing about them is written down: they are found by their processes."""

    def __init__(self, directory: Path = DEFAULT) -> None:
        self.directory = directory.absolute()

    def hosts(self) -> list[LabHost]:
        """Return the hosts that run, by number."""
        found = [
            LabHost(name, network.addresses(name, underlay), pid, self.directory / name)
            for name, underlay, pid in _holders(self.directory)
            if name != SWITCH
        ]
        return sorted(found, key=lambda host: host.address.packed[-1])

    def host(self, name: str) -> LabHost:
        """Return one host that runs. Raises InputError naming those that do."""
        hosts = {host.name: host for host in self.hosts()}
        if name not in hosts:
            running = ", ".join(hosts) or "none (meshd lab up)"
            raise InputError(f"no lab host {name!r} is running; running: {running}")
        return hosts[name]

    def up(self, count: int, *, docker: bool, underlay: str = "ipv4", mtu: int = 1500) -> None:
        """Bring up barge1 … bargeN, those that are missing, and with `docker` an engine on each."""
        _check_machine(docker=docker)
        if not 1 <= count <= MOST:
            raise InputError(f"a lab has 1 to {MOST} hosts, not {count}")
        running = {host.name for host in self.hosts()}
        for number in range(1, count + 1):
            if f"barge{number}" not in running:
                self.power_on(f"barge{number}", underlay=underlay, mtu=mtu)
        if docker:
            with ThreadPoolExecutor() as pool:
                list(pool.map(self.start_docker, self.hosts()[:count]))

    def power_on(self, name: str, *, underlay: str = "ipv4", mtu: int = 1500, root: Path | None = None) -> LabHost:
        """Start one host with what it had on disk when it went off, and plug it in: `ipv4`, `ipv6` or `dual`.

        With `root`, its file system is that folder below a disk of its own; of this machine it has Python alone.
        """
        switch, addresses = self.switch, network.addresses(name, underlay)
        pid = self._hold(name, underlay, _folders(root) if root else [])
        host = LabHost(name, addresses, pid, self.directory / name)
        network.plug_in(switch.pid, pid, name, underlay, mtu)
        return host

    def power_off(self, host: LabHost) -> None:
        """Cut a host's power: every process on it is gone at once, and what was not on disk is lost."""
        _kill(host.pid)
        docker.remove_cgroups(self.directory, host.name)

    def start_docker(self, host: LabHost, root: Path | None = None, options: Sequence[str] = ()) -> None:
        """Start the host's Docker engine, that of the folder `root` if given, and wait until it answers."""
        docker.start(host, self.directory, root, options)

    def down(self) -> None:
        """Remove everything, whatever state it is in."""
        for _, _, pid in list(_holders(self.directory)):
            _kill(pid)
        docker.remove_cgroups(self.directory)
        if self.directory.exists():
            shutil.rmtree(self.directory)
        # The mount point, unless it is someone's. Removing it would pull the state from under the hosts of other labs.
        if not any(_holders(None)):
            with suppress(OSError):
                Path("/var/lib/meshd").rmdir()

    @property
    def switch(self) -> LabHost:
        """The underlay's switch, where every packet passes; it is started if it is not there."""
        pid = self._pids().get(SWITCH)
        if pid is None:
            pid = self._hold(SWITCH, "dual")
            network.make_switch(pid)
        return LabHost(SWITCH, (network.GATEWAY, network.GATEWAY6), pid, self.directory / SWITCH)

    def cut(self, one: Sequence[str], other: Sequence[str]) -> None:
        """Let no packet pass between the hosts named in `one` and those in `other`, until `heal`."""
        self.switch.run(["nft", "-f", "-"], text=network.cut(one, other))

    def heal(self) -> None:
        """Let every packet pass again."""
        self.switch.run(["nft", "-f", "-"], text=network.heal())

    def _pids(self) -> dict[str, int]:
        return {name: pid for name, _, pid in _holders(self.directory)}

    def _hold(self, name: str, underlay: str, folders: Sequence[str] = ()) -> int:
        """Start a host's init process in namespaces of its own; return its process id as seen from here."""
        self.directory.mkdir(parents=True, exist_ok=True)
        namespaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        holder = [sys.executable, "-I", "-S", str(HOLDER), str(self.directory), name, underlay, *folders]
        log = self.directory / f"{name}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                ["unshare", *namespaces, *holder],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                cwd="/",
            )
        assert process.stdout is not None  # noqa: S101  it is a pipe
        with process.stdout as output:
            answer = output.readline()
        if answer != b"ready\n":
            raise MeshdError(f"starting lab host {name}: {log.read_text().strip() or 'its init process ended'}")
        process.returncode = 0  # it outlives this command
        return self._pids()[name]


def _folders(root: Path) -> list[str]:
    """Return what the init process of a host with another root wants: that root, and the folders of this Python."""
    python = [sys.prefix] if sys.base_prefix == "/usr" else [sys.prefix, sys.base_prefix]
    return [str(root.absolute()), *python]


def _holders(directory: Path | None) -> Iterator[tuple[str, str, int]]:
    """Find the init processes of a lab's hosts, with None of all labs': name, kind of underlay and process id."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        # `unshare` has the same words behind its own; the init process begins with Python.
        if words[1:3] != ["-I", "-S"] or len(words) < 7:
            continue
        program, lab, name, underlay = words[3:7]
        # Another installation's labs have a holder of their own.
        found = program == str(HOLDER) and lab == str(directory) if directory else program.endswith(HOLDER_NAME)
        if found:
            yield name, underlay, int(entry.name)


def _kill(pid: int) -> None:
    """Kill a host's init process, and with it all of the host; return when it is gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + START_TIMEOUT
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        with suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.01)


def _check_machine(*, docker: bool) -> None:
    if os.geteuid() != 0:
        raise InputError("the lab makes namespaces: run it as root (sudo meshd lab …)")
    programs = {"unshare": "util-linux", "nsenter": "util-linux", "mount": "mount"}
    if docker:
        programs |= {"dockerd": "docker.io", "docker": "docker.io (docker-cli on newer Debians)"}
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    for program, package in programs.items():
        if shutil.which(program, path=path) is None:
            raise MissingError(f"{program} is not installed: apt install {package}")
