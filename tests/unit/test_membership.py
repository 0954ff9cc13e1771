"""Who is admitted, who is refused and why, and what it takes to be dropped."""

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.endpoint import Endpoint, LocalAddresses
from meshd.mesh import certificates, conflicts, membership, tombstones
from meshd.mesh.membership import admit, contacts
from meshd.mesh.model import Certificate, Host, Member, Record, Status, Tombstone
from meshd.mesh.roster import BURIED, REVOKED, SUPERSEDED, TAKEN, Roster, View
from meshd.mesh.terms import Mesh
from meshd.mesh.tombstones import Tombstones, grave
from tests.conftest import (
    AUTHORITY,
    MESH,
    NOW,
    certificate,
    delegated,
    delegation,
    forgotten,
    host,
    member,
    public_key,
    record,
    seed,
)

OWN = host(1)


def admitted(members: Sequence[Member], known: Roster | None = None, *, left_is_goodbye: bool = False) -> Roster:
    return admit(View(OWN, MESH, known or Roster(), NOW), members, left_is_goodbye=left_is_goodbye)


def merge_tombstones(known: Roster, mesh: Mesh, graves: Tombstones, own: Host | None = OWN) -> Roster:
    return membership.merge_tombstones(known, mesh, graves, own, NOW)


def test_admit_valid_members() -> None:
    """Valid members are admitted, and this host is not its own peer."""
    roster = admitted([member(1), member(2), member(3)])
    assert [h.name for h in roster.sorted_hosts()] == ["barge2", "barge3"]
    assert roster.refused == {}


@pytest.mark.parametrize("status", [Status.FAILED, Status.LEFT, Status.LEAVING, Status.NONE])
def test_known_host_stays_in_any_serf_status(status: Status) -> None:
    """A known host stays whatever status Serf reports for it."""
    known = admitted([member(2)])
    assert admitted([member(2, status)], known).hosts == known.hosts


def test_known_host_stays_when_unlisted() -> None:
    """A known host stays when Serf does not list it."""
    known = admitted([member(2)])
    assert admitted([], known).hosts == known.hosts


def test_leaving_record_removes_host() -> None:
    """A leaving record removes the host and is kept as its tombstone."""
    known = admitted([member(2)])
    roster = admitted([member(2, of=record(2, seq=2, leaving=True))], known)
    assert roster.hosts == {}
    assert roster.gone == grave("barge2", tombstones.of_leaving(record(2, seq=2, leaving=True)))


def test_older_record_does_not_revive_departed_host() -> None:
    """A record that is not newer than the tombstone does not bring a departed host back."""
    gone = Roster(gone=grave("barge2", Tombstone(2, public_key("barge2"))))
    roster = admitted([member(2, of=record(2, seq=2))], gone)
    assert roster.hosts == {}
    assert "left, or was forgotten" in roster.refused["barge2"]
    assert admitted([member(2, Status.LEFT, of=record(2, seq=2, leaving=True))], gone).refused == {}


def test_newer_record_with_new_key_revives_departed_host() -> None:
    """A newer record with a new key brings a departed host back and ends its tombstone."""
    gone = Roster(gone=grave("barge2", Tombstone(2, public_key("barge2"))))
    assert admitted([member(2, of=record(2, seq=3))], gone).hosts == {}, "the same key: it has not joined again"
    roster = admitted([member(2, of=record(2, seq=3, key="new"))], gone)
    assert roster.hosts["barge2"].seq == 3
    assert roster.gone == {}


def test_serf_left_counts_as_leaving_without_daemon() -> None:
    """Serf's status `left` ends a membership only on hosts without a daemon."""
    known = admitted([member(2)])
    roster = admitted([member(2, Status.LEFT)], known, left_is_goodbye=True)
    assert roster.hosts == {}
    assert "barge2" in roster.gone


def test_newer_record_replaces_key() -> None:
    """A newer record replaces the WireGuard key of a host."""
    known = admitted([member(2)])
    roster = admitted([member(2, of=record(2, seq=2, key="new"))], known)
    assert roster.hosts["barge2"].public_key == public_key("new")


@pytest.mark.parametrize(
    ("seq", "reason"), [(4, "older than 5"), (5, "two different records")], ids=["older", "equal but different"]
)
def test_older_or_conflicting_record_is_refused(seq: int, reason: str) -> None:
    """An older or conflicting record is refused, and the last good one stays in force."""
    known = Roster(hosts={"barge2": record(2, seq=5)})
    roster = admitted([member(2, of=record(2, seq=seq, subnet=record(7).subnet))], known)
    assert roster.hosts == known.hosts
    assert reason in {**roster.refused, **roster.stale}["barge2"]


def test_of_two_machines_with_one_identity_and_number_all_take_the_same() -> None:
    """Whichever of the two a host has heard of first, by tags or by an announcement."""
    low, high = sorted((record(2, seq=5, key=key) for key in ("one", "other")), key=lambda r: r.public_key)
    for first, then in ((low, high), (high, low)):
        known = Roster(hosts={"barge2": first})
        assert admitted([member(2, of=then)], known).hosts == {"barge2": high}
        heard = admit(View(OWN, MESH, known, NOW), [member(2, of=first)], heard={"barge2": then})
        assert heard.hosts == {"barge2": high}


def test_bad_tags_keep_last_good_record() -> None:
    """Bad tags leave the last good record in force and do not affect other hosts."""
    known = admitted([member(2)])
    spoiled = replace(member(2), tags={**member(2).tags, "subnet": "0.0.0.0/0"})
    roster = admitted([spoiled, member(3)], known)
    assert roster.hosts["barge2"] == record(2)
    assert roster.hosts["barge3"] == record(3)
    assert "outside of the overlay" in roster.refused["barge2"]


