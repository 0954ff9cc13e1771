"""What every speaker of rtnetlink shares: the socket, and the kernel's refusals as meshd's errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from meshd.errors import ApplyError

RT_TABLE_MAIN = 254
RTN_UNICAST, RTN_UNREACHABLE = 1, 7


@contextmanager
def rtnetlink(doing: str) -> Iterator[Any]:
    """An rtnetlink socket, in no multicast group; what the kernel refuses is an ApplyError that begins with `doing`."""
    try:
        # Strict checks let the kernel filter dumps by interface (Linux 4.20).
        with IPRoute(groups=0, strict_check=True) as ipr:
            yield ipr
    except (NetlinkError, OSError) as error:
        raise ApplyError(f"{doing}: {error.args[-1] if error.args else error}") from error


@contextmanager
def tolerating(*codes: int) -> Iterator[None]:
    """Let these kernel errors pass: they say that what was wanted is already so."""
    try:
        yield
    except NetlinkError as error:
        if error.code not in codes:
            raise


def link_kind(message: Any) -> str:
    """IFLA_INFO_KIND; `device` for what has none (loopback, hardware)."""
    return str(message.get(("linkinfo", "kind")) or "device")
