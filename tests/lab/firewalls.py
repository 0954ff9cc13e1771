"""Debian's firewalls on lab hosts, each with a configuration of its own; on the machine itself none is installed."""

import os
from pathlib import Path

from meshd.lab.hosts import LabHost

# What .ci/fetch-firewalls has unpacked.
FOLDER = Path(os.environ.get("MESHD_FIREWALLS", "/nowhere"))

LAY = r"""
mount -t overlay -o lowerdir=$FOLDER/usr:/usr overlay /usr
mkdir -p /run/etc/upper /run/etc/work /run/dbus
mount -t overlay -o lowerdir=$FOLDER/etc:/etc,upperdir=/run/etc/upper,workdir=/run/etc/work overlay /etc
mount -t tmpfs tmpfs /var/log
cat >/run/dbus/lab.conf <<END
<busconfig>
  <type>system</type>
  <listen>unix:path=/run/dbus/system_bus_socket</listen>
  <auth>EXTERNAL</auth>
  <policy context="default"><allow user="*"/><allow own="*"/><allow eavesdrop="true"/>
    <allow send_destination="*" eavesdrop="true"/></policy>
</busconfig>
END
dbus-daemon --config-file=/run/dbus/lab.conf --fork
"""
# What `systemctl start` and `restart` do: these hosts have no systemd.
START_FIREWALLD = """
firewalld --nofork </dev/null >/var/log/firewalld.out 2>&1 & echo $! >/run/firewalld.started
until firewall-cmd -q --state; do sleep 0.1; done
"""
RESTART_FIREWALLD = (
    "kill $(cat /run/firewalld.started); while kill -0 $(cat /run/firewalld.started) 2>/dev/null; do sleep 0.1; done\n"
    + START_FIREWALLD
)
RESTART_NFTABLES = "nft flush ruleset; nft -f /etc/nftables.conf"


def lay(host: LabHost) -> None:
    """Put the firewalls' files over the host's own, and start a system bus; none of the firewalls runs yet."""
    host.run(["sh", "-ec", LAY], env={"FOLDER": str(FOLDER)})


def start_firewalld(host: LabHost, backend: str) -> None:
    """Start firewalld as its package configures it, on nftables or iptables."""
    host.run(["sed", "-i", f"s/^FirewallBackend=.*/FirewallBackend={backend}/", "/etc/firewalld/firewalld.conf"])
    host.run(["sh", "-ec", START_FIREWALLD])