def test_own_subnet_is_never_given_away() -> None:
    """A member that claims the subnet of this host is refused and listed as a rival."""
    thief = member(2, of=record(2, subnet=OWN.record.subnet))
    roster = admitted([thief])
    assert roster.hosts == {}
    assert roster.refused["barge2"] == "subnet 172.20.101.0/24 is held by barge1"
    assert list(conflicts.subnet_rivals(View(OWN, MESH, Roster(), NOW), [member(1), thief, member(3)])) == ["barge2"]


def test_known_host_keeps_its_subnet() -> None:
    """A newcomer that claims the subnet of a known host is refused."""
    known = admitted([member(3)])
    claimant = member(2, of=record(2, subnet=record(3).subnet))
    roster = admitted([claimant, member(3)], known)
    assert roster.refused == {"barge2": "subnet 172.20.103.0/24 is held by barge3"}


def test_move_onto_held_subnet_is_refused() -> None:
    """A known host that moves onto a held subnet is refused and keeps its old one."""
    known = admitted([member(2), member(3)])
    mover = member(2, of=record(2, seq=2, subnet=record(3).subnet))
    roster = admitted([mover, member(3)], known)
    assert roster.hosts == known.hosts
    assert "barge2" in roster.refused


def test_moved_host_frees_its_subnet() -> None:
    """A host that moves frees its old subnet for a newcomer at once."""
    known = admitted([member(2)])
    moved = member(2, of=record(2, seq=2, subnet=record(9).subnet))
    heir = member(3, of=record(3, subnet=record(2).subnet))
    roster = admitted([moved, heir], known)
    assert roster.refused == {}
    assert roster.hosts["barge3"].subnet == record(2).subnet


def test_key_of_another_host_is_refused() -> None:
    """A record with the WireGuard key of another host is refused."""
    roster = admitted([member(2, of=record(2, key="barge1"))])
    assert roster.refused["barge2"] == f"WireGuard key {public_key('barge1')} is held by barge1"


@given(st.permutations([2, 3, 4]))
def test_simultaneous_claims_have_one_winner(order: list[int]) -> None:
    """The winner of simultaneous claims does not depend on the order of the members."""
    same = record(50).subnet
    members = [member(n, of=record(n, subnet=same)) for n in order]
    winners = set(admitted(members).hosts)
    assert len(winners) == 1
    assert winners == set(admitted(sorted(members, key=lambda m: m.name)).hosts)


def test_claimed_ignores_departed_and_invalid_members() -> None:
    """Claims of departed and of invalid members do not count."""
    noise = replace(member(3), tags={"wg": "x"})
    goodbye = member(4, of=record(4, leaving=True))
    assert conflicts.claimed(View(host(1), MESH, Roster(), NOW), [member(1), member(2), noise, goodbye]) == {
        record(2).subnet
    }


# --- who has signed it ---------------------------------------------------------------------------------------------


def test_copied_tags_are_refused() -> None:
    """Tags that were copied from another host are refused."""
    thief = replace(member(2), name="barge3")
    assert "not from this mesh's authority, or for another name" in admitted([thief]).refused["barge3"]


def test_changed_record_is_refused() -> None:
    """A record that someone has changed is refused for its signature."""
    forged = replace(record(2), endpoint=record(3).endpoint)
    roster = admitted([member(2, of=forged)])
    assert roster.hosts == {}
    assert roster.refused["barge2"] == "its record is not signed by its certificate's identity"


def test_certificate_of_another_authority_is_refused() -> None:
    """A certificate of another authority is refused."""
    other = certificates.certify(seed("other"), "meshd", "barge2", certificate("barge2"))
    assert "not from this mesh's authority" in admitted([member(2, of=record(2, by=other))]).refused["barge2"]


def test_certificate_of_another_mesh_is_refused() -> None:
    """A certificate for another mesh is refused, also if the authority is the same."""
    other = certificates.certify(AUTHORITY, "other", "barge2", certificate("barge2"))
    assert "not from this mesh's authority" in admitted([member(2, of=record(2, by=other))]).refused["barge2"]


def test_expired_certificate_removes_host() -> None:
    """A known host is removed when its certificate expires."""
    soon = certificate("barge2", expires=int(NOW) + 10)
    known = admitted([member(2, of=record(2, by=soon))])
    assert sorted(known.hosts) == ["barge2"]
    roster = admit(View(OWN, MESH, known, NOW + 10), [])
    assert roster.hosts == {}
    assert roster.refused["barge2"] == "its certificate expired on 1970-01-12 13:46 UTC"


def test_subnet_outside_certificate_is_refused() -> None:
    """A subnet that the certificate does not allow is refused."""
    bound = certificate("barge2", subnets=(record(2).subnet,))
    assert admitted([member(2, of=record(2, by=bound))]).refused == {}
    other = record(2, by=bound, subnet=record(3).subnet)
    assert "does not allow the subnet 172.20.103.0/24" in admitted([member(2, of=other)]).refused["barge2"]


def test_delegation_admits_within_its_terms() -> None:
    """A delegation admits hosts within its prefix, subnets and lifetime only."""
    web = delegation("barge", subnets=(record(2).subnet,))
    assert admitted([member(2, of=record(2, by=delegated("barge2", web)))]).refused == {}
    elsewhere = record(3, by=delegated("barge3", web))
    assert "does not allow the subnet" in admitted([member(3, of=elsewhere)]).refused["barge3"]
    late = admit(View(OWN, MESH, Roster(), NOW + 60), [member(2, of=record(2, by=delegated("barge2", web)))])
    assert "expired" in late.refused["barge2"]
    named = delegated("barge2", delegation("web-"))
    assert "begin with 'web-'" in admitted([member(2, of=record(2, by=named))]).refused["barge2"]


