"""This host's own Serf tags as a resource like any other: read, compared, set."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from meshd.gossip.serf.client import BROADCAST_TIMEOUT, Access, Serf
from meshd.mesh.model import Member
from meshd.net.resources import Action, Change, Resource, Tags


class SerfTags:
    """The adapter of the tags `names` of the member `name`, which is this host.

    It reads them from `members`: a reconcile asks for the list once.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"tags"})

    def __init__(
        self, access: Access, name: str, names: Sequence[str], members: Callable[[], Sequence[Member]]
    ) -> None:
        self._access = access
        self._name = name
        self._names = tuple(names)
        self._members = members

    def read(self) -> list[Resource]:
        own = next((member for member in self._members() if member.name == self._name), None)
        tags = {} if own is None else {n: own.tags[n] for n in sorted(self._names) if n in own.tags}
        return [Tags(tuple(tags.items()))] if tags else []

    def apply(self, change: Change) -> None:
        resource = change.resource
        assert isinstance(resource, Tags)  # noqa: S101  what the dispatch by kind guarantees, for the type checker
        wanted = {} if change.action is Action.REMOVE else dict(resource.tags)
        # Whether the change has gone out, and has to be told again, is known after BROADCAST_TIMEOUT.
        with Serf.connect(self._access, 2 * BROADCAST_TIMEOUT) as serf:
            serf.tags(wanted, [name for name in self._names if name not in wanted])
