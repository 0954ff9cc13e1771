"""Which underlay address this host has: it follows the one that it found, unless somebody chose one.

An address that is replaced on its own link is followed at once. For an address of another link the host leaves its
home only when the old one stays away and a member answers there: a network for management, or a worse uplink, may
reach nobody. It goes back when the home is back.
"""

import logging
import math
import random
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from meshd.endpoint import Endpoint, IPAddress
from meshd.errors import InputError
from meshd.gossip import serf_agent
from meshd.net import underlay
from meshd.state.directory import Found, Place, State

log = logging.getLogger("meshd")

# Seconds that an address is away before the host leaves its link, that the home is back before the host returns, and
# from one question to the next where no member has answered.
PATIENCE = 10.0
# How many members are asked at once, and the seconds in which one of them has to answer. The daemon waits for that.
ASKED, ANSWER = 8, 1.0
# Why a host may be about to move: its address is away, or its home is there again.
GONE, BACK = "gone", "back"


@dataclass(frozen=True, slots=True)
class Seen:
    """What is on this host: the link of each address, and from where the kernel would send to a member, if anywhere."""

    links: Mapping[IPAddress, str]
    route: Place | None


@dataclass(frozen=True, slots=True)
class Wish:
    """Where the host wants to be. If it `asks`, a member has to answer there before.

    It is asked from `source`, or with None from wherever the kernel sends to that member.
    """

    place: Place
    asks: bool
    source: IPAddress | None = None


class Follower:
    """Decides by what was seen, and since when. It takes the clock as an argument and touches nothing."""

    def __init__(self) -> None:
        self._cause = ""
        self._since = self._asked = -math.inf
        # Whether the address was seen on this host since the daemon's start.
        self._had = False

    @property
    def waits(self) -> bool:
        """Whether to look again soon: the address is away, or the home is back."""
        return self._cause != ""

    def wish(self, found: Found | None, seen: Seen, now: float) -> Wish | None:
        """Return where this host wants to be at the monotonic time `now`, None to stay."""
        is_here = found is not None and found.place.address in seen.links
        home = _home(found, seen) if found is not None and is_here else None
        self._had |= is_here
        cause = GONE if not is_here else BACK if home else ""
        if cause != self._cause:
            self._cause, self._since = cause, now
        target = home if is_here else seen.route
        if target is None:
            return None
        if not is_here and (found is None or found.place.link in ("", target.link)):
            return Wish(target, asks=False)
        if now < max(self._since, self._asked) + PATIENCE:
            return None
        self._asked = now
        return Wish(target, asks=True, source=target.address if is_here else None)

    def is_stranded(self, found: Found, links: Collection[str]) -> bool:
        """Return whether this host takes what it can get: it started on a machine of which the old link is no part."""
        return self._cause == GONE and not self._had and found.place.link not in links


def _home(found: Found, seen: Seen) -> Place | None:
    """Return the home of a host that is away from it, if the home is back: its address, or another one of its link."""
    if found.home.address == found.place.address:
        return None
    if link := seen.links.get(found.home.address):
        return Place(found.home.address, link)
    return seen.route if seen.route and seen.route.link == found.home.link else None


def moved(found: Found | None, place: Place) -> Found:
    """Return what is to be remembered after a move to `place`. The home stays behind on another link."""
    home = place if found is None else found.home
    is_home = home.address == place.address or home.link in ("", place.link)
    return Found(place, place if is_home else home)


def follow(state: State, follower: Follower, now: float) -> Place | None:
    """Move to the address where this host should be at the monotonic time `now`; return it, None if it stays.

    Serf, which is bound to the old one, is ended; whoever starts it next starts it on the new one. Raises InputError
    for an address that no host can have, ApplyError.
    """
    if state.settings.bind is not None:
        return None
    links, found = underlay.links_of_addresses(), state.found()
    if found is not None and (link := links.get(found.place.address, "")) not in ("", found.place.link):
        # An older version did not keep the link. Or the address went with its link into a bridge or a bond.
        found = _on(found, link)
        state.save_found(found)
    if found is not None and found.place == found.home and found.place.address in links:
        contacts, route = dict[str, Endpoint](), None  # mostly it is so, and nothing else has to be read
    else:
        contacts = state.contacts()
        route = _route(contacts.values(), links)
    wish = follower.wish(found, Seen(links, route), now)
    if wish is None:
        return None
    state.settings.check_underlay(wish.place.address)
    place: Place | None = wish.place
    if wish.asks and contacts:  # a host that knows nobody harms nobody
        place = _answered(wish, contacts.values(), links)
        if place is None and found is not None and follower.is_stranded(found, [n for _, n in socket.if_nameindex()]):
            place = wish.place
    if place is not None:
        state.settings.check_underlay(place.address)
        state.save_found(moved(found, place))
        serf_agent.stop(state)
    return place


def _on(found: Found, link: str) -> Found:
    place = Place(found.place.address, link)
    return Found(place, place if found.home == found.place else found.home)


def _route(contacts: Collection[Endpoint], links: Mapping[IPAddress, str]) -> Place | None:
    """Return from where the kernel would send to the first member, or anywhere if none is known."""
    contact = next(iter(contacts), None)
    with suppress(InputError):  # no route, which may come at any time
        address = underlay.source_address(contact.address if contact else None)
        return Place(address, links.get(address, ""))
    return None


def _answered(wish: Wish, contacts: Collection[Endpoint], links: Mapping[IPAddress, str]) -> Place | None:
    """Return the place from which a member could be reached, None if none answers."""
    asked = random.sample([*contacts], min(ASKED, len(contacts)))
    source = underlay.answered(asked, wish.source, ANSWER)
    if source is None or source not in links:
        log.debug("no member answers at %s of %s", wish.place.address, wish.place.link)
        return None
    return Place(source, links[source])