def test_widened_delegation_is_refused() -> None:
    """A delegation that its holder has widened is refused."""
    wide = replace(delegation("web-"), prefix="")
    assert (
        "delegation is not from" in admitted([member(2, of=record(2, by=delegated("barge2", wide)))]).refused["barge2"]
    )


def test_delegated_certificate_terms_are_fixed() -> None:
    """The holder of a delegation cannot choose the serial or the end of a certificate."""
    mine = delegated("barge2", delegation())
    with pytest.raises(certificates.CredentialError):
        MESH.trust.check_certificate("barge2", replace(mine, expires=0))
    with pytest.raises(certificates.CredentialError):
        MESH.trust.check_certificate("barge2", replace(mine, serial=1))


@pytest.mark.parametrize("serial", ["certificate", "delegation"])
def test_revocation_removes_host_permanently(serial: str) -> None:
    """A revocation removes the host, and its newer records stay refused."""
    mine = delegated("barge2", delegation())
    known = admitted([member(2, of=record(2, by=mine)), member(3)])
    number = mine.serial if serial == "certificate" else 7
    word = certificates.revoke(AUTHORITY, "meshd", number, "barge2")
    buried = merge_tombstones(known, MESH, Tombstones(revoked={number: word}))
    roster = admitted([member(2, of=record(2, seq=9, key="new", by=mine))], buried)
    assert sorted(roster.hosts) == ["barge3"]
    assert roster.refused["barge2"] == REVOKED
    assert roster.revoked == {number: word}


def test_revocation_and_forget_require_authority() -> None:
    """Statements that the authority has not signed revoke and forget no host."""
    known = admitted([member(2)])
    word = certificates.revoke(seed("identity of barge3"), "meshd", certificate("barge2").serial, "barge2")
    assert merge_tombstones(known, MESH, Tombstones(revoked={word.serial: word})) == known
    forged = forgotten(record(2), 2, by=seed("identity of barge3"))
    assert merge_tombstones(known, MESH, Tombstones(grave("barge2", forged))) == known


# --- records that came besides the tags ------------------------------------------------------------------------------


def test_heard_newer_record_precedes_tags() -> None:
    """A newer record that was heard counts before the tags."""
    moved = record(2, seq=2, endpoint=Endpoint(record(9).endpoint.address, 51820))
    roster = admit(View(OWN, MESH, Roster(), NOW), [member(2)], heard={"barge2": moved})
    assert roster.hosts == {"barge2": moved}
    again = admitted([member(2)], roster)
    assert again.hosts == {"barge2": moved}
    assert again.refused == {}
    assert "older than 2" in again.stale["barge2"]


def test_heard_record_replaces_spoiled_tags() -> None:
    """A record that was heard replaces tags that are spoiled."""
    spoiled = replace(member(2), tags={"wg": "noise"})
    assert admit(View(OWN, MESH, Roster(), NOW), [spoiled], heard={"barge2": record(2)}).hosts == {"barge2": record(2)}


@pytest.mark.parametrize("what", ["forged", "older", "own", "leaving", "expired"])
def test_bad_heard_record_is_ignored(what: str) -> None:
    """A bad record that was heard is ignored, as it would be in tags."""
    known = admitted([member(2, of=record(2, seq=5))])
    bad = {
        "forged": replace(record(2, seq=6), endpoint=record(3).endpoint),
        "older": record(2, seq=4, key="old"),
        "own": record(1, seq=99),
        "leaving": record(2, seq=6, leaving=True),
        "expired": record(2, seq=6, by=certificate("barge2", expires=int(NOW) - 1)),
    }
    name = "barge1" if what == "own" else "barge2"
    assert admit(View(OWN, MESH, known, NOW), [], heard={name: bad[what]}).hosts == known.hosts


# --- what a record must not touch ------------------------------------------------------------------------------------


def test_endpoint_of_alive_host_is_refused_to_others() -> None:
    """The endpoint of a host that is alive is refused to others; that of a failed one is not."""
    known = admitted([member(2)])
    thief = member(3, of=record(3, endpoint=record(2).endpoint))
    assert admitted([member(2), thief], known).refused == {"barge3": "endpoint 10.10.10.102:51820 is held by barge2"}
    assert admitted([member(2, Status.FAILED), thief], known).refused == {}
    own = member(3, of=record(3, endpoint=OWN.record.endpoint))
    assert "is held by barge1" in admitted([own]).refused["barge3"]


NOBODYS = {
    "::ffff:127.0.0.1": "an IPv4 address in IPv6 spelling",
    "::ffff:172.20.101.0": "an IPv4 address in IPv6 spelling",
    "::ffff:10.10.10.101": "an IPv4 address in IPv6 spelling",
    "172.20.101.0": "inside the overlay 172.20.0.0/16",
    "127.0.0.1": "no address of a host",
    "fe80::1": "local to one link",
}


def at(address: str, port: int = 51820) -> Endpoint:
    return Endpoint(ip_address(address), port)


