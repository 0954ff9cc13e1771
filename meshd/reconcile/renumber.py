"""Another subnet for this host: let go of the old one, and claim the new one."""

import time
from ipaddress import IPv4Network

from meshd.errors import ConflictError
from meshd.mesh import conflicts
from meshd.mesh.model import Host, Record
from meshd.mesh.roster import View
from meshd.net.resources import Action, Change
from meshd.reconcile.machine import docker, this_machine
from meshd.state.claim import choose_subnet, endpoint, publish, staying
from meshd.state.directory import State


def renumber(state: State, subnet: IPv4Network | None = None) -> Record:
    """Let go of the subnet and claim another one: this one, or one that is free. The next full reconcile builds it.

    Raises ConflictError for a subnet that is taken or while containers are attached, ApplyError.
    """
    settings = state.settings
    with state.lock():
        machine, claim, network = this_machine(state), staying(state), docker(settings)
        if network is not None and (attached := network.containers()):
            raise ConflictError(f"containers are attached to {settings.bridge}: {', '.join(attached)}")
        known, allowed = state.roster(), claim.record.certificate.subnets
        view = View(Host(settings.name, claim.record), state.mesh, known, time.time())
        taken = conflicts.claimed(view, machine.members())
        taken |= {record.subnet for record in known.hosts.values()}
        if subnet is not None and subnet in taken:
            raise ConflictError(f"the subnet {subnet} is taken by another host: 'meshd members' shows who has which")
        new = subnet or choose_subnet(state, taken | {claim.record.subnet}, allowed=allowed)
        # Docker refuses a bridge whose address is not the network's gateway: the network goes before the address does.
        observed, _, failures = machine.observe({"network", "address"})
        old = [r for kind in ("network", "address") for r in observed if r.kind == kind]
        failures += machine.apply(Change(Action.REMOVE, resource) for resource in old)
        if failures:
            raise failures[0].error
        return publish(state, claim, subnet=new, endpoint=endpoint(state), settled=True).record
