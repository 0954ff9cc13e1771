"""What one reusable invitation can make a host keep: how many hosts, how many tombstones, and for how long."""

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.files import LIMIT
from meshd.mesh import certificates, extensions, membership, shares, tombstones
from meshd.mesh.membership import admit
from meshd.mesh.model import MAX_HOSTS, Certificate, Delegation, Host, Record, Revocation, Status, Tombstone
from meshd.mesh.records import MAX_PREFIX
from meshd.mesh.roster import CROWDED, Roster, View
from meshd.mesh.shares import FOR_STRANGERS, PLACES, SAME
from meshd.mesh.tombstones import Tombstones, grave
from meshd.state.directory import State
from tests.conftest import AUTHORITY, MESH, NOW, certificate, delegated, delegation, forgotten, host, member, record

OWN = host(1)
# How many hosts the invitations of these tests are for.
FEW = 3
BY, BY_ANOTHER = delegation(hosts=FEW), delegation(hosts=FEW, serial=8)


def named(number: int) -> str:
    return f"barge{number}"


def came(number: int, by: Delegation = BY, *, seq: int = 1, leaving: bool = False, key: str | None = None) -> Record:
    """What a host publishes that came by a reusable invitation."""
    return record(number, seq=seq, by=delegated(named(number), by), leaving=leaving, key=key)


def goodbye(number: int, by: Delegation = BY, seq: int = 2) -> Tombstone:
    return tombstones.of_leaving(came(number, by, seq=seq, leaving=True))


def graves(numbers: Iterable[int], by: Delegation = BY) -> dict[str, dict[bytes, Tombstone]]:
    return {named(n): {goodbye(n, by).identity: goodbye(n, by)} for n in numbers}


def seen(known: Roster, *records: tuple[int, Record], now: float = NOW) -> Roster:
    return admit(View(OWN, MESH, known, now), [member(n, of=r) for n, r in records])


def told(known: Roster, news: Tombstones, now: float = NOW) -> Roster:
    return membership.merge_tombstones(known, MESH, news, OWN, now)


def count(roster: Roster, by: Delegation = BY) -> tuple[int, int]:
    """How many hosts, and how many tombstones, are kept by an invitation."""
    hosts = [r for r in roster.hosts.values() if r.certificate.delegation == by]
    return len(hosts), sum(t.delegation == by for _, _, t in tombstones.each(roster.gone))


# --- hosts -----------------------------------------------------------------------------------------------------------


def test_so_many_hosts_are_taken_at_once() -> None:
    """An invitation for three admits three at once; the fourth waits for the authority, and says so."""
    four = [(n, came(n)) for n in range(2, 6)]
    roster = seen(Roster(), *four)
    assert len(roster.hosts) == FEW
    (name,) = roster.waiting
    assert roster.refused == {name: CROWDED}
    assert roster.waiting[name] == dict(four)[int(name[-1])]
    assert seen(Roster(), *reversed(four)).hosts == roster.hosts, "in whatever order they come"
    confirmed = [(n, record(n, seq=2) if named(n) == name else r) for n, r in four]
    assert seen(roster, *confirmed).refused == {}, "the authority's own certificate needs no place"
    others = [(n, record(n, seq=2) if named(n) in roster.hosts else r) for n, r in four]
    assert len(seen(seen(roster, *others), *others).hosts) == 4, "whom the authority has confirmed has left a place"


def test_an_honest_roll_out_is_not_slowed() -> None:
    """As many hosts as the invitation is for are admitted in one pass, confirmed, and as many after them."""
    first, second = range(2, 2 + FEW), range(2 + FEW, 2 + 2 * FEW)
    roster = seen(Roster(), *((n, came(n)) for n in first))
    assert (roster.refused, len(roster.hosts)) == ({}, FEW)
    roster = seen(roster, *((n, record(n, seq=2)) for n in first))
    roster = seen(roster, *((n, came(n)) for n in second))
    assert (roster.refused, len(roster.hosts)) == ({}, 2 * FEW)


def test_known_hosts_are_never_dropped_by_a_bound() -> None:
    """Hosts that an earlier version took stay, and their records change; no other one is taken."""
    known = Roster({named(n): came(n) for n in range(2, 2 + 2 * FEW)}, graves(range(20, 20 + PLACES * FEW)))
    changed = [(n, came(n, seq=2, key=f"new{n}")) for n in range(2, 2 + 2 * FEW)]
    roster = seen(known, *changed, (9, came(9)))
    assert roster.hosts == {named(n): r for n, r in changed}
    assert roster.refused == {"barge9": CROWDED}
    assert roster.gone == known.gone