@pytest.mark.parametrize("way", ["tags", "heard"])
@pytest.mark.parametrize("address", NOBODYS)
def test_endpoint_of_no_host_is_refused(address: str, way: str) -> None:
    """An endpoint where no host can be is refused, and the last good record of a known host stays in force."""
    wrong = record(2, seq=2, endpoint=at(address))
    listed = [member(2, of=wrong)] if way == "tags" else []
    for known in (Roster(), admitted([member(2)])):
        roster = admit(View(OWN, MESH, known, NOW), listed, heard={"barge2": wrong} if way == "heard" else {})
        assert roster.hosts == known.hosts
        if way == "tags":
            assert roster.refused == {"barge2": f"endpoint {at(address)} is {NOBODYS[address]}"}


@pytest.mark.parametrize("address", NOBODYS)
def test_leaving_record_counts_whatever_its_endpoint(address: str) -> None:
    """A host says goodbye by a record whose endpoint counts no more, as one that an older version of meshd took."""
    roster = admitted([member(2, of=record(2, seq=2, endpoint=at(address), leaving=True))], admitted([member(2)]))
    assert (roster.hosts, roster.refused, sorted(roster.gone)) == ({}, {}, ["barge2"])


def test_own_and_broadcast_addresses_are_refused_to_others() -> None:
    """No other host has this host's address with its WireGuard port, or a broadcast address; a known one stays."""
    local = LocalAddresses(frozenset({ip_address("192.0.2.7")}), frozenset({ip_address("10.10.10.255")}))
    for endpoint, reason in (
        (at("192.0.2.7"), "its endpoint 192.0.2.7:51820 is this host's own"),
        (at("64:ff9b::192.0.2.7"), "its endpoint [64:ff9b::c000:207]:51820 is this host's own"),
        (at("64:ff9b::10.10.10.101"), "endpoint 10.10.10.101:51820 is held by barge1"),
        (at("10.10.10.255", 7), "its endpoint 10.10.10.255:7 is a broadcast address"),
    ):
        newcomer = [member(2, of=record(2, endpoint=endpoint))]
        assert admit(View(OWN, MESH, Roster(), NOW), newcomer, local=lambda: local).refused == {"barge2": reason}
        known = Roster({"barge2": record(2, endpoint=endpoint)})
        stays = admit(View(OWN, MESH, known, NOW), newcomer, local=lambda: local)
        assert stays.hosts == known.hosts


def test_own_address_with_another_port_is_admitted() -> None:
    """Another port of an own address may be forwarded to another host, and hosts behind one NAT share an address."""
    local = LocalAddresses(frozenset({OWN.record.endpoint.address}))
    one, two = (member(n, of=record(n, endpoint=Endpoint(OWN.record.endpoint.address, 51820 + n))) for n in (2, 3))
    assert sorted(admit(View(OWN, MESH, Roster(), NOW), [one, two], local=lambda: local).hosts) == ["barge2", "barge3"]


def test_dropped_host_is_no_host_until_it_has_another_endpoint() -> None:
    """A host whose record an older version of meshd took is none, and a better record of it is taken."""
    known = Roster(dropped={"barge2": record(2, endpoint=at("::ffff:10.10.10.102"))})
    roster = admitted([], known)
    assert (roster.hosts, roster.dropped) == ({}, {})
    assert "barge2" in admitted([member(2, of=record(2, seq=2))], known).hosts


def test_contacts_of_no_host_are_dropped() -> None:
    """Gossip addresses where no host can be, as an older version of meshd kept them, are left out."""
    good = {"barge2": at("10.10.10.102", 7946)}
    bad = {name: at(name, 7946) for name in NOBODYS}
    assert membership.usable_contacts(good | bad, MESH.overlay) == good


def test_two_hosts_can_swap_endpoints() -> None:
    """Two hosts can swap their endpoints."""
    known = admitted([member(2), member(3)])
    two = member(2, of=record(2, seq=2, endpoint=record(3).endpoint))
    three = member(3, of=record(3, seq=2, endpoint=record(2).endpoint))
    assert admitted([two, three], known).refused == {}


def test_subnet_overlapping_local_network_is_refused() -> None:
    """A newcomer's subnet that overlaps a network of this host is refused; that of a known host stays."""
    network = record(2).subnet.supernet()
    roster = admit(View(OWN, MESH, Roster(), NOW), [member(2)], networks=lambda: [network])
    assert roster.refused == {"barge2": f"subnet 172.20.102.0/24 overlaps this host's own network {network}"}
    known = admitted([member(2)])
    assert admit(View(OWN, MESH, known, NOW), [member(2)], networks=lambda: [network]).hosts == known.hosts


# --- goodbyes that others tell of, and subnets that two hosts claim -------------------------------------------------


def goodbye(number: int, seq: int) -> Tombstone:
    return tombstones.of_leaving(record(number, seq=seq, leaving=True))


def test_tombstone_from_others_removes_host() -> None:
    """A tombstone that other hosts pass on removes its host, and an older one changes nothing."""
    known = Roster({"barge2": record(2, seq=5), "barge3": record(3)})
    roster = admitted([], merge_tombstones(known, MESH, Tombstones(grave("barge2", goodbye(2, 5)))))
    assert sorted(roster.hosts) == ["barge3"]
    assert roster.gone == grave("barge2", goodbye(2, 5))
    assert merge_tombstones(roster, MESH, Tombstones(grave("barge2", goodbye(2, 4)))) == roster, "older news is no news"


@pytest.mark.parametrize("proof", ["none", "another's", "not leaving", "noise", "another number"])
def test_tombstone_without_proof_is_ignored(proof: str) -> None:
    """A tombstone without a valid proof changes nothing."""
    known = Roster({"barge2": record(2, seq=5)})
    real = goodbye(2, 5)
    bad = {
        "none": replace(real, record=None),
        "another's": replace(real, record=goodbye(3, 5).record),
        "not leaving": tombstones.of_leaving(record(2, seq=5)),
        "noise": replace(real, record=None, forgotten=bytes(300)),
        "another number": replace(real, seq=6),
    }
    assert merge_tombstones(known, MESH, Tombstones(grave("barge2", bad[proof]))) == known


