"""What every adapter promises (meshd.net.resources.Adapter), and one in memory that keeps the same promises."""

from collections.abc import Collection

from meshd.errors import MeshdError
from meshd.net.resources import Action, Adapter, Change, Resource


class InMemory:
    """An adapter of a machine that is a dictionary; `unreadable` and `broken` are what it answers instead."""

    def __init__(self, kinds: Collection[str], *resources: Resource) -> None:
        self.kinds = frozenset(kinds)
        self.resources = {(r.kind, r.key): r for r in resources}
        self.unreadable: MeshdError | None = None
        self.broken: MeshdError | None = None
        self.applied: list[Change] = []

    def read(self) -> list[Resource]:
        if self.unreadable is not None:
            raise self.unreadable
        return list(self.resources.values())

    def apply(self, change: Change) -> None:
        if self.broken is not None:
            raise self.broken
        self.applied.append(change)
        resource = change.resource
        if change.action is Action.REMOVE:
            self.resources.pop((resource.kind, resource.key), None)
        else:
            self.resources[resource.kind, resource.key] = resource


def keeps_its_promises(adapter: Adapter, first: Resource, second: Resource) -> None:
    """Fail unless an adapter reads what it was given. The two resources have one kind and one key and differ."""

    def found() -> list[Resource]:
        return [r for r in adapter.read() if (r.kind, r.key) == (first.kind, first.key)]

    assert (first.kind, first.key) == (second.kind, second.key)
    assert first != second
    assert first.kind in adapter.kinds
    for _ in range(2):  # a second time is harmless
        adapter.apply(Change(Action.ADD, first))
        assert found() == [first]
    for _ in range(2):
        adapter.apply(Change(Action.SET, second, first))
        assert found() == [second]
    for _ in range(2):
        adapter.apply(Change(Action.REMOVE, second))
        assert found() == []