def test_a_host_that_changes_its_invitation_needs_a_place_there() -> None:
    """It would else have places by one invitation, and leave tombstones by the other."""
    known = Roster({"barge2": came(2)}, graves(range(20, 20 + PLACES * FEW), BY_ANOTHER))
    roster = seen(known, (2, came(2, BY_ANOTHER, seq=2)))
    assert roster.hosts == known.hosts
    assert roster.refused == {"barge2": CROWDED}
    assert told(known, Tombstones(graves([2], BY_ANOTHER))) == known
    assert seen(known, (2, came(2, BY_ANOTHER, seq=2, leaving=True))).hosts == known.hosts
    assert seen(known, (2, came(2, seq=2, leaving=True))).hosts == {}, "by its own it leaves"


class Watched(certificates.Trust):
    """Notes whose signatures are checked."""

    checked: ClassVar[list[str]] = []

    def check(self, name: str, record: Record) -> None:
        self.checked.append(name)
        super().check(name, record)


def test_no_time_is_lost_on_strangers_that_change_nothing() -> None:
    """Serf lists thousands that said goodbye for a day; without a place, nobody checks what they have signed."""
    mesh = replace(MESH, trust=Watched(MESH.trust.mesh, MESH.trust.authority))
    known = Roster({}, graves(range(20, 20 + FOR_STRANGERS * FEW)))
    by_revoked = came(5, delegation(hosts=FEW, serial=9))
    said = [
        *(member(n, Status.LEFT, of=came(n, leaving=True)) for n in (2, 20)),
        member(3, Status.FAILED, of=came(3)),
        member(4, Status.ALIVE, of=came(4, leaving=True)),
        member(5, Status.FAILED, of=by_revoked),
    ]
    Watched.checked.clear()
    known = replace(known, revoked={9: Revocation(9, "invitation-9", b"signature")})
    roster = admit(View(OWN, mesh, known, NOW), said)
    # The tombstone of the first one is here, the second one is a host, the third one is alive.
    assert Watched.checked == ["barge20", "barge3", "barge4"]
    assert (set(roster.hosts), roster.gone) == ({"barge3"}, known.gone)


# --- tombstones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["told", "tags"])
def test_strangers_leave_room_for_hosts(way: str) -> None:
    """Tombstones of identities that were no hosts leave room for as many hosts as the invitation is for."""
    many = range(20, 20 + 2 * PLACES * FEW)
    if way == "told":
        roster = told(Roster(), Tombstones(graves(many)))
        for n in many:
            roster = told(roster, Tombstones(graves([n])))
    else:
        roster = seen(Roster(), *((n, came(n, leaving=True)) for n in many))
    assert count(roster) == (0, FOR_STRANGERS * FEW)
    roster = seen(roster, *((n, came(n)) for n in range(2, 2 + FEW)))
    assert count(roster) == (FEW, FOR_STRANGERS * FEW)
    left = told(roster, Tombstones(graves(range(2, 2 + FEW))))
    assert count(seen(left)) == (0, PLACES * FEW), "and each of these hosts has a place for its tombstone"
    assert seen(seen(left), (9, came(9))).refused == {"barge9": CROWDED}
    later = Tombstones(grave("barge20", goodbye(20, seq=9)))
    assert told(seen(left), later).gone["barge20"] == later.gone["barge20"], "a later one takes over the place"


@given(st.lists(st.tuples(st.sampled_from(["come", "leave", "say", "tell"]), st.integers(2, 40)), max_size=60))
def test_whatever_comes_is_bounded_and_no_goodbye_of_a_host_is_lost(steps: list[tuple[str, int]]) -> None:
    """Hosts and tombstones together never exceed their share, and each admitted host's goodbye ends it for good."""
    roster, ended = Roster(), set[str]()
    for step, number in steps:
        was_host = named(number) in roster.hosts
        if step == "come":
            roster = seen(roster, (number, came(number)))
        elif step == "leave":
            roster = seen(roster, (number, came(number, seq=2, leaving=True)))
        else:
            news = Tombstones(graves([number]))
            roster = told(roster, news) if step == "tell" else seen(told(roster, news))
        ended |= {named(number)} if was_host and step != "come" else set()
        hosts, kept = count(seen(roster))
        assert hosts <= FEW
        assert hosts + kept <= PLACES * FEW
    assert ended <= roster.gone.keys()
    again = seen(roster, *((int(name.removeprefix("barge")), came(int(name.removeprefix("barge")))) for name in ended))
    assert again.hosts.keys().isdisjoint(ended)