def test_authority_can_forget_host() -> None:
    """The authority can end the membership of a host."""
    known = admitted([member(2)])
    dead = forgotten(record(2), 2)
    former = certificates.forget(AUTHORITY, "meshd", "barge2", replace(dead, identity=b""))
    for word in (dead, former):
        roster = merge_tombstones(known, MESH, Tombstones(grave("barge2", word)))
        assert admitted([], roster).hosts == {}


def test_forget_ends_the_identity_that_it_names() -> None:
    """The authority's word of version 3 does not end another identity of the name, that of version 2 does."""
    known = Roster({"barge2": record(2, seq=3)})
    other = replace(forgotten(record(2, seq=5, key="x"), 2), identity=seed("another"))
    word = certificates.forget(AUTHORITY, "meshd", "barge2", other)
    former = certificates.forget(AUTHORITY, "meshd", "barge2", replace(other, identity=b""))
    assert merge_tombstones(known, MESH, Tombstones(grave("barge2", word))).has("barge2", NOW)
    assert not merge_tombstones(known, MESH, Tombstones(grave("barge2", former))).has("barge2", NOW)


def test_old_tombstone_spares_host_that_joined_again() -> None:
    """The tombstone of an earlier membership does not end the host that has joined again."""
    known = Roster({"barge2": record(2, seq=9, key="new")})
    assert merge_tombstones(known, MESH, Tombstones(grave("barge2", goodbye(2, 5)))) == known


# --- a name is that of one identity, whatever a reusable invitation signs ---------------------------------------------

THIEF = seed("identity of a thief")


def thiefs(name: str, expires: int = int(NOW) + 60) -> Certificate:
    """What anybody makes who ever had a reusable invitation for all names."""
    return certificates.certify_by(
        seed("delegate"), "meshd", name, certificates.public(THIEF), delegation(expires=expires)
    )


def by_thief(
    number: int, *, seq: int = 2**48 - 2, leaving: bool = False, key: str = "thief", expires: int = int(NOW) + 60
) -> Record:
    name = f"barge{number}"
    made = replace(record(number, seq=seq, leaving=leaving, key=key), certificate=thiefs(name, expires), signature=b"")
    return certificates.sign(THIEF, "meshd", name, made)


@pytest.mark.parametrize("expires", [int(NOW) + 60, int(NOW) - 60], ids=["holds", "has ended"])
@pytest.mark.parametrize("by", ["authority", "invitation"])
def test_delegated_tombstone_ends_no_other_host(by: str, expires: int) -> None:
    """The holder of a delegation cannot end a host that has another identity."""
    mine = record(2, by=delegated("barge2", delegation(expires=int(NOW) + 99)) if by == "invitation" else None)
    known = admitted([member(2, of=mine)])
    for key in ("thief", "barge2"):
        word = tombstones.of_leaving(by_thief(2, leaving=True, key=key, expires=expires))
        told = merge_tombstones(known, MESH, Tombstones(grave("barge2", word)))
        assert admitted([], told).hosts == known.hosts
    said = admitted([member(2, of=by_thief(2, leaving=True, expires=expires))], known)
    assert (said.hosts, said.gone) == (known.hosts, {})


def test_delegated_tombstone_does_not_end_own_host() -> None:
    """The holder of a delegation cannot end this host itself."""
    for key in ("thief", "barge1"):
        word = tombstones.of_leaving(by_thief(1, leaving=True, key=key))
        told = merge_tombstones(Roster(), MESH, Tombstones(grave("barge1", word)))
        assert not told.ended("barge1", OWN.record, NOW)


def test_loser_of_a_name_stays_ended_when_the_winner_leaves() -> None:
    """Where Serf still lists it as it was, it would be a host again, which nobody runs."""
    known = admitted([member(2)])
    loser = by_thief(2, seq=7)
    told = merge_tombstones(known, MESH, Tombstones(grave("barge2", tombstones.of_leaving(by_thief(2, leaving=True)))))
    left = admitted([member(2, of=record(2, seq=9, leaving=True))], admitted([member(2)], told))
    assert left.hosts == {}
    assert admitted([member(2, Status.FAILED, of=loser)], left).hosts == {}
    assert admitted([member(2, Status.FAILED, of=loser)], known).hosts == known.hosts


def test_delegated_certificate_does_not_take_name() -> None:
    """The holder of a delegation cannot take the name of a known host."""
    known = admitted([member(2)])
    roster = admitted([member(2, of=by_thief(2))], known)
    assert (roster.hosts, roster.refused) == (known.hosts, {"barge2": TAKEN})
    assert admit(View(OWN, MESH, known, NOW), [member(2)], heard={"barge2": by_thief(2)}).hosts == known.hosts
    assert not conflicts.claimed(View(host(1), MESH, known, NOW), [member(2, of=by_thief(2))])


def test_authority_certificate_takes_name() -> None:
    """A certificate of the authority gives a name to another identity."""
    known = Roster({"barge2": by_thief(2, seq=1)})
    assert admitted([member(2, of=record(2, seq=2))], known).hosts == {"barge2": record(2, seq=2)}
    confirmed = certificates.certify(
        AUTHORITY, "meshd", "barge2", Certificate(5, 0, certificates.public(THIEF), (), None)
    )
    made = certificates.sign(THIEF, "meshd", "barge2", replace(by_thief(2, seq=2), certificate=confirmed))
    assert admitted([member(2, of=made)], known).hosts == {"barge2": made}


