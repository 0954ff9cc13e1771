"""What the authority signs: serials that never go back, revocations with all that belongs to them."""

from dataclasses import replace

import pytest

from meshd.errors import InputError
from meshd.mesh import certificates
from meshd.mesh.model import FORMER, Record
from meshd.mesh.roster import REVOKED, Roster
from meshd.mesh.tombstones import is_proved
from meshd.state import authority
from meshd.state.authority import HOSTS, RUNAWAY, Terms, label
from meshd.state.directory import State
from tests.conftest import AUTHORITY, NOW, delegated, delegation, record

LASTING = delegation(expires=0)


@pytest.fixture
def holder(state: State) -> State:
    """The state directory of a host that holds the authority."""
    state.save_authority_key(AUTHORITY)
    return state


def test_serials_grow_whatever_the_clock_says(holder: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two certificates for one name the later one has the higher serial, also when the clock has gone back."""
    first = authority.invite(holder, "barge2", Terms()).certificate
    monkeypatch.setattr("time.time", lambda: 0.0)
    second, third = (authority.invite(holder, "barge2", Terms()).certificate for _ in range(2))
    assert first is not None
    assert second is not None
    assert third is not None
    assert first.serial < second.serial < third.serial
    assert second.supersedes(first)


def test_forget_signs_no_number_that_keeps_out_later_hosts(holder: State) -> None:
    """A number that no clock gives is not signed: it would end every later host of the name."""
    assert authority.forget(holder, "barge2", record(2, seq=RUNAWAY - 1)).seq == RUNAWAY - 1
    with pytest.raises(InputError, match="run 'meshd revoke barge2' instead"):
        authority.forget(holder, "barge2", record(2, seq=RUNAWAY))


def confirmed(holder: State, name: str) -> Record:
    """Let the authority confirm a host that came by the reusable invitation of the tests."""
    joined = record(int(name[-1]), by=delegated(name, LASTING))
    assert authority.confirm(holder, name, joined) is not None
    return joined


def test_revoked_invitation_lists_hosts_that_it_brought(holder: State) -> None:
    """Hosts that the authority has confirmed stay unless they are revoked as well; this host itself always stays."""
    invitation = label(LASTING.serial)
    holder.save_issued({str(LASTING.serial): {"name": invitation, "expires": 0, "identity": None, "by": None}})
    for name in ("barge2", "barge3", "barge1"):
        confirmed(holder, name)
    alone = authority.revoke(holder, invitation)
    assert {r.name for r in alone.values()} == {invitation}
    assert authority.confirmed_by(holder, [invitation]) == ["barge1", "barge2", "barge3"]
    both = authority.revoke(holder, invitation, with_hosts=True)
    assert {r.name for r in both.values()} == {invitation, "barge2", "barge3"}
    assert all(holder.mesh.trust.is_revocation(r) for r in both.values())


def test_another_certificate_of_a_revoked_identity_is_revoked(holder: State) -> None:
    """Each host that has the authority confirms a host by a certificate of its own, of which the others do not know."""
    joined = confirmed(holder, "barge2")
    first = holder.issued()
    holder.save_issued({})
    confirmed(holder, "barge2")
    second = authority.confirm(holder, "barge2", joined)
    assert second is not None
    holder.save_issued(first)
    assert str(second.serial) not in first
    revoked = authority.revoke(holder, "barge2")
    assert Roster(revoked=revoked).lapsed(second, NOW) == REVOKED
    invitation = label(LASTING.serial)
    holder.save_issued({**first, str(LASTING.serial): {"name": invitation, "expires": 0, "identity": None, "by": None}})
    assert Roster(revoked=authority.revoke(holder, invitation)).lapsed(second, NOW) == ""
    assert Roster(revoked=authority.revoke(holder, invitation, with_hosts=True)).lapsed(second, NOW) == REVOKED


def test_host_whose_membership_has_ended_is_not_confirmed(holder: State) -> None:
    """It hears of its revocation as soon as the authority's host, and would ask at that moment."""
    joined = record(2, by=delegated("barge2", LASTING))
    holder.save_roster(Roster({"barge2": joined}))
    revoked = authority.revoke(holder, "barge2")
    holder.save_roster(Roster({"barge2": joined}, revoked=revoked))
    assert authority.confirm(holder, "barge2", joined) is None
    assert holder.issued() == {}
    expired = record(2, by=delegated("barge2", delegation(expires=int(NOW) - 1)))
    holder.save_roster(Roster({"barge2": expired}))
    assert authority.confirm(holder, "barge2", expired) is None


def test_membership_date_survives_confirmation_and_renewal(holder: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host is a member since it was confirmed first, or invited; asked again, the authority says the same."""
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.5)
    invited = authority.invite(holder, "barge2", Terms()).certificate
    joined = record(3, by=delegated("barge3", delegation(version=FORMER, expires=0)))
    first = authority.confirm(holder, "barge3", joined)
    assert invited is not None
    assert first is not None
    assert invited.since == first.since == 1_800_000_000
    monkeypatch.setattr("time.time", lambda: 1_900_000_000.0)
    again = record(3, by=delegated("barge3", LASTING))
    assert authority.confirm(holder, "barge3", again) == first
    old = replace(invited, version=FORMER)
    renewed = authority.confirm(holder, "barge2", record(2, by=certificates.certify(AUTHORITY, "meshd", "barge2", old)))
    assert renewed == invited


def test_forget_names_the_identity(holder: State) -> None:
    """The authority's word is of the identity that it knows for the host."""
    word = authority.forget(holder, "barge2", record(2, seq=5))
    assert word.identity == record(2).certificate.identity
    assert is_proved(holder.mesh, "barge2", word)


def test_reusable_invitation_says_for_how_many_hosts(holder: State) -> None:
    """The bound is signed. Nothing acts on it yet."""
    invitation = authority.invite_many(holder, "web-", Terms(expires=int(NOW)))
    assert invitation.delegation is not None
    assert invitation.delegation.hosts == HOSTS
