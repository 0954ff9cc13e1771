"""Simulated members: as many hosts as wanted, with records that are signed as those of real ones are."""

from ipaddress import IPv4Address, IPv4Network

from meshd.endpoint import Endpoint
from meshd.mesh.model import Member, Record, Status
from meshd.mesh.records import encode
from meshd.state.claim import publish
from meshd.state.directory import State
from meshd.state.settings import Settings
from tests.conftest import MESH, certificate, record, seed

OVERLAY = IPv4Network("10.0.0.0/8")  # 65,534 subnets
_UNDERLAY = IPv4Address("192.168.0.1")


def member(number: int, life: int = 1) -> Member:
    """Host `number` in its `life`: a new one has a new WireGuard key and a newer record."""
    signed = signed_record(number, life)
    return Member(f"barge{number}", signed.endpoint.address, 7946, Status.ALIVE, encode(signed))


def signed_record(number: int, life: int = 1) -> Record:
    """The one place that knows how a host gets a record that others believe."""
    return record(
        number,
        seq=life,
        key=f"barge{number} in life {life}",
        subnet=IPv4Network((int(OVERLAY.network_address) + ((number + 1) << 8), 24)),
        endpoint=Endpoint(_UNDERLAY + number, 51820),
    )


def fill(state: State, rpc_port: int, wireguard: str, *, docker: bool = False) -> Member:
    """Write the state directory of host 0; give it as a member."""
    own = signed_record(0)
    settings = Settings(
        name="barge0",
        overlay=OVERLAY,
        bind=own.endpoint.address,
        mtu=1420,
        wireguard=wireguard,
        wireguard_backend="userspace",
        rpc_port=rpc_port,
        docker=docker,
        # Or wireguard-go would spend the machine on handshakes with hosts that do not exist.
        keepalive=0,
    )
    state.save_settings(settings)
    state.save_authority(MESH.trust.authority)
    state.save_certificate(certificate("barge0"), seed("identity of barge0"))
    claim = publish(state, state.claim(), subnet=own.subnet, endpoint=own.endpoint, settled=True)
    return Member("barge0", own.endpoint.address, 7946, Status.ALIVE, encode(claim.record))
