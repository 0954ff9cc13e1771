"""The hand-made recipe: what a careful person types on two Docker hosts, with no meshd anywhere.

One bridge inside of one overlay prefix, proxy ARP and routes between it and WireGuard, and Docker's NAT kept away.
"""

from collections.abc import Sequence

from meshd.lab.hosts import LabHost

OVERLAY = "172.20.0.0/16"
MTU = 1420  # wg-quick's own choice on an underlay of 1500

# `setsid`, as at boot and as meshd's: the scheduler groups processes by session (sched(7), autogroup), and in that of
# the iperf3 here a first, noisy comparison saw wireguard-go carry more than outside of it.
_UP = """
umask 077
wg genkey > wg.key
wg pubkey < wg.key > wg.pub
docker network create --driver bridge --subnet {overlay} --ip-range {subnet} \\
    --opt com.docker.network.bridge.name=ovl0 --opt com.docker.network.driver.mtu={mtu} ovl0
ip link set ovl0 mtu {mtu}
sysctl -q net.ipv4.ip_forward=1 net.ipv4.conf.ovl0.proxy_arp=1
setsid wireguard-go wg0 2>/dev/null
ip link set wg0 mtu {mtu} up
ip route del {overlay} dev ovl0
ip route add {subnet} dev ovl0
ip route add {overlay} dev wg0
iptables -t nat -I POSTROUTING -o wg0 -s {overlay} -j ACCEPT
iptables -I DOCKER-USER -i wg0 -o ovl0 -j ACCEPT
"""
_PEER = "wg set wg0 listen-port 51820 private-key wg.key peer {key} endpoint {endpoint}:51820 allowed-ips {subnet}"


def lay(hosts: Sequence[LabHost]) -> None:
    """Join two hosts with Docker. Raises MeshdError with what failed."""
    for host in hosts:
        shell(host, _UP.format(overlay=OVERLAY, subnet=subnet(host), mtu=MTU))
    for host, other in (hosts, hosts[::-1]):
        key = shell(other, "cat wg.pub")
        shell(host, _PEER.format(key=key, endpoint=other.address, subnet=subnet(other)))


def subnet(host: LabHost) -> str:
    return f"172.20.{str(host.address).rpartition('.')[2]}.0/24"


def shell(host: LabHost, script: str) -> str:
    """Run a script on a host, in its own directory; give what it prints."""
    return host.run(["sh", "-ec", f"cd {host.directory}\n{script}"]).stdout.strip()
