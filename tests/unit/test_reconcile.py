"""A pass is shown in tests/lab; here is what needs no host."""

from typing import ClassVar

import pytest

from meshd.errors import InputError
from meshd.net.links import Links
from meshd.net.resources import Change, Link, Resource
from meshd.reconcile.machine import Machine
from meshd.reconcile.renumber import renumber
from meshd.state.directory import State
from tests.conftest import record


class Puzzled:
    """An adapter that meets what nobody has thought of."""

    kinds: ClassVar[frozenset[str]] = frozenset({"iptables"})

    def read(self) -> list[Resource]:
        b"caf\xe9".decode()
        return []

    def apply(self, change: Change) -> None:
        raise AssertionError(change)


def test_what_one_adapter_does_not_foresee_keeps_no_other_from_reading(state: State) -> None:
    machine = Machine(state)
    machine.adapters = [Puzzled(), Links(("lo",), ())]
    resources, read, failures = machine.observe({"iptables", "link"})
    assert any(isinstance(resource, Link) for resource in resources)
    assert "link" in read
    (failure,) = failures
    assert str(failure).startswith("iptables: reading failed: UnicodeDecodeError('utf-8', b'caf\\xe9'")


def test_a_host_that_has_begun_to_leave_claims_nothing_more(state: State) -> None:
    goodbye = state.publish(subnet=record(1).subnet, endpoint=record(1).endpoint, settled=True, leaving=True)
    with pytest.raises(InputError, match="has begun to leave 'meshd': run 'meshd leave' again"):
        renumber(state)
    assert state.claim() == goodbye
