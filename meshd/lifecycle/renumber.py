"""Give this host another subnet, and its containers other addresses."""

from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Network

from meshd.daemon import hints
from meshd.errors import InputError, MeshdError
from meshd.interrupts import interruptible
from meshd.lifecycle.containers import attach, attached_containers, disconnect, stopped_containers
from meshd.mesh.addressing import is_allowed
from meshd.net.docker import Attachment, DockerNetwork
from meshd.reconcile.renumber import renumber as move
from meshd.reconcile.run import sync
from meshd.state.directory import State


def renumber(state: State, subnet: IPv4Network | None, *, force: bool, say: Callable[[str], None]) -> None:
    """Give this host another subnet, and with `force` its containers other addresses. `say` is told of each step."""
    settings, claim = state.settings, state.claim()
    if subnet is not None:
        replace(settings, subnet=subnet)  # its checks
        allowed = claim.record.certificate.subnets if claim is not None else ()
        if not is_allowed(subnet, allowed):
            raise InputError(f"the certificate of this host allows {', '.join(map(str, allowed))} only, not {subnet}")
    if claim is not None and claim.record.subnet == subnet:
        raise InputError(f"this host has the subnet {subnet} already")
    containers = attached_containers(settings, force=force)
    with interruptible() as ignore:
        try:
            disconnect(settings, containers)
            record = move(state, subnet)
            say(f"the subnet of {settings.name} is {record.subnet}")
        finally:
            ignore()
            try:
                report = sync(state)
            finally:
                off = attach(DockerNetwork(settings.mesh, settings.bridge), _moved(state, containers), say)
    if stopped := stopped_containers(settings):
        addresses = f"free addresses of {record.subnet} whatever address they had"
        say(f"stopped containers, which start with {addresses}: {stopped}")
    if report.failures:
        raise report.failures[0].error
    hints.wake(state.socket, "renumbered")
    if off:
        raise MeshdError(f"containers are off the overlay: {', '.join(off)}")


def _moved(state: State, containers: list[Attachment]) -> list[Attachment]:
    """Return the containers without the fixed addresses that are outside of this host's subnet."""
    claim = state.claim()
    subnet = claim.record.subnet if claim is not None else None
    return [c if c.address and subnet and c.address in subnet else replace(c, address=None) for c in containers]
