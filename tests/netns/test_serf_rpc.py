"""One contract for Serf's RPC, as a pass uses it: the agent that is installed, and the stand-in of the benchmarks."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from meshd.endpoint import Endpoint
from meshd.errors import SerfError
from meshd.gossip import serf
from meshd.gossip.serf import Access, Serf
from meshd.mesh.model import Member, Status
from meshd.mesh.records import LIMIT, size
from meshd.net.resources import Action, Change, Tags
from meshd.reconcile.own_tags import SerfTags
from tests.bench.stand_in import serving

pytestmark = [pytest.mark.root]

PORT = 7001


@contextmanager
def _real(tags: dict[str, str], directory: Path) -> Iterator[int]:
    address = Endpoint(IPv4Address("127.0.0.1"), 7946)
    config = serf.agent_config(
        name="barge1",
        bind=address,
        advertise=address,
        encrypt_key=bytes(32),
        rpc_port=PORT,
        rpc_auth="secret",
        tags=tags,
        event_handlers=(),
    )
    path, log = directory / "serf.json", directory / "serf.log"
    path.write_text(json.dumps(config))
    pid = serf.start(path, log)
    try:
        serf.wait_ready(Access(PORT, lambda: "secret", lambda: [pid]), pid, log).close()
        yield pid
    finally:
        serf.stop(pid)


@contextmanager
def _stand_in(tags: dict[str, str], _directory: Path) -> Iterator[int]:
    with serving(PORT, "secret", [Member("barge1", IPv4Address("127.0.0.1"), 7946, Status.ALIVE, tags)]):
        yield os.getpid()


@pytest.fixture(params=[_real, _stand_in], ids=["serf", "stand-in"])
def agent(request: pytest.FixtureRequest, netns: object, tmp_path: Path) -> Iterator[Access]:
    """The way to barge1, with one tag that is not meshd's."""
    assert netns
    with request.param({"role": "web"}, tmp_path) as pid:
        yield Access(PORT, lambda: "secret", lambda: [pid])


def test_rpc_requires_key(agent: Access) -> None:
    """Without the right key the RPC answers nothing."""
    for wrong in ("", "wrong"):
        with (
            pytest.raises(SerfError, match=r"[Aa]uth"),
            Serf.connect(replace(agent, key=lambda: wrong)) as client,
        ):
            client.members()


def test_rpc_lists_member(agent: Access) -> None:
    """A member is listed with address, state and tags."""
    with Serf.connect(agent) as client:
        for _ in range(2):
            member = Member("barge1", IPv4Address("127.0.0.1"), 7946, Status.ALIVE, {"role": "web"})
            assert client.members() == [member]
        assert client.stats()


def test_rpc_entry_has_documented_fields(agent: Access) -> None:
    """An entry of the list has the same fields in the same types."""
    with Serf.connect(agent) as client:
        entry = client._call("members", body=True)["Members"][0]
    assert {key: type(value) for key, value in entry.items()} == {
        **dict.fromkeys((b"Name", b"Addr", b"Status"), bytes),
        b"Tags": dict,
        **dict.fromkeys((b"Port", b"ProtocolMin", b"ProtocolMax", b"ProtocolCur"), int),
        **dict.fromkeys((b"DelegateMin", b"DelegateMax", b"DelegateCur"), int),
    }


def test_rpc_tag_size_limit(agent: Access) -> None:
    """Tags up to the limit are carried, and one byte more is refused."""
    fits = {"meshd": "x" * (LIMIT - size({"meshd": "x" * 400}) + 400)}
    assert size(fits) == LIMIT
    with Serf.connect(agent) as client:
        client.tags(fits, ["role"])
        assert client.members()[0].tags == fits
        with pytest.raises(SerfError, match="tags"):
            client.tags({"meshd": fits["meshd"] + "x"})
        assert client.members()[0].tags == fits


def test_own_tags_keep_foreign_tags(agent: Access) -> None:
    """meshd's tags are added, changed and removed, and those of others stay."""

    def members() -> list[Member]:
        with Serf.connect(agent) as client:
            return client.members()

    adapter = SerfTags(agent, "barge1", ("meshd", "wg"), members)
    assert adapter.read() == []
    wanted = Tags((("meshd", "1;seq=1"), ("wg", "x")))
    for _ in range(2):
        adapter.apply(Change(Action.ADD, wanted))
    assert adapter.read() == [wanted]
    adapter.apply(Change(Action.SET, Tags((("meshd", "1;seq=2"),)), wanted))
    assert adapter.read() == [Tags((("meshd", "1;seq=2"),))]
    adapter.apply(Change(Action.REMOVE, wanted))
    assert adapter.read() == []
    assert members()[0].tags == {"role": "web"}
