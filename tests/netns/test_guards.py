"""What keeps the overlay from leaving in clear is laid whatever else a host lacks."""

import shutil
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from meshd.net.resources import Route, Table
from meshd.reconcile.run import Options, dismantle, sync
from meshd.state.claim import endpoint, publish
from meshd.state.directory import State
from tests.netns.conftest import Namespace

pytestmark = [pytest.mark.root]


def test_guards_are_laid_without_wireguard_and_serf(
    netns: Namespace, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without WireGuard, Serf and an underlay, the table and the unreachable route are still laid and removed."""
    found = shutil.which("nft")
    assert found
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nft").symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    settings = replace(
        state.settings, docker=False, wireguard=netns.link_name(), rpc_port=7399, wireguard_backend="userspace"
    )
    state.save_settings(settings)
    publish(state, state.claim(), subnet=IPv4Network("172.20.101.0/24"), endpoint=endpoint(state), settled=True)

    report = sync(state, Options(kinds=("table", "device", "peer", "route", "tags", "link")))
    assert {failure.subject or failure.area for failure in report.failures} >= {
        "device",
        "peer",
        "members",
        "underlay",
    }
    assert [type(change.resource) for change in report.changes] == [Table, Table, Route]
    assert sync(state, Options(kinds=("table", "route"))).changes == (), "they are there"

    report = dismantle(state)
    assert {failure.subject or failure.area for failure in report.failures} == {"device", "peer"}
    assert {type(change.resource) for change in report.changes} == {Table, Route}
    assert sync(state, Options(kinds=("table", "route"), dry=True)).changes != ()
