"""Which subnet a host takes, decided without a leader: pure functions on prefixes."""

from collections.abc import Collection, Iterator
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network

from meshd.endpoint import IPAddress
from meshd.errors import ConflictError, InputError

# What RFC 1918 leaves to everybody.
PRIVATE = tuple(map(IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")))
# Others begin below it, as Docker Swarm at 10.0.0.0, or above it, as Kubernetes at 10.96.0.0.
PREFERRED = IPv4Address("10.80.0.0")


def check_overlay(overlay: IPv4Network, length: int) -> None:
    """Refuse an overlay that cannot be cut into at least two usable subnets of `length`. Raises InputError."""
    if not overlay.prefixlen + 2 <= length <= 30:
        raise InputError(
            f"the overlay {overlay} cannot be cut into /{length} subnets: "
            f"the subnet length must be {overlay.prefixlen + 2} to 30"
        )
    if (
        overlay.is_multicast
        or overlay.is_loopback
        or overlay.is_link_local
        or overlay.overlaps(IPv4Network("0.0.0.0/8"))
    ):
        raise InputError(f"{overlay} cannot be used as overlay: choose a range within 10.0.0.0/8 or 172.16.0.0/12")


def capacity(overlay: IPv4Network, length: int) -> int:
    """Return the number of hosts that an overlay has room for: all its subnets but the first and the last."""
    return int(2 ** (length - overlay.prefixlen)) - 2


def is_usable(subnet: IPv4Network, overlay: IPv4Network) -> bool:
    """Return whether a subnet holds neither the overlay's network address nor its broadcast address."""
    return subnet.network_address != overlay.network_address and subnet.broadcast_address != overlay.broadcast_address


def is_allowed(subnet: IPv4Network, allowed: Collection[IPv4Network]) -> bool:
    """Return whether a subnet is inside one of a certificate's prefixes; without any, every subnet is allowed."""
    return not allowed or any(subnet.subnet_of(prefix) for prefix in allowed)


def choose(
    overlay: IPv4Network,
    length: int,
    taken: Collection[IPv4Network],
    underlay: IPAddress,
    identity: str,
    *,
    persisted: IPv4Network | None = None,
    allowed: Collection[IPv4Network] = (),
) -> IPv4Network:
    """Pick a free subnet: the persisted one, the underlay address's last octet, a hash of the identity, upwards.

    Where prefixes are `allowed`, one inside them. Raises ConflictError when every subnet is taken.
    """
    free = (
        s
        for s in _candidates(overlay, length, underlay, identity, persisted)
        if s not in taken and is_allowed(s, allowed)
    )
    subnet = next(free, None)
    if subnet is None and allowed:
        raise ConflictError(
            f"the certificate of this host allows {', '.join(map(str, allowed))} only, where no subnet is free"
        )
    if subnet is None:
        raise ConflictError(
            f"the overlay {overlay} is exhausted: all {capacity(overlay, length)} subnets of length /{length} are taken"
        )
    return subnet


def _candidates(
    overlay: IPv4Network, length: int, underlay: IPAddress, identity: str, persisted: IPv4Network | None
) -> Iterator[IPv4Network]:
    if persisted is not None:
        yield persisted
    room = capacity(overlay, length)
    octet = underlay.packed[-1]
    if 1 <= octet <= room:
        yield _nth(overlay, length, octet)
    start = int.from_bytes(sha256(identity.encode()).digest()[:8], "big")
    for step in range(room):
        yield _nth(overlay, length, 1 + (start + step) % room)


def free_overlay(taken: Collection[IPv4Network], length: int) -> IPv4Network | None:
    """Return a private range that overlaps nothing `taken`, for an overlay with subnets of `length`; None without one.

    It is a /16 where one is free, otherwise the largest range that is, and always the same one.
    """
    for size in range(16, length - 1):
        for private in PRIVATE:
            others = [each for each in taken if each.overlaps(private)]
            if size < private.prefixlen or any(private.subnet_of(each) for each in others):
                continue
            fits = list(private.subnets(new_prefix=size))
            first = next((i for i, each in enumerate(fits) if each.network_address >= PREFERRED), 0)
            for candidate in (*fits[first:], *fits[:first]):
                if not any(candidate.overlaps(other) for other in others):
                    return candidate
    return None


def _nth(overlay: IPv4Network, length: int, index: int) -> IPv4Network:
    base = int(overlay.network_address)
    return IPv4Network((base + (index << (32 - length)), length))