def test_name_is_free_after_leave_or_expiry() -> None:
    """The name of a host that has left, or whose certificate has expired, is free, under whatever number."""
    buried = merge_tombstones(admitted([member(2)]), MESH, Tombstones(grave("barge2", goodbye(2, 5))))
    assert admitted([member(2, of=by_thief(2, seq=3))], buried).hosts["barge2"].seq == 3, "in the same pass"
    soon = Roster({"barge2": record(2, by=certificate("barge2", expires=int(NOW) - 1))})
    assert admitted([member(2, of=by_thief(2, seq=6))], soon).hosts["barge2"].seq == 6


def test_own_tombstone_counts_after_expiry() -> None:
    """A host's own tombstone counts although its certificate has expired."""
    brief = certificate("barge2", expires=int(NOW) - 1)
    known = Roster({"barge2": record(2, by=brief)})
    word = tombstones.of_leaving(record(2, seq=2, leaving=True, by=brief))
    assert merge_tombstones(known, MESH, Tombstones(grave("barge2", word))).gone == grave("barge2", word)


def by_another(number: int, serial: int, *, seq: int = 2**47, leaving: bool = False, key: str = "thief") -> Record:
    """What another host publishes that the authority has once given the name to, with the certificate `serial`."""
    name = f"barge{number}"
    given = certificates.certify(AUTHORITY, "meshd", name, Certificate(serial, 0, certificates.public(THIEF)))
    made = replace(record(number, seq=seq, leaving=leaving, key=key), certificate=given, signature=b"")
    return certificates.sign(THIEF, "meshd", name, made)


BEFORE, AFTER = certificate("barge2").serial - 1, certificate("barge2").serial + 1


@pytest.mark.parametrize("leaving", [False, True], ids=["record", "goodbye"])
@pytest.mark.parametrize("way", ["tags", "heard", "told"])
def test_earlier_owner_of_name_counts_no_more(way: str, leaving: bool) -> None:
    """Of two certificates of the authority for one name the later alone counts, whatever the earlier one's number."""
    known = admitted([member(2)])
    earlier = by_another(2, BEFORE, leaving=leaving)
    if way == "told":
        word = replace(tombstones.of_leaving(earlier), record=earlier)
        found = admitted([], merge_tombstones(known, MESH, Tombstones(grave("barge2", word))))
    elif way == "heard":
        found = admit(View(OWN, MESH, known, NOW), [member(2)], heard={"barge2": earlier})
    else:
        found = admitted([member(2, of=earlier)], known)
        assert found.refused == {"barge2": SUPERSEDED}
        assert found.owners == {"barge2": certificate("barge2")}, "others have to hear of it"
    assert (found.hosts, found.gone) == (known.hosts, {})


def test_later_owner_takes_name_with_any_number() -> None:
    """Who has the authority's later certificate takes the name, with a number of its own."""
    known = admitted([member(2, of=by_another(2, BEFORE))])
    for roster in (admitted([member(2)], known), admit(View(OWN, MESH, known, NOW), [], heard={"barge2": record(2)})):
        assert roster.hosts == {"barge2": record(2)}
        assert roster.owners == {"barge2": certificate("barge2")}
        assert roster.refused == {}


def test_owner_outlives_its_own_membership() -> None:
    """An earlier owner of a name does not come back when the later one has left, is dead, or is not known."""
    known = admitted([member(2)], admitted([member(2, of=by_another(2, BEFORE))]))
    left = admitted([member(2, of=record(2, seq=2, leaving=True))], known)
    newcomer = merge_tombstones(Roster(), MESH, left.all_tombstones)
    ended = Roster(gone=grave("barge2", goodbye(2, 2)))
    for roster in (known, left, newcomer, ended):
        again = admitted([member(2, of=by_another(2, BEFORE, seq=2**47 + 1, key="new"))], roster)
        assert again.refused == {"barge2": SUPERSEDED}
        assert "barge2" not in again.hosts or again.hosts["barge2"] == record(2)


def test_host_that_was_away_hears_of_later_owner() -> None:
    """A host that still has the earlier owner drops it when it is told of the later one."""
    away = admitted([member(2, of=by_another(2, BEFORE))])
    told = merge_tombstones(away, MESH, Tombstones(owners={"barge2": certificate("barge2")}))
    roster = admitted([member(2, of=by_another(2, BEFORE))], told)
    assert (roster.hosts, roster.refused) == ({}, {"barge2": SUPERSEDED})
    assert admitted([member(2)], roster).hosts == {"barge2": record(2)}


@pytest.mark.parametrize("why", ["another's", "delegated", "earlier"])
def test_owner_is_the_authoritys_last_word(why: str) -> None:
    """Only the authority's own certificate, and only a later one, makes an owner."""
    later = by_another(2, AFTER).certificate
    wrong = {
        "another's": certificates.certify(seed("other"), "meshd", "barge2", later),
        "delegated": thiefs("barge2"),
        "earlier": by_another(2, BEFORE).certificate,
    }
    known = replace(admitted([member(2)]), owners={"barge2": certificate("barge2")})
    assert merge_tombstones(known, MESH, Tombstones(owners={"barge2": wrong[why]})) == known
    assert merge_tombstones(known, MESH, Tombstones(owners={"barge2": later})).owners == {"barge2": later}


