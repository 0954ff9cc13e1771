"""A machine that boots with systemd: the unit, its order before Docker's, restarts and a power cut."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from meshd.daemon import service
from meshd.gossip.serf.process import OOM_SCORE
from meshd.lab import network
from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import eventually, init, join, ping, snapshot
from tests.lab.traffic import unbroken

pytestmark = [pytest.mark.root, pytest.mark.lab]

CGROUPS = [tree for tree in (Path("/sys/fs/cgroup/systemd"), Path("/sys/fs/cgroup/unified")) if tree.is_dir()]
# /proc/sys is the machine's own; and no tmpfs hides a checkout below /tmp.
NSPAWN = {"SYSTEMD_NSPAWN_API_VFS_WRITABLE": "1", "SYSTEMD_NSPAWN_TMPFS_TMP": "0"}
UNIT = "/etc/systemd/system/meshd.service"


class Machine:
    """This machine's own files, with changes of its own, booted as barge2 of a lab."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.root = directory / "root"
        for name in ("root", "upper", "work", "docker"):
            (directory / name).mkdir()
        layers = f"lowerdir=/,upperdir={directory}/upper,workdir={directory}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, self.root], check=True)
        (self.root / "etc/hostname").write_text("barge2\n")
        # The one that Debian's package enables, and that no mesh can live beside.
        (self.root / "etc/systemd/system/multi-user.target.wants/serf.service").unlink(missing_ok=True)
        # The checkout may be below /tmp, which a boot empties.
        (self.root / "etc/tmpfiles.d/tmp.conf").symlink_to("/dev/null")
        self.processes: list[subprocess.Popen[bytes]] = []

    def boot(self) -> LabHost:
        """Switch the power on; give the host when systemd says that the boot is over."""
        cable = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self.processes.append(cable)
        eventually(lambda: Path(f"/proc/{cable.pid}/cmdline").read_bytes().startswith(b"sleep"), 5, "it sleeps")
        network.plug_in(self.lab.switch.pid, cable.pid, "barge2", "ipv4", 1500)
        # Where systemd runs, it keeps the machine in a scope; elsewhere it gets a cgroup that `close` can remove.
        options, own = ["--boot", f"--directory={self.root}", "--console=pipe", "--capability=all"], ""
        options += [f"--network-namespace-path=/proc/{cable.pid}/ns/net", "--bind=/dev/net/tun"]
        options += [f"--bind={self.directory}/docker:/var/lib/docker", f"--bind-ro={sys.prefix}"]
        if not service.has_systemd():
            options += ["--register=no", "--keep-unit"]
            own = "".join(f"mkdir -p {t}/meshd-boot; echo $$ >{t}/meshd-boot/cgroup.procs; " for t in CGROUPS)
        with (self.directory / "console").open("a") as console:
            boot = subprocess.Popen(
                ["sh", "-c", f'{own} exec systemd-nspawn "$@"', "sh", *options],
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **NSPAWN},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        self.processes.append(boot)
        eventually(lambda: self._leader(boot.pid), 20, "systemd starts")
        host = LabHost("barge2", network.addresses("barge2"), self._leader(boot.pid), self.directory)
        running = ["systemctl", "is-system-running"]
        eventually(lambda: host.run(running, check=False).stdout.strip() in {"running", "degraded"}, 60, "it boots")
        return host

    def _leader(self, pid: int) -> int:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            # The shell makes directories first: a child may have ended by now.
            with suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
        return 0

    def cut_power(self) -> None:
        """Kill everything on the machine at once."""
        for process in reversed(self.processes):
            with suppress(OSError):
                leader = self._leader(process.pid)
                if leader:
                    os.kill(leader, signal.SIGKILL)
            process.kill()
            process.wait()
        self.processes.clear()

    def close(self) -> None:
        self.cut_power()
        subprocess.run(["umount", "--lazy", self.root], check=False)
        eventually(lambda: all(removed(tree / "meshd-boot") for tree in CGROUPS), 5, "its cgroups are gone")


def removed(cgroup: Path) -> bool:
    """Remove a cgroup and those in it; those of processes that are still dying cannot be yet."""
    for folder in sorted((p for p in (cgroup, *cgroup.rglob("*")) if p.is_dir()), reverse=True):
        with suppress(OSError):
            folder.rmdir()
    return not cgroup.exists()


@pytest.fixture
def machine(lab: Lab) -> Iterator[Machine]:
    assert shutil.which("systemd-nspawn"), "apt install systemd-container"
    lab.up(1, docker=False)
    with tempfile.TemporaryDirectory(prefix="meshd-boot-", dir="/var/tmp", ignore_cleanup_errors=True) as directory:
        machine = Machine(lab, Path(directory))
        try:
            yield machine
        finally:
            machine.close()