def test_an_invitation_takes_no_place_of_another_one() -> None:
    """What comes by one invitation leaves all places of the others, and bounds nothing of the authority's own."""
    full = told(Roster(), Tombstones(graves(range(20, 20 + PLACES * FEW))))
    full = seen(full, *((n, came(n)) for n in range(2, 2 + FEW)))
    others = seen(full, *((n, came(n, BY_ANOTHER)) for n in range(6, 6 + FEW)))
    assert count(others, BY_ANOTHER) == (FEW, 0)
    many = {named(n): {t.identity: t} for n in range(50, 90) for t in [tombstones.of_leaving(record(n, leaving=True))]}
    assert many.keys() <= told(others, Tombstones(many)).gone.keys()


def test_all_invitations_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many invitations there are, what is kept by them has a bound."""
    monkeypatch.setattr(shares, "MOST", 8)
    roster = told(Roster(), Tombstones(graves(range(20, 30)) | graves(range(30, 40), BY_ANOTHER)))
    assert count(roster)[1] + count(roster, BY_ANOTHER)[1] == 6
    roster = seen(roster, *((n, came(n, by)) for n, by in ((2, BY), (3, BY_ANOTHER), (4, BY))))
    assert len(roster.hosts) == 2
    assert len(roster.waiting) == 1


# --- the end of an invitation ----------------------------------------------------------------------------------------


def revoked(serial: int) -> Tombstones:
    return Tombstones(revoked={serial: certificates.revoke(AUTHORITY, "meshd", serial, "any")})


def test_a_revocation_drops_all_that_came_by_the_invitation() -> None:
    """Its tombstones at once, its hosts in the next pass; confirmed hosts and all other tombstones stay."""
    other, own = graves([30], BY_ANOTHER), grave("barge40", tombstones.of_leaving(record(40, leaving=True)))
    words = grave("barge41", forgotten(came(41), 41)) | other | own
    known = told(Roster(), Tombstones(graves(range(20, 26)) | words))
    known = seen(known, (2, came(2)), (3, record(3)))
    assert count(known) == (1, 6)
    after = told(known, revoked(BY.serial))
    assert after.gone == words
    assert seen(after).hosts == {"barge3": record(3)}
    again = told(after, Tombstones(graves(range(20, 26))))
    assert again == after, "and what others still have does not come back"
    at_once = Tombstones(graves(range(20, 26)) | words).merged(revoked(BY.serial))
    assert told(Roster(), at_once).gone == words, "in one message"


def test_an_expired_invitation_leaves_nothing() -> None:
    """Its tombstones end with it, when Serf is asked and when others tell of them."""
    known = told(Roster(), Tombstones(graves(range(20, 26)) | graves([30], delegation(serial=9, expires=0))))
    assert list(seen(known, now=float(BY.expires)).gone) == ["barge30"]
    assert list(told(known, revoked(99), now=float(BY.expires)).gone) == ["barge30"]
    assert told(Roster(), Tombstones(graves([20])), now=float(BY.expires)) == Roster()


def test_a_revoked_identity_needs_no_tombstone() -> None:
    """What its invitation signed for it can never count again."""
    known = told(Roster(), Tombstones(graves([20, 21])))
    assert list(told(known, revoked(goodbye(20).by.serial)).gone) == ["barge21"]  # type: ignore[union-attr]


@pytest.mark.parametrize("word", ["own", "authority's"])
def test_a_goodbye_by_an_invitation_replaces_none_that_outlives_it(word: str) -> None:
    """The end of a membership that the authority is behind stays when the invitation has ended."""
    mine = record(2, seq=5, leaving=True)
    kept = tombstones.of_leaving(mine) if word == "own" else forgotten(record(2, seq=5), 2)
    later = Tombstones(graves([2])).merged(Tombstones(grave("barge2", goodbye(2, seq=9))))
    known = Roster(gone=grave("barge2", kept))
    for roster in (
        told(known, later),
        seen(known, (2, came(2, seq=9, leaving=True))),
        told(told(Roster(), later), Tombstones(grave("barge2", kept))),
    ):
        assert roster.gone == known.gone
        after = seen(told(roster, revoked(BY.serial)), (2, record(2, seq=4)))
        assert after.hosts == {}


@pytest.mark.parametrize("way", ["told", "tags"])
def test_what_an_invitation_signs_does_not_end_whom_the_authority_has_confirmed(way: str) -> None:
    """Such a tombstone would be gone with the invitation, and the host back."""
    known = seen(Roster(), (2, record(2, seq=5)))
    roster = (
        seen(told(known, Tombstones(grave("barge2", goodbye(2, seq=9)))))
        if way == "told"
        else seen(known, (2, came(2, seq=9, leaving=True)))
    )
    assert (roster.hosts, roster.gone) == (known.hosts, {})
    left = told(Roster({"barge2": came(2)}), Tombstones(grave("barge2", goodbye(2))))
    assert seen(left, (2, record(2, seq=3))).hosts == {"barge2": record(2, seq=3)}


def test_who_leaves_without_a_daemon_has_a_place_as_well(state: State) -> None:
    """Serf's own leave, on a host without a daemon, is bounded, survives on disk, and ends with the invitation."""

    def left(known: Roster, *numbers: int) -> Roster:
        members = [member(n, Status.LEFT, came(n)) for n in numbers]
        return admit(View(OWN, MESH, known, NOW), members, left_is_goodbye=True)

    roster = left(Roster({"barge2": came(2), "barge3": record(3)}), *range(2, 2 + 2 * PLACES * FEW))
    assert (set(roster.hosts), count(roster)[1]) == ({"barge3"}, FOR_STRANGERS * FEW)
    assert "barge2" in roster.gone, "the place of a host"
    state.save_roster(roster)
    assert state.roster().gone == roster.gone
    assert told(state.roster(), revoked(BY.serial)).gone == {}
    certified = admit(View(OWN, MESH, roster, NOW), [member(3, Status.LEFT)], left_is_goodbye=True)
    assert told(certified, revoked(BY.serial)).gone.keys() == {"barge3"}


