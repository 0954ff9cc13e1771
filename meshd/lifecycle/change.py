"""`meshd up` with options: change the settings of a host that has joined, with the same keys and the same containers.

On any error the old settings are in force, and the host is as it was.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from meshd.daemon import hints
from meshd.endpoint import IPAddress
from meshd.errors import InputError
from meshd.gossip import serf_agent
from meshd.lifecycle import preflight
from meshd.lifecycle.rollback import Step, undoing
from meshd.lifecycle.up import begin, take_down, up
from meshd.net import underlay
from meshd.reconcile.run import Report
from meshd.state.claim import staying
from meshd.state.directory import Found, Place, State
from meshd.state.settings import OPTIONS, UP, Settings

# What the Serf agent is started with. It alone has to start again, and no tunnel waits for it.
OF_SERF = frozenset({"bind", "advertise", "gossip_port", "rpc_port"})
# Which ports have to be free when one of these settings changes, as options.
PORTS = {
    "bind": {"--gossip-port"},
    "gossip_port": {"--gossip-port"},
    "rpc_port": {"--rpc-port"},
    "wireguard_port": {"--wireguard-port"},
}


def change(state: State, values: Mapping[str, Any], *, moved: bool = False) -> Report:
    """Give settings other values, and start the mesh as `up` does. On any error the host is as it was before.

    Nothing is touched before the machine is found fit for them. With `moved` the state becomes this machine's. Raises
    InputError for a setting that `up` does not change, or a wrong value, ConflictError for a port in use.
    """
    staying(state)
    _refuse_fixed(values)
    before, found = state.settings, state.found()
    settings = replace(before, **values)
    if settings == before:
        return up(state, moved=moved)
    settings.check_addresses()
    changed = {name for name in values if getattr(settings, name) != getattr(before, name)} - {"bind"}
    bind = state.bind
    if "bind" in values and (bind := _bind(state, settings)) != state.bind:
        changed.add("bind")
    if changed & PORTS.keys():
        preflight.check_change(settings, bind, {option for name in changed for option in PORTS.get(name, ())})
    was_down = state.is_down
    is_found = settings.bind is None and (found is None or found.place.address != bind)
    now = _found(bind) if is_found else found
    with undoing(lambda: _back(state, before, found, changed, was_down=was_down)):
        _put(state, settings, now, changed)
        return up(state, moved=moved)


def _refuse_fixed(names: Collection[str]) -> None:
    for name in names:
        option = OPTIONS[name]
        if option.later != UP:
            raise InputError(f"{option.name} is fixed when a host joins: '{option.later}' gives it another value")


def _bind(state: State, settings: Settings) -> IPAddress:
    """Return the underlay address that is chosen, or found: where the host was, or where the kernel would send from."""
    address, found = settings.bind, state.found_bind()
    if address is None and found is not None and underlay.holder(found) is not None:
        address = found
    if address is None:
        contact = next(iter(state.contacts().values()), None)
        address = underlay.source_address(contact.address if contact else None)
    settings.check_underlay(address)
    return address


def _found(address: IPAddress) -> Found:
    place = Place(address, underlay.holder(address) or "")
    return Found(place, place)


def _put(state: State, settings: Settings, found: Found | None, changed: Collection[str]) -> None:
    """Keep these settings on disk, and end a Serf agent that has others: whoever starts it next takes these."""
    with state.lock(), state.serf_lock():
        if found is not None:
            state.save_found(found)
        state.save_settings(settings)
        if settings.daemon and not OF_SERF.isdisjoint(changed):
            serf_agent.stop(state)
    hints.wake(state.socket, "settings")


def _back(
    state: State, settings: Settings, found: Found | None, changed: Collection[str], *, was_down: bool
) -> Iterator[Step]:
    yield "the settings", lambda: _put(state, settings, found, changed)
    if was_down:
        yield "the mark that the mesh is down", state.mark_down
        yield "the mesh", lambda: take_down(state, [])
    else:
        yield "the mesh", lambda: begin(state)