def test_identity_that_left_takes_no_name_of_another_host() -> None:
    """A host that has said goodbye comes back under its name only while nobody else has it."""
    left = Roster(gone=grave("barge2", goodbye(2, 5)))
    again = record(2, seq=6, key="new")
    assert admitted([member(2, of=again)], left).hosts == {"barge2": again}
    heir = replace(left, hosts={"barge2": by_thief(2, seq=1)})
    assert admitted([member(2, of=again)], heir).refused == {"barge2": TAKEN}


def test_name_ended_by_delegation_is_free() -> None:
    """What the holder of a delegation says of a name keeps nobody out of it, and moves nobody's number."""
    word = tombstones.of_leaving(by_thief(2, leaving=True, key="barge2"))
    told = merge_tombstones(Roster(), MESH, Tombstones(grave("barge2", word)))
    assert told.gone == grave("barge2", word)
    for mine in (record(2), record(2, by=delegated("barge2", delegation()))):
        assert admitted([member(2, of=mine)], told).hosts == {"barge2": mine}


def test_delegated_tombstone_does_not_replace_own_one() -> None:
    """A tombstone by a delegation does not replace that of the host that the authority admitted."""
    known = Roster(gone=grave("barge2", goodbye(2, 5)))
    word = tombstones.of_leaving(by_thief(2, leaving=True))
    for roster in (
        merge_tombstones(known, MESH, Tombstones(grave("barge2", word))),
        admitted([member(2, of=by_thief(2, leaving=True))], known),
    ):
        assert set(roster.gone["barge2"].values()) == {goodbye(2, 5), word}
        assert admitted([member(2, of=record(2, seq=4))], roster).hosts == {}


def test_tombstone_of_own_name_is_kept_until_outdone() -> None:
    """A tombstone of this host's own identity is kept until its number exceeds it; that of another never counts."""
    word = tombstones.of_leaving(record(1, seq=2**40, key="earlier", leaving=True))
    known = merge_tombstones(Roster(), MESH, Tombstones(grave("barge1", word)))
    assert admit(View(OWN, MESH, known, NOW), []).gone == grave("barge1", word)
    beyond = Host("barge1", record(1, seq=2**40 + 1))
    assert admit(View(beyond, MESH, known, NOW), []).gone == {}
    other = tombstones.of_leaving(by_thief(1, leaving=True))
    known = merge_tombstones(Roster(), MESH, Tombstones(grave("barge1", other)))
    assert not known.ended("barge1", record(1), NOW)


LATE = int(NOW) - 1


def by_late(*, leaving: bool = False) -> Record:
    """What a later owner of barge2's name publishes whose certificate has expired."""
    given = Certificate(AFTER, LATE, certificates.public(THIEF))
    given = certificates.certify(AUTHORITY, "meshd", "barge2", given)
    made = replace(by_another(2, AFTER, leaving=leaving), certificate=given, signature=b"")
    return certificates.sign(THIEF, "meshd", "barge2", made)


def test_expired_certificate_is_no_news_over_a_living_owner() -> None:
    """A later certificate of the authority that has expired takes no name; where it is known, it stays."""
    word = tombstones.of_leaving(by_late(leaving=True))
    for told in (Tombstones(owners={"barge2": by_late().certificate}), Tombstones(grave("barge2", word))):
        known = admitted([member(2)])
        assert merge_tombstones(known, MESH, told) == known
        expired = Roster({"barge2": record(2, by=certificate("barge2", expires=LATE))})
        assert merge_tombstones(expired, MESH, told) != expired, "nobody living has the name"
    before = replace(admitted([member(2)]), owners={"barge2": by_late().certificate})
    roster = admitted([member(2)], before)
    assert roster.refused == {"barge2": SUPERSEDED}
    assert roster.owners == before.owners
    own = replace(by_late().certificate, serial=certificate("barge1").serial + 1)
    own = certificates.certify(AUTHORITY, "meshd", "barge1", own)
    assert merge_tombstones(Roster(), MESH, Tombstones(owners={"barge1": own})) == Roster()


def test_contacts_drop_revoked_hosts() -> None:
    """The address of a revoked host is forgotten, and that of an expired one is kept."""
    brief = certificate("barge3", expires=int(NOW) - 1)
    known = Roster({"barge2": record(2), "barge3": record(3, by=brief)})
    word = certificates.revoke(AUTHORITY, "meshd", certificate("barge2").serial, "barge2")
    before = {f"barge{n}": Endpoint(record(n).endpoint.address, 7946) for n in (2, 3)}
    roster = admitted([], merge_tombstones(known, MESH, Tombstones(revoked={word.serial: word})))
    assert sorted(contacts(before, [], roster, 7946)) == ["barge3"]
    usurper = replace(roster, hosts={"barge2": record(2)})
    assert sorted(contacts(before, [], usurper, 7946)) == ["barge2", "barge3"], "whose name is used is still a contact"


def test_host_that_serf_does_not_list_is_looked_for_where_it_signed() -> None:
    """A host that is known by its record alone is a contact: its gossip address follows from its endpoint."""
    roster = admitted([member(2), member(3)])
    listed = [replace(member(2), port=7000)]
    found = contacts({}, listed, roster, 7946)
    assert found == {
        "barge2": Endpoint(record(2).endpoint.address, 7000),
        "barge3": Endpoint(record(3).endpoint.address, 7946),
    }
    assert sorted(membership.lost(found, listed)) == ["barge3"]
    kept = {"barge3": Endpoint(record(3).endpoint.address, 7001)}
    assert contacts(kept, listed, roster, 7946) == found | kept, "what Serf once said of it counts"
    moved = {"barge3": replace(kept["barge3"], address=ip_address("10.10.10.133"))}
    assert contacts(moved, listed, roster, 7946) == found | kept, "not where it was before it signed another address"


