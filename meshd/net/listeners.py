"""Who has a port on this machine: the sockets that /proc/net lists (proc_net(5)), and the processes that hold them."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path

from meshd.endpoint import IPAddress
from meshd.errors import ApplyError

# include/net/tcp_states.h. A UDP socket occupies its port in every state.
_LISTEN = 10
_ANYWHERE_6 = IPv6Address(0)


@dataclass(frozen=True, slots=True)
class Process:
    """A process: its number, the kernel's name of it, and the words by which it was started."""

    pid: int
    name: str
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that occupies a port, `tcp` or `udp`. The kernel's own, as WireGuard's, have an inode and no process."""

    protocol: str
    address: IPAddress
    port: int
    inode: int

    def occupies(self, protocol: str, address: IPAddress, port: int) -> bool:
        """Return whether a socket of that protocol cannot have the port at that address because of this one."""
        if (self.protocol, self.port) != (protocol, port):
            return False
        if self.address.version != address.version:
            return self.address == _ANYWHERE_6  # which usually is all of IPv4 as well
        return self.address == address or self.address.is_unspecified or address.is_unspecified


def holders(protocol: str, address: IPAddress, port: int) -> list[Process]:
    """Return the processes whose sockets keep others from a port at an address, none for the kernel's own sockets.

    Raises ApplyError.
    """
    inodes = {each.inode for each in listeners() if each.occupies(protocol, address, port)}
    return sorted(_processes(inodes - {0}), key=lambda process: process.pid) if inodes else []


def listeners() -> Iterator[Listener]:
    """Yield all sockets of this network namespace that occupy a port. Raises ApplyError."""
    for protocol in ("tcp", "udp"):
        for table in (protocol, f"{protocol}6"):
            try:
                text = Path(f"/proc/net/{table}").read_text()
            except FileNotFoundError:
                continue  # a kernel without IPv6
            except OSError as error:
                raise ApplyError(f"looking who has which port: /proc/net/{table}: {error.strerror}") from error
            yield from parse(protocol, text)


def parse(protocol: str, table: str) -> Iterator[Listener]:
    """Yield the sockets of one table of /proc/net that occupy a port; `protocol` is `tcp` or `udp`."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        address, _, port = fields[1].partition(":")
        if protocol == "udp" or int(fields[3], 16) == _LISTEN:
            yield Listener(protocol, _address(address), int(port, 16), int(fields[9]))


def _address(text: str) -> IPAddress:
    """Read an address of /proc/net: words of 32 bits, each in the machine's byte order; a mapped one is IPv4."""
    raw = bytes.fromhex(text)
    if sys.byteorder == "little":
        raw = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    address = ip_address(raw)
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _processes(inodes: Iterable[int]) -> Iterator[Process]:
    """Yield the processes that hold one of these sockets; those of others that may not be seen are left out."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for entry in Path("/proc").iterdir():
        # A process may end at any moment.
        with suppress(OSError):
            if entry.name.isdigit() and any(str(fd.readlink()) in wanted for fd in (entry / "fd").iterdir()):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
                yield Process(int(entry.name), (entry / "comm").read_text(errors="replace").strip(), tuple(words))
