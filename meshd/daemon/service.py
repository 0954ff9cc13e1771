"""Who runs the daemon: systemd where there is systemd, otherwise a detached process with a log."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from meshd import detached
from meshd.errors import MeshdError, WrongMachineError
from meshd.state.directory import DEFAULT, State

UNITS = Path("/etc/systemd/system")
# On a slow or busy machine Python takes its time, a minute at worst; one that ends instead is noticed at once.
START_TIMEOUT = 60.0
STOP_TIMEOUT = 15.0

# Before docker.service: dockerd finds the bridge with its address, and forwarding on. KillMode=process: a restart or
# an upgrade ends the daemon alone; Serf and wireguard-go carry traffic and are adopted by the next one.
UNIT = """\
[Unit]
Description=meshd, the {mesh} mesh between Docker hosts
Documentation=man:serf(1)
Wants=network-online.target
After=network-online.target nftables.service
Before=docker.service
# A cause that lasts, as a full disk, must not end it permanently after five starts in ten seconds.
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={python} -I -m meshd --state-dir {directory} agent
WorkingDirectory=/
Restart=always
RestartSec=1
# The state is another machine's, or in use on one (errors.WrongMachineError): somebody has to decide.
RestartPreventExitStatus={wrong_machine}
KillMode=process
# The first reconcile may wait for an underlay that is late, and Docker waits for the first reconcile.
TimeoutStartSec=60
Environment=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
UMask=0077

# Serf, wireguard-go, nft and iptables are started in here and may do no more than the daemon: links, routes and rules.
# It is root all the same where it matters: whoever can write to Docker's socket can become root.
CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW CAP_NET_BIND_SERVICE
NoNewPrivileges=yes
ProtectSystem=strict
# /run holds wireguard-go's socket, Docker's, and the lock of iptables.
ReadWritePaths={directory} /run
ProtectHome={home}
PrivateTmp={tmp}
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
# The kernel loads what a link or a rule needs by itself.
ProtectKernelModules=yes
# No ProtectKernelTunables: forwarding and proxy_arp are below /proc/sys. No ProtectProc: Serf is found by its process.
DevicePolicy=closed
DeviceAllow=/dev/net/tun rw
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
KeyringMode=private
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


def unit_name(state: State) -> str:
    """Return the unit's name: one for each state directory."""
    if state.directory == DEFAULT:
        return "meshd.service"
    return f"meshd-{re.sub(r'[^A-Za-z0-9]+', '-', str(state.directory)).strip('-')}.service"


def has_systemd() -> bool:
    """Return whether systemd is this host's service manager (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def unit(state: State) -> str:
    """Return the text of the unit."""

    # What it runs, or what it writes to, may be below a directory that would be hidden from it.
    def hidden(*folders: str) -> bool:
        return any(str(path).startswith(folders) for path in (sys.prefix, sys.base_prefix, state.directory))

    return UNIT.format(
        mesh=state.settings.mesh,
        wrong_machine=WrongMachineError.exit_code,
        python=_quoted(sys.executable),
        directory=_quoted(str(state.directory)),
        home="read-only" if hidden("/home/", "/root/", "/run/user/") else "yes",
        tmp="no" if hidden("/tmp/", "/var/tmp/") else "yes",  # noqa: S108  nothing is made there
    )


def _quoted(text: str) -> str:
    """Write a path as one word of a unit file (systemd.syntax(7)), whatever is in it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$") + '"'


def start(state: State) -> None:
    """Start the daemon, now and at each boot, unless it runs. Raises MeshdError with what its log says."""
    if state.agent_pid() is not None:
        return
    if has_systemd():
        (UNITS / unit_name(state)).write_text(unit(state))
        _systemctl("daemon-reload")
        _systemctl("enable", "--now", unit_name(state))
        return
    arguments = [sys.executable, "-I", "-m", "meshd", "--state-dir", str(state.directory), "agent"]
    # Until it holds its lock nobody else knows of it.
    detached.start_until(partial(_wait_for, state), arguments, state.agent_log)


def _wait_for(state: State, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while state.agent_pid() is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise MeshdError(f"the daemon did not start: {_last_line(state.agent_log)}")
        time.sleep(0.02)


def stop(state: State) -> None:
    """Stop the daemon, and no longer start it at boot. Serf and the tunnels go on."""
    if has_systemd() and (UNITS / unit_name(state)).exists():
        _systemctl("disable", "--now", unit_name(state))
        (UNITS / unit_name(state)).unlink()
        _systemctl("daemon-reload")
    deadline = time.monotonic() + STOP_TIMEOUT
    number = signal.SIGTERM
    while (pid := state.agent_pid()) is not None:
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        time.sleep(0.1)


def _systemctl(*arguments: str) -> None:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        raise MeshdError(f"systemctl {' '.join(arguments)}: {done.stderr.strip() or done.returncode}")


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return lines[-1] if lines else "it wrote no log"
