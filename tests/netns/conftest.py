"""Network namespaces for tests that meet the real kernel."""

import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pyroute2 import IPRoute, netns

from meshd.net.netlink import one_socket

_numbers = itertools.count()


@dataclass
class Namespace:
    """A network namespace by name; `entered()` moves the calling thread (and what it starts) into it for a while."""

    name: str
    links: list[str] = field(default_factory=list)

    @contextmanager
    def entered(self) -> Iterator["Namespace"]:
        # Not pushns(): it keeps one stack for all threads.
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            netns.setns(self.name, flags=0)
            yield self
        finally:
            netns.setns(before)
            os.close(before)

    def link_name(self, stem: str = "wg") -> str:
        """A name that no other test has: wireguard-go's sockets are shared by all namespaces."""
        name = f"{stem}{os.getpid() % 100000}x{next(_numbers)}"
        self.links.append(name)
        return name


@contextmanager
def namespace() -> Iterator[Namespace]:
    space = Namespace(f"meshd-test-{os.getpid()}-{next(_numbers)}")
    netns.create(space.name)
    try:
        with space.entered(), IPRoute(groups=0) as ipr:
            ipr.link("set", index=1, state="up")
        yield space
    finally:
        # A wireguard-go keeps its namespace, and itself, alive as long as its link is there.
        with space.entered(), IPRoute(groups=0) as ipr:
            for message in ipr.link("dump"):
                if message.get(("linkinfo", "kind")) in ("tun", "wireguard"):
                    ipr.link("del", index=message["index"])
        _end_wireguard_go(space)
        netns.remove(space.name)


def _end_wireguard_go(space: Namespace) -> None:
    """End those that a failed test left without a link, found by the names that this test gave them."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if Path(words[0]).name == "wireguard-go" and words[1] in space.links:
                os.kill(int(process.name), signal.SIGTERM)
        except (OSError, IndexError, UnicodeDecodeError):
            continue
    for name in space.links:
        Path(f"/var/run/wireguard/{name}.sock").unlink(missing_ok=True)


@pytest.fixture(params=["a socket each", "one socket"])
def sockets(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to speak rtnetlink: as a command does, and as a pass does."""
    with one_socket() if request.param == "one socket" else nullcontext():
        yield


@pytest.fixture
def netns_pair() -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces joined by a veth pair `u0`: 10.9.0.1/24 and 10.9.0.2/24. The test starts outside of both."""
    with ExitStack() as stack:
        one, two = (stack.enter_context(namespace()) for _ in range(2))
        with one.entered(), IPRoute(groups=0) as ipr:
            ipr.link("add", ifname="u0", kind="veth", peer={"ifname": "u0", "net_ns_fd": two.name})
        for space, address in ((one, "10.9.0.1"), (two, "10.9.0.2")):
            with space.entered(), IPRoute(groups=0) as ipr:
                index = ipr.link("get", ifname="u0")[0]["index"]
                ipr.addr("add", index=index, address=address, prefixlen=24)
                ipr.link("set", index=index, state="up")
        yield one, two


@pytest.fixture(name="netns")
def netns_fixture() -> Iterator[Namespace]:
    """A fresh network namespace with `lo` up; the test runs in it."""
    with namespace() as space, space.entered():
        yield space