# --- what others are told --------------------------------------------------------------------------------------------


def test_digest_tells_identities_apart() -> None:
    """Two tombstones that differ in nothing but their identity are two."""
    one = forgotten(record(2), 2)
    other = replace(one, identity=certificates.public(bytes(32)))
    assert Tombstones(grave("barge2", one)).digest != Tombstones(grave("barge2", other)).digest


def test_hosts_whose_shares_are_used_up_do_not_ask_each_other() -> None:
    """Each keeps the tombstones that it heard first; they would ask for the others' again and again."""
    some = [Tombstones(graves(range(at, at + SAME * FEW))) for at in (20, 40)]
    more = [Tombstones(graves(range(at, at + SAME * FEW - 1))) for at in (20, 40)]
    assert some[0].digest == some[1].digest != Tombstones().digest
    assert more[0].digest != more[1].digest
    elsewhere = Tombstones(graves(range(70, 70 + SAME * FEW), BY_ANOTHER))
    assert some[0].digest != elsewhere.digest
    assert some[0].merged(elsewhere).digest == some[1].merged(elsewhere).digest
    word = Tombstones(grave("barge60", tombstones.of_leaving(record(60, leaving=True))))
    assert some[0].merged(word).digest != some[0].digest, "what the authority is behind is always told"


def test_as_many_tombstones_as_are_kept_are_far_below_what_a_file_may_hold(state: State) -> None:
    """However long the holder of an invitation makes each of them."""
    name, block = "b" * 63, extensions.pack({5: bytes(250)})
    long = delegation("b" * MAX_PREFIX, hosts=FEW, subnets=(record(2).subnet,))
    unsigned = replace(record(2, leaving=True, extensions=block), certificate=delegated(name, long))
    state.save_roster(Roster())
    empty = (state.directory / "hosts.json").stat().st_size
    state.save_roster(Roster(gone=grave(name, tombstones.of_leaving(unsigned))))
    entry = (state.directory / "hosts.json").stat().st_size - empty
    assert shares.MOST * entry < LIMIT * 5 / 8
    assert PLACES * MAX_HOSTS <= shares.MOST


def test_certificates_of_the_authority_have_no_share() -> None:
    given = Certificate(5, 0, certificate("barge2").identity)
    given = certificates.certify(AUTHORITY, "meshd", "barge2", given)
    assert shares.Shares({}, {}).take_host(record(2, by=given))
    assert shares.Shares({}, {}).take_stranger(forgotten(record(2), 2))
    assert Host("barge2", record(2, by=given)).record.certificate.delegation is None
