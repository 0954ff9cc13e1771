"""WireGuard: one contract, two backends, which `find` chooses between.

`kernel` speaks generic netlink (include/uapi/linux/wireguard.h), `userspace` the text protocol of wireguard-go
(https://www.wireguard.com/xplatform/). Neither needs `wg`. `contract` holds what both share.
"""

import shutil

from meshd.errors import InputError, MissingError
from meshd.net.resources import Device
from meshd.net.wireguard.contract import PROGRAM, WireGuard

_NO_KERNEL = "this kernel has no WireGuard"
_NO_PROGRAM = f"{PROGRAM} is not installed"


def find(name: str, private_key: bytes, prefer: str = "auto") -> WireGuard:
    """The adapter of the device `name` (which need not exist yet), holding its 32-byte private key.

    A device that exists decides the backend: it is adopted, whatever `prefer` says. Else `prefer` does: `kernel`,
    `userspace`, or `auto` (the kernel when it can). Raises MissingError, which says what to install; InputError for
    another `prefer`; ApplyError.
    """
    # pyroute2 costs 200 ms to import and nacl 36 ms: nobody who merely imports this package should wait for them.
    from meshd.net.wireguard.userspace import Userspace, is_running  # noqa: PLC0415

    if prefer not in ("auto", "kernel", "userspace"):
        raise InputError(f"WireGuard backend {prefer!r}: use auto, kernel or userspace")
    if is_running(name):
        return Userspace(name, private_key)

    from meshd.net.wireguard.kernel import Kernel, has_device, is_available  # noqa: PLC0415

    if has_device(name):
        return Kernel(name, private_key)
    if prefer != "userspace" and is_available():
        return Kernel(name, private_key)
    if prefer != "kernel" and shutil.which(PROGRAM):
        return Userspace(name, private_key)
    raise MissingError(_advice(prefer))


def link_on(port: int) -> str:
    """The link of the kernel's WireGuard that listens on a UDP port, the empty string if none does. Raises ApplyError.

    The kernel's own sockets have no process. wireguard-go's have.
    """
    from meshd.net.links import link_names  # noqa: PLC0415  pyroute2, as above
    from meshd.net.wireguard.kernel import Kernel  # noqa: PLC0415

    for name, kind in link_names().items():
        device = Kernel(name, b"").read()[:1] if kind == "wireguard" else []
        if any(isinstance(each, Device) and each.port == port for each in device):
            return name
    return ""


def _advice(prefer: str) -> str:
    install, load = f"apt install {PROGRAM}", "load the module (modprobe wireguard)"
    if prefer == "kernel":
        return f"{_NO_KERNEL}: {load}"
    if prefer == "userspace":
        return f"{_NO_PROGRAM}: {install}"
    return f"{_NO_KERNEL} and {_NO_PROGRAM}: {install}, or {load}"