def test_own_membership_ends_by_tombstone() -> None:
    """This host's membership has ended if a tombstone for its key is known."""
    own = OWN.record
    assert Roster().ended("barge1", own, NOW) == ""
    assert Roster(gone=grave("barge1", Tombstone(1, public_key("barge1")))).ended("barge1", own, NOW) == BURIED
    assert Roster(gone=grave("barge1", Tombstone(0, public_key("earlier")))).ended("barge1", own, NOW) == ""


def rival_record(serial: int) -> Record:
    """What a barge2 publishes that claims the subnet of barge1."""
    return record(2, subnet=OWN.record.subnet, by=certificate("barge2", serial=serial))


def superseded(own: Host, *members: Member, known: Roster | None = None) -> str | None:
    dispute = conflicts.over_own_subnet(View(own, MESH, known or Roster(), NOW), members)
    return conflicts.superseded_by(dispute, None, known=known.hosts if known is not None else (), is_newcomer=False)


@pytest.mark.parametrize("seq", [1, 2**40], ids=["its clock is behind", "its clock is ahead"])
def test_two_claimants_agree_on_loser(seq: int) -> None:
    """Two hosts that claim one subnet agree on the one that moves."""
    mine = OWN.record.certificate.serial
    for serial, loser in ((mine - 1, "barge1"), (mine + 1, "barge2")):
        two = Host("barge2", record(2, seq=seq, subnet=OWN.record.subnet, by=certificate("barge2", serial=serial)))
        ones, twos = member(1), member(2, of=two.record)
        verdicts = superseded(OWN, ones, twos), superseded(two, ones, twos)
        assert verdicts == (("barge2", None) if loser == "barge1" else (None, "barge1"))


@pytest.mark.parametrize("why", ["known under another subnet", "gone"])
def test_known_host_supersedes_nobody(why: str) -> None:
    """A host that was known before cannot take the subnet of this host."""
    winning = rival_record(1)
    known = (
        Roster({"barge2": record(2)})
        if why != "gone"
        else Roster(gone=grave("barge2", Tombstone(1, public_key("old"))))
    )
    claim = record(2, seq=9, subnet=OWN.record.subnet, by=winning.certificate)
    assert superseded(OWN, member(2, of=claim)) == "barge2", "a stranger would"
    assert superseded(OWN, member(2, of=claim), known=known) is None


def test_delegated_host_supersedes_nobody() -> None:
    """A host with a delegated certificate cannot win a subnet by the choice of its key."""
    chosen = delegated("barge2", delegation())
    assert superseded(OWN, member(2, of=record(2, subnet=OWN.record.subnet, by=chosen))) is None


@pytest.mark.parametrize("why", ["dead", "departed", "leaving", "elsewhere", "unsigned"])
def test_absent_or_invalid_rival_supersedes_nobody(why: str) -> None:
    """A rival that is failed, departed, leaving, elsewhere or unsigned takes no subnet."""
    winning = rival_record(1)
    assert superseded(OWN, member(2, of=winning)) == "barge2"
    low = certificate("barge2", serial=1)
    claim = {
        "leaving": record(2, subnet=OWN.record.subnet, by=low, leaving=True),
        "elsewhere": record(2, by=low),
        "unsigned": replace(winning, signature=bytes(64)),
    }
    gone = grave("barge2", Tombstone(1, winning.public_key)) if why == "departed" else {}
    found = member(2, Status.FAILED if why == "dead" else Status.ALIVE, claim.get(why, winning))
    assert superseded(OWN, found, known=Roster(gone=gone)) is None


def test_known_rivals_are_contested_and_neither_moves() -> None:
    """Two known hosts that claim one subnet are both told, and neither of them moves."""
    new = record(9).subnet
    one, two = (Host(f"barge{n}", record(n, seq=2, subnet=new)) for n in (1, 2))
    for own, other in ((one, two), (two, one)):
        known = Roster({other.name: record(int(other.name[-1]))})
        listed = [member(int(other.name[-1]), of=other.record), member(3, of=record(3, subnet=new))]
        assert conflicts.contested(View(own, MESH, known, NOW), listed) == [other.name], (
            "and a stranger is told otherwise"
        )
        assert superseded(own, listed[0], known=known) is None


# --- whatever is heard in whatever order ----------------------------------------------------------------------------

SAID = st.permutations(
    [
        by_another(2, BEFORE),
        by_another(2, BEFORE, seq=2**47 + 1, leaving=True),
        record(2),
        record(2, seq=2, leaving=True),
        by_thief(2),
        by_thief(2, leaving=True),
    ]
)


@given(SAID, SAID, st.integers(1, 6))
def test_hosts_agree_on_owner_whatever_they_heard(first: list[Record], second: list[Record], count: int) -> None:
    """Two hosts that have heard the same in any order, or told each other, agree on who a name's owner was."""

    def heard(records: Sequence[Record]) -> Roster:
        roster = Roster()
        for one in records:
            roster = admitted([member(2, of=one)], roster)
        return roster

    one, two = heard(first), heard(second[:count])
    told = admitted([], merge_tombstones(two, MESH, one.all_tombstones))
    # The later owner has said goodbye, and both have heard that or the other's word of it.
    assert one.owner("barge2") == told.owner("barge2") == certificate("barge2")
    for roster in (one, told):
        for earlier in (by_another(2, BEFORE, seq=2**47 + 9, key="new"), record(2, key="old")):
            assert "barge2" not in roster.hosts or roster.hosts["barge2"].certificate.delegation is not None
            assert roster.ended("barge2", earlier, NOW)
