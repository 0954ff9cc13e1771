"""Who is admitted, who is refused and why, and what it takes to be dropped."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.endpoint import Endpoint
from meshd.mesh import certificates, conflicts, membership, tombstones
from meshd.mesh.membership import MAX_STRANGERS, admit, contacts
from meshd.mesh.model import Certificate, Host, Member, Record, Status, Tombstone
from meshd.mesh.roster import BURIED, REVOKED, TAKEN, Roster, View
from meshd.mesh.terms import Mesh
from meshd.mesh.tombstones import Tombstones
from tests.conftest import (
    AUTHORITY,
    MESH,
    NOW,
    certificate,
    delegated,
    delegation,
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


def test_valid_members_are_admitted_and_the_own_name_is_not_a_peer() -> None:
    roster = admitted([member(1), member(2), member(3)])
    assert [h.name for h in roster.sorted_hosts()] == ["barge2", "barge3"]
    assert roster.refused == {}


@pytest.mark.parametrize("status", [Status.FAILED, Status.LEFT, Status.LEAVING, Status.NONE])
def test_a_known_host_stays_whatever_serf_says_of_it(status: Status) -> None:
    known = admitted([member(2)])
    assert admitted([member(2, status)], known).hosts == known.hosts


def test_a_known_host_stays_when_it_is_not_listed() -> None:
    known = admitted([member(2)])
    assert admitted([], known).hosts == known.hosts


def test_a_goodbye_drops_a_host_and_is_remembered() -> None:
    known = admitted([member(2)])
    roster = admitted([member(2, of=record(2, seq=2, leaving=True))], known)
    assert roster.hosts == {}
    assert roster.gone == {"barge2": tombstones.of_leaving(record(2, seq=2, leaving=True))}


def test_an_older_record_does_not_bring_a_departed_host_back() -> None:
    gone = Roster(gone={"barge2": Tombstone(2, public_key("barge2"))})
    roster = admitted([member(2, of=record(2, seq=2))], gone)
    assert roster.hosts == {}
    assert "left, or was forgotten" in roster.refused["barge2"]
    assert admitted([member(2, Status.LEFT, of=record(2, seq=2, leaving=True))], gone).refused == {}


def test_a_newer_record_with_a_new_key_brings_a_departed_host_back() -> None:
    gone = Roster(gone={"barge2": Tombstone(2, public_key("barge2"))})
    assert admitted([member(2, of=record(2, seq=3))], gone).hosts == {}, "the same key: it has not joined again"
    roster = admitted([member(2, of=record(2, seq=3, key="new"))], gone)
    assert roster.hosts["barge2"].seq == 3
    assert roster.gone == {}


def test_left_is_a_goodbye_only_without_a_daemon() -> None:
    known = admitted([member(2)])
    roster = admitted([member(2, Status.LEFT)], known, left_is_goodbye=True)
    assert roster.hosts == {}
    assert "barge2" in roster.gone


def test_a_new_key_with_a_newer_record_replaces_the_old_one() -> None:
    known = admitted([member(2)])
    roster = admitted([member(2, of=record(2, seq=2, key="new"))], known)
    assert roster.hosts["barge2"].public_key == public_key("new")


@pytest.mark.parametrize(
    ("seq", "reason"), [(4, "older than 5"), (5, "two different records")], ids=["older", "equal but different"]
)
def test_a_worse_record_is_refused_and_the_last_good_one_stays(seq: int, reason: str) -> None:
    known = Roster(hosts={"barge2": record(2, seq=5)})
    roster = admitted([member(2, of=record(2, seq=seq, key="thief"))], known)
    assert roster.hosts == known.hosts
    assert reason in {**roster.refused, **roster.stale}["barge2"]


def test_bad_tags_leave_the_last_good_record_in_force_and_harm_nobody_else() -> None:
    known = admitted([member(2)])
    spoiled = replace(member(2), tags={**member(2).tags, "subnet": "0.0.0.0/0"})
    roster = admitted([spoiled, member(3)], known)
    assert roster.hosts["barge2"] == record(2)
    assert roster.hosts["barge3"] == record(3)
    assert "outside of the overlay" in roster.refused["barge2"]


def test_the_own_subnet_is_never_given_away() -> None:
    thief = member(2, of=record(2, subnet=OWN.record.subnet))
    roster = admitted([thief])
    assert roster.hosts == {}
    assert roster.refused["barge2"] == "subnet 172.20.101.0/24 is held by barge1"
    assert list(conflicts.subnet_rivals(View(OWN, MESH, Roster(), NOW), [member(1), thief, member(3)])) == ["barge2"]


def test_an_incumbent_keeps_its_subnet() -> None:
    known = admitted([member(3)])
    claimant = member(2, of=record(2, subnet=record(3).subnet))
    roster = admitted([claimant, member(3)], known)
    assert roster.refused == {"barge2": "subnet 172.20.103.0/24 is held by barge3"}


def test_an_incumbent_that_moves_onto_a_held_subnet_keeps_its_old_one() -> None:
    known = admitted([member(2), member(3)])
    mover = member(2, of=record(2, seq=2, subnet=record(3).subnet))
    roster = admitted([mover, member(3)], known)
    assert roster.hosts == known.hosts
    assert "barge2" in roster.refused


def test_a_moved_host_frees_its_old_subnet() -> None:
    known = admitted([member(2)])
    moved = member(2, of=record(2, seq=2, subnet=record(9).subnet))
    heir = member(3, of=record(3, subnet=record(2).subnet))
    roster = admitted([moved, heir], known)
    assert roster.refused == {}
    assert roster.hosts["barge3"].subnet == record(2).subnet


def test_a_stolen_key_is_refused() -> None:
    roster = admitted([member(2, of=record(2, key="barge1"))])
    assert roster.refused["barge2"] == "its WireGuard key is barge1's"


@given(st.permutations([2, 3, 4]))
def test_all_hosts_agree_on_the_winner_of_simultaneous_claims(order: list[int]) -> None:
    same = record(50).subnet
    members = [member(n, of=record(n, subnet=same)) for n in order]
    winners = set(admitted(members).hosts)
    assert len(winners) == 1
    assert winners == set(admitted(sorted(members, key=lambda m: m.name)).hosts)


def test_claims_of_departed_and_invalid_members_do_not_count() -> None:
    noise = replace(member(3), tags={"wg": "x"})
    goodbye = member(4, of=record(4, leaving=True))
    assert conflicts.claimed(View(host(1), MESH, Roster(), NOW), [member(1), member(2), noise, goodbye]) == {
        record(2).subnet
    }


# --- who has signed it ---------------------------------------------------------------------------------------------


def test_tags_of_another_host_are_nothing_under_an_own_name() -> None:
    thief = replace(member(2), name="barge3")
    assert "not from this mesh's authority, or for another name" in admitted([thief]).refused["barge3"]


def test_a_record_that_somebody_changed_is_refused() -> None:
    forged = replace(record(2), endpoint=record(3).endpoint)
    roster = admitted([member(2, of=forged)])
    assert roster.hosts == {}
    assert roster.refused["barge2"] == "its record is not signed by its certificate's identity"


def test_a_certificate_of_another_authority_is_refused() -> None:
    other = certificates.certify(seed("other"), "meshd", "barge2", certificate("barge2"))
    assert "not from this mesh's authority" in admitted([member(2, of=record(2, by=other))]).refused["barge2"]


def test_a_certificate_of_another_mesh_by_the_same_authority_is_refused() -> None:
    other = certificates.certify(AUTHORITY, "other", "barge2", certificate("barge2"))
    assert "not from this mesh's authority" in admitted([member(2, of=record(2, by=other))]).refused["barge2"]


def test_a_certificate_that_expires_drops_the_host() -> None:
    soon = certificate("barge2", expires=int(NOW) + 10)
    known = admitted([member(2, of=record(2, by=soon))])
    assert sorted(known.hosts) == ["barge2"]
    roster = admit(View(OWN, MESH, known, NOW + 10), [])
    assert roster.hosts == {}
    assert roster.refused["barge2"] == "its certificate expired on 1970-01-12 13:46 UTC"


def test_a_subnet_that_the_certificate_does_not_allow_is_refused() -> None:
    bound = certificate("barge2", subnets=(record(2).subnet,))
    assert admitted([member(2, of=record(2, by=bound))]).refused == {}
    other = record(2, by=bound, subnet=record(3).subnet)
    assert "does not allow the subnet 172.20.103.0/24" in admitted([member(2, of=other)]).refused["barge2"]


def test_a_delegation_admits_within_its_terms() -> None:
    web = delegation("barge", subnets=(record(2).subnet,))
    assert admitted([member(2, of=record(2, by=delegated("barge2", web)))]).refused == {}
    elsewhere = record(3, by=delegated("barge3", web))
    assert "does not allow the subnet" in admitted([member(3, of=elsewhere)]).refused["barge3"]
    late = admit(View(OWN, MESH, Roster(), NOW + 60), [member(2, of=record(2, by=delegated("barge2", web)))])
    assert "expired" in late.refused["barge2"]
    named = delegated("barge2", delegation("web-"))
    assert "begin with 'web-'" in admitted([member(2, of=record(2, by=named))]).refused["barge2"]


def test_a_delegation_that_its_holder_has_widened_is_refused() -> None:
    wide = replace(delegation("web-"), prefix="")
    assert (
        "delegation is not from" in admitted([member(2, of=record(2, by=delegated("barge2", wide)))]).refused["barge2"]
    )


def test_a_delegate_cannot_choose_its_terms_or_its_serial() -> None:
    mine = delegated("barge2", delegation())
    with pytest.raises(certificates.CredentialError):
        MESH.trust.check_certificate("barge2", replace(mine, expires=0))
    with pytest.raises(certificates.CredentialError):
        MESH.trust.check_certificate("barge2", replace(mine, serial=1))


@pytest.mark.parametrize("serial", ["certificate", "delegation"])
def test_a_revocation_drops_the_host_and_keeps_it_out(serial: str) -> None:
    mine = delegated("barge2", delegation())
    known = admitted([member(2, of=record(2, by=mine)), member(3)])
    number = mine.serial if serial == "certificate" else 7
    word = certificates.revoke(AUTHORITY, "meshd", number, "barge2")
    buried = merge_tombstones(known, MESH, Tombstones(revoked={number: word}))
    roster = admitted([member(2, of=record(2, seq=9, key="new", by=mine))], buried)
    assert sorted(roster.hosts) == ["barge3"]
    assert roster.refused["barge2"] == REVOKED
    assert roster.revoked == {number: word}


def test_who_is_not_the_authority_revokes_and_forgets_nobody() -> None:
    known = admitted([member(2)])
    word = certificates.revoke(seed("identity of barge3"), "meshd", certificate("barge2").serial, "barge2")
    assert merge_tombstones(known, MESH, Tombstones(revoked={word.serial: word})) == known
    signature = certificates.forget(seed("identity of barge3"), "meshd", "barge2", 1, public_key("barge2"))
    assert merge_tombstones(known, MESH, Tombstones({"barge2": tombstones.forgotten(record(2), signature)})) == known


# --- records that came besides the tags ------------------------------------------------------------------------------


def test_a_newer_record_that_was_heard_goes_before_the_tags() -> None:
    moved = record(2, seq=2, endpoint=Endpoint(record(9).endpoint.address, 51820))
    roster = admit(View(OWN, MESH, Roster(), NOW), [member(2)], heard={"barge2": moved})
    assert roster.hosts == {"barge2": moved}
    again = admitted([member(2)], roster)
    assert again.hosts == {"barge2": moved}
    assert again.refused == {}
    assert "older than 2" in again.stale["barge2"]


def test_a_record_that_was_heard_replaces_spoiled_tags() -> None:
    spoiled = replace(member(2), tags={"wg": "noise"})
    assert admit(View(OWN, MESH, Roster(), NOW), [spoiled], heard={"barge2": record(2)}).hosts == {"barge2": record(2)}


@pytest.mark.parametrize("what", ["forged", "older", "own", "leaving", "expired"])
def test_a_record_that_was_heard_counts_as_little_as_tags_if_it_is_bad(what: str) -> None:
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


def test_the_endpoint_of_a_living_host_is_refused_to_others_and_that_of_a_dead_one_is_not() -> None:
    known = admitted([member(2)])
    thief = member(3, of=record(3, endpoint=record(2).endpoint))
    assert admitted([member(2), thief], known).refused == {"barge3": "its endpoint 10.10.10.102:51820 is barge2's"}
    assert admitted([member(2, Status.FAILED), thief], known).refused == {}
    own = member(3, of=record(3, endpoint=OWN.record.endpoint))
    assert "is barge1's" in admitted([own]).refused["barge3"]


def test_two_hosts_can_swap_their_addresses() -> None:
    known = admitted([member(2), member(3)])
    two = member(2, of=record(2, seq=2, endpoint=record(3).endpoint))
    three = member(3, of=record(3, seq=2, endpoint=record(2).endpoint))
    assert admitted([two, three], known).refused == {}


def test_a_subnet_that_overlaps_an_own_network_is_not_taken_and_an_incumbents_stays() -> None:
    network = record(2).subnet.supernet()
    roster = admit(View(OWN, MESH, Roster(), NOW), [member(2)], networks=lambda: [network])
    assert roster.refused == {"barge2": f"subnet 172.20.102.0/24 overlaps this host's own network {network}"}
    known = admitted([member(2)])
    assert admit(View(OWN, MESH, known, NOW), [member(2)], networks=lambda: [network]).hosts == known.hosts


# --- goodbyes that others tell of, and subnets that two hosts claim -------------------------------------------------


def goodbye(number: int, seq: int) -> Tombstone:
    return tombstones.of_leaving(record(number, seq=seq, leaving=True))


def test_a_goodbye_that_others_tell_of_drops_the_host() -> None:
    known = Roster({"barge2": record(2, seq=5), "barge3": record(3)})
    roster = admitted([], merge_tombstones(known, MESH, Tombstones({"barge2": goodbye(2, 5)})))
    assert sorted(roster.hosts) == ["barge3"]
    assert roster.gone == {"barge2": goodbye(2, 5)}
    assert merge_tombstones(roster, MESH, Tombstones({"barge2": goodbye(2, 4)})) == roster, "older news is no news"


@pytest.mark.parametrize("proof", ["none", "another's", "not leaving", "noise", "another number"])
def test_a_goodbye_without_its_proof_is_nothing(proof: str) -> None:
    known = Roster({"barge2": record(2, seq=5)})
    real = goodbye(2, 5)
    bad = {
        "none": replace(real, record=None),
        "another's": replace(real, record=goodbye(3, 5).record),
        "not leaving": tombstones.of_leaving(record(2, seq=5)),
        "noise": replace(real, record=None, forgotten=bytes(300)),
        "another number": replace(real, seq=6),
    }
    assert merge_tombstones(known, MESH, Tombstones({"barge2": bad[proof]})) == known


def test_the_authority_can_forget_a_host() -> None:
    known = admitted([member(2)])
    signature = certificates.forget(AUTHORITY, "meshd", "barge2", 1, public_key("barge2"))
    roster = merge_tombstones(known, MESH, Tombstones({"barge2": tombstones.forgotten(record(2), signature)}))
    assert admitted([], roster).hosts == {}


def test_a_goodbye_of_an_earlier_life_does_not_touch_the_host_that_joined_anew() -> None:
    known = Roster({"barge2": record(2, seq=9, key="new")})
    assert merge_tombstones(known, MESH, Tombstones({"barge2": goodbye(2, 5)})) == known


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
def test_a_reusable_invitation_ends_no_host_that_it_has_not_made(by: str, expires: int) -> None:
    mine = record(2, by=delegated("barge2", delegation(expires=int(NOW) + 99)) if by == "invitation" else None)
    known = admitted([member(2, of=mine)])
    for key in ("thief", "barge2"):
        word = tombstones.of_leaving(by_thief(2, leaving=True, key=key, expires=expires))
        assert merge_tombstones(known, MESH, Tombstones({"barge2": word})) == known
    said = admitted([member(2, of=by_thief(2, leaving=True, expires=expires))], known)
    assert (said.hosts, said.gone) == (known.hosts, {})


def test_a_reusable_invitation_does_not_end_this_host_itself() -> None:
    for key in ("thief", "barge1"):
        word = tombstones.of_leaving(by_thief(1, leaving=True, key=key))
        assert merge_tombstones(Roster(), MESH, Tombstones({"barge1": word})) == Roster()


def test_a_reusable_invitation_gives_the_name_of_a_host_to_nobody_else() -> None:
    known = admitted([member(2)])
    roster = admitted([member(2, of=by_thief(2))], known)
    assert (roster.hosts, roster.refused) == (known.hosts, {"barge2": TAKEN})
    assert admit(View(OWN, MESH, known, NOW), [member(2)], heard={"barge2": by_thief(2)}).hosts == known.hosts
    assert not conflicts.claimed(View(host(1), MESH, known, NOW), [member(2, of=by_thief(2))])


def test_the_authoritys_certificate_gives_a_name_to_another_identity() -> None:
    known = Roster({"barge2": by_thief(2, seq=1)})
    assert admitted([member(2, of=record(2, seq=2))], known).hosts == {"barge2": record(2, seq=2)}
    confirmed = certificates.certify(
        AUTHORITY, "meshd", "barge2", Certificate(5, 0, certificates.public(THIEF), (), None)
    )
    made = certificates.sign(THIEF, "meshd", "barge2", replace(by_thief(2, seq=2), certificate=confirmed))
    assert admitted([member(2, of=made)], known).hosts == {"barge2": made}


def test_who_has_left_or_whose_certificate_has_ended_leaves_its_name_to_the_next_one() -> None:
    buried = merge_tombstones(admitted([member(2)]), MESH, Tombstones({"barge2": goodbye(2, 5)}))
    assert admitted([member(2, of=by_thief(2, seq=6))], buried).hosts["barge2"].seq == 6, "in the same pass"
    soon = Roster({"barge2": record(2, by=certificate("barge2", expires=int(NOW) - 1))})
    assert admitted([member(2, of=by_thief(2, seq=6))], soon).hosts["barge2"].seq == 6


def test_a_goodbye_of_an_ended_certificate_counts_if_it_is_the_hosts_own() -> None:
    brief = certificate("barge2", expires=int(NOW) - 1)
    known = Roster({"barge2": record(2, by=brief)})
    word = tombstones.of_leaving(record(2, seq=2, leaving=True, by=brief))
    assert merge_tombstones(known, MESH, Tombstones({"barge2": word})).gone == {"barge2": word}


@pytest.mark.parametrize("why", ["valid", "revoked", "ended"])
def test_an_earlier_identity_of_a_host_ends_it_only_while_its_certificate_holds(why: str) -> None:
    ends = int(NOW) - 1 if why == "ended" else 0
    first = certificates.certify(AUTHORITY, "meshd", "barge2", Certificate(5, ends, certificates.public(THIEF)))
    word = tombstones.of_leaving(
        certificates.sign(THIEF, "meshd", "barge2", replace(by_thief(2, leaving=True), certificate=first))
    )
    revoked = {5: certificates.revoke(AUTHORITY, "meshd", 5, "barge2")} if why == "revoked" else {}
    known = Roster({"barge2": record(2)}, revoked=revoked)
    assert ("barge2" in merge_tombstones(known, MESH, Tombstones({"barge2": word})).gone) == (why == "valid")


def test_a_name_that_a_reusable_invitation_has_blocked_is_the_authoritys_to_give() -> None:
    blocked = merge_tombstones(
        Roster(), MESH, Tombstones({"barge2": tombstones.of_leaving(by_thief(2, leaving=True, key="barge2"))})
    )
    assert admitted([member(2, of=record(2, by=delegated("barge2", delegation())))], blocked).hosts == {}
    roster = admitted([member(2)], blocked)
    assert (roster.hosts, roster.gone) == ({"barge2": record(2)}, {})


def test_what_a_reusable_invitation_says_does_not_hide_a_goodbye_of_the_authoritys_host() -> None:
    known = Roster(gone={"barge2": goodbye(2, 5)})
    word = tombstones.of_leaving(by_thief(2, leaving=True))
    assert merge_tombstones(known, MESH, Tombstones({"barge2": word})) == known
    assert admitted([member(2, of=by_thief(2, leaving=True))], known).gone == known.gone
    assert admitted([member(2, of=record(2, seq=4))], known).hosts == {}


def test_of_names_never_met_so_many_goodbyes_are_kept_and_those_of_hosts_always() -> None:
    noise = {f"barge{n}": tombstones.of_leaving(by_noise(n)) for n in range(3, MAX_STRANGERS + 9)}
    known = merge_tombstones(
        admitted([member(2, of=record(2, by=delegated("barge2", delegation())))]), MESH, Tombstones(noise)
    )
    assert len(known.gone) == MAX_STRANGERS
    assert (
        len(merge_tombstones(known, MESH, Tombstones({"barge999": tombstones.of_leaving(by_noise(999))})).gone)
        == MAX_STRANGERS
    )
    assert len(admitted([replace(member(3, of=by_noise(999)), name="barge999")], known).gone) == MAX_STRANGERS
    mine = tombstones.of_leaving(record(2, seq=2, leaving=True, by=delegated("barge2", delegation())))
    others = tombstones.of_leaving(record(1, leaving=True))
    more = merge_tombstones(known, MESH, Tombstones({"barge2": mine, "barge1": others}), own=None)
    assert len(more.gone) == MAX_STRANGERS + 2, "a host's own, and one by the authority's certificate"


def by_noise(number: int) -> Record:
    spelled = by_thief(3, leaving=True)
    certificate = thiefs(f"barge{number}")
    return certificates.sign(THIEF, "meshd", f"barge{number}", replace(spelled, certificate=certificate))


@pytest.mark.parametrize("by", ["authority", "ended", "invitation"])
def test_an_earlier_host_of_the_own_name_is_remembered_until_this_one_has_gone_beyond_it(by: str) -> None:
    joined = by_invitation = delegated("barge1", delegation(expires=int(NOW) + 99))
    earlier = by_thief(1, seq=2**40, key="earlier", leaving=True)
    if by != "invitation":
        ends = int(NOW) - 1 if by == "ended" else 0
        issued = certificates.certify(AUTHORITY, "meshd", "barge1", Certificate(5, ends, certificates.public(THIEF)))
        earlier, joined = replace(earlier, certificate=issued), certificate("barge1")
    word = tombstones.of_leaving(certificates.sign(THIEF, "meshd", "barge1", earlier))
    own = Host("barge1", record(1, by=joined))
    known = merge_tombstones(Roster(), MESH, Tombstones({"barge1": word}), own)
    assert admit(View(own, MESH, known, NOW), []).gone == {"barge1": word}
    beyond = Host("barge1", record(1, seq=2**40 + 1, by=by_invitation))
    assert admit(View(beyond, MESH, known, NOW), []).gone == {}


def test_an_address_of_a_revoked_host_is_forgotten_and_that_of_an_expired_one_is_not() -> None:
    brief = certificate("barge3", expires=int(NOW) - 1)
    known = Roster({"barge2": record(2), "barge3": record(3, by=brief)})
    word = certificates.revoke(AUTHORITY, "meshd", certificate("barge2").serial, "barge2")
    before = {f"barge{n}": Endpoint(record(n).endpoint.address, 7946) for n in (2, 3)}
    roster = admitted([], merge_tombstones(known, MESH, Tombstones(revoked={word.serial: word})))
    assert sorted(contacts(before, [], roster)) == ["barge3"]
    usurper = replace(roster, hosts={"barge2": record(2)})
    assert sorted(contacts(before, [], usurper)) == ["barge2", "barge3"], "who uses the name does not hide its host"


def test_a_host_that_the_others_have_buried_is_void() -> None:
    own = OWN.record
    assert Roster().ended("barge1", own, NOW) == ""
    assert Roster(gone={"barge1": Tombstone(1, public_key("barge1"))}).ended("barge1", own, NOW) == BURIED
    assert Roster(gone={"barge1": Tombstone(0, public_key("earlier"))}).ended("barge1", own, NOW) == ""


def rival_record(serial: int) -> Record:
    """What a barge2 publishes that claims the subnet of barge1."""
    return record(2, subnet=OWN.record.subnet, by=certificate("barge2", serial=serial))


def superseded(own: Host, *members: Member, known: Roster | None = None) -> str | None:
    return conflicts.superseded_by(View(own, MESH, known or Roster(), NOW), members)


@pytest.mark.parametrize("seq", [1, 2**40], ids=["its clock is behind", "its clock is ahead"])
def test_of_two_hosts_that_claim_one_subnet_both_name_the_same_loser(seq: int) -> None:
    mine = OWN.record.certificate.serial
    for serial, loser in ((mine - 1, "barge1"), (mine + 1, "barge2")):
        two = Host("barge2", record(2, seq=seq, subnet=OWN.record.subnet, by=certificate("barge2", serial=serial)))
        ones, twos = member(1), member(2, of=two.record)
        verdicts = superseded(OWN, ones, twos), superseded(two, ones, twos)
        assert verdicts == (("barge2", None) if loser == "barge1" else (None, "barge1"))


@pytest.mark.parametrize("why", ["known under another subnet", "gone"])
def test_who_has_been_here_before_takes_nobodys_subnet(why: str) -> None:
    winning = rival_record(1)
    known = Roster({"barge2": record(2)}) if why != "gone" else Roster(gone={"barge2": Tombstone(1, public_key("old"))})
    claim = record(2, seq=9, subnet=OWN.record.subnet, by=winning.certificate)
    assert superseded(OWN, member(2, of=claim)) == "barge2", "a stranger would"
    assert superseded(OWN, member(2, of=claim), known=known) is None


def test_who_came_by_a_reusable_invitation_and_chose_its_own_key_wins_against_nobody() -> None:
    chosen = delegated("barge2", delegation())
    assert superseded(OWN, member(2, of=record(2, subnet=OWN.record.subnet, by=chosen))) is None


@pytest.mark.parametrize("why", ["dead", "departed", "leaving", "elsewhere", "unsigned"])
def test_who_is_not_there_takes_no_subnet(why: str) -> None:
    winning = rival_record(1)
    assert superseded(OWN, member(2, of=winning)) == "barge2"
    low = certificate("barge2", serial=1)
    claim = {
        "leaving": record(2, subnet=OWN.record.subnet, by=low, leaving=True),
        "elsewhere": record(2, by=low),
        "unsigned": replace(winning, signature=bytes(64)),
    }
    gone = {"barge2": Tombstone(1, winning.public_key)} if why == "departed" else {}
    found = member(2, Status.FAILED if why == "dead" else Status.ALIVE, claim.get(why, winning))
    assert superseded(OWN, found, known=Roster(gone=gone)) is None


def test_two_hosts_that_know_each_other_and_claim_one_subnet_are_both_told_and_neither_moves() -> None:
    new = record(9).subnet
    one, two = (Host(f"barge{n}", record(n, seq=2, subnet=new)) for n in (1, 2))
    for own, other in ((one, two), (two, one)):
        known = Roster({other.name: record(int(other.name[-1]))})
        listed = [member(int(other.name[-1]), of=other.record), member(3, of=record(3, subnet=new))]
        assert conflicts.contested(View(own, MESH, known, NOW), listed) == [other.name], (
            "and a stranger is told otherwise"
        )
        assert superseded(own, listed[0], known=known) is None