def show(host: LabHost, unit: str, what: str) -> str:
    return host.run(["systemctl", "show", unit, f"--property={what}", "--value"]).stdout.strip()


# CAP_NET_BIND_SERVICE, CAP_NET_ADMIN and CAP_NET_RAW (capabilities(7)).
CAPABILITIES = 1 << 10 | 1 << 12 | 1 << 13


def confined(host: LabHost) -> None:
    """Require that daemon, Serf and wireguard-go can change links and rules, and no file but their own."""
    daemon = show(host, "meshd", "MainPID")
    serf, wireguard = (host.run(["pgrep", "-x", name]).stdout.strip() for name in ("serf", "wireguard-go"))
    for pid in (daemon, serf, wireguard):
        status = host.run(["cat", f"/proc/{pid}/status"]).stdout
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert int(fields["CapEff"], 16) | int(fields["CapBnd"], 16) == CAPABILITIES, fields["Name"]
        assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2"), fields["Name"]
        for path in ("/etc/passwd", "/usr/local/bin/meshd-was-here", "/boot/x"):
            tried = host.run(["nsenter", f"--target={pid}", "--mount", "touch", path], check=False)
            assert "Read-only file system" in tried.stderr
    contained = f"prlimit --pid {serf} --as --output SOFT --noheadings; cat /proc/{serf}/oom_score_adj"
    limit, oom_score = host.run(["sh", "-c", contained]).stdout.split()
    assert int(limit) < 2**31, "the unit may bound Serf's memory"
    assert int(oom_score) == OOM_SCORE
    score = host.run(["systemd-analyze", "security", "--no-pager", "meshd.service"]).stdout
    assert float(re.findall(r"exposure level for meshd.service: ([0-9.]+)", score)[0]) <= 3.0


def test_systemd_host_is_back_after_power_cut(lab: Lab, machine: Machine) -> None:
    """A host with systemd survives restarts of the unit and is back by itself after a power cut."""
    one, booted = lab.host("barge1"), machine.boot()
    before = snapshot(booted)
    invitation = init(one, "--no-docker")
    join(booted, one, invitation)
    assert ping(one, "172.20.102.0")
    assert show(booted, "meshd", "UnitFileState") == "enabled"
    assert show(booted, "meshd", "ActiveState") == "active"

    confined(booted)

    # A restart of the unit ends the daemon alone, and nobody notices.
    def alive() -> str:
        return booted.run(["pgrep", "-x", "serf|wireguard-go"]).stdout

    for end in (["restart"], ["kill", "--signal=KILL", "--kill-who=main"]):
        others, daemon = alive(), show(booted, "meshd", "MainPID")
        with unbroken([(one, booted), (booted, one)]) as lost:
            booted.run(["systemctl", *end, "meshd"])
            eventually(lambda: show(booted, "meshd", "MainPID") not in {daemon, "0"}, 10, "systemd starts it again")  # noqa: B023
            eventually(lambda: show(booted, "meshd", "ActiveState") == "active", 10, "it has made its first pass")
        assert lost == []
        assert alive() == others

    machine.cut_power()
    time.sleep(1)
    again = machine.boot()
    eventually(lambda: ping(one, "172.20.102.0"), 30, "nobody ran a command and it is back")
    # systemd's docker.socket lets every question hang until dockerd runs, which waits for meshd's first pass.
    assert int(show(again, "meshd", "ActiveEnterTimestampMonotonic")) <= int(
        show(again, "docker", "InactiveExitTimestampMonotonic")
    )
    journal = again.run(["journalctl", "--boot", "--unit=meshd", "--no-pager"]).stdout
    assert "timed out" not in journal
    entries = again.run(["journalctl", "--boot", "--unit=meshd", "--output=json", "--no-pager"]).stdout.splitlines()
    first = next(entry for entry in map(json.loads, entries) if "meshd of mesh" in entry["MESSAGE"])
    assert first["MESSAGE"].startswith("meshd of mesh meshd on barge"), "the journal has the time by itself"
    assert first["PRIORITY"] == "6"
    eventually(lambda: again.run(["meshd", "plan"]).stdout == "no changes\n", 10, "it is settled")
    assert "ovl0" in again.run(["docker", "network", "ls"]).stdout

    again.run(["meshd", "down"])
    assert again.run(["systemctl", "is-enabled", "meshd"], check=False).stdout.strip() != "enabled"
    again.run(["meshd", "up"])
    assert ping(one, "172.20.102.0")
    again.run(["meshd", "leave"])
    assert not (machine.root / UNIT.lstrip("/")).exists()
    assert snapshot(again) == before
