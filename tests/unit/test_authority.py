"""What the authority signs: serials that never go back, revocations with all that belongs to them."""

import time
from dataclasses import replace

import pytest

from meshd.errors import InputError
from meshd.mesh import certificates
from meshd.mesh.model import DEFAULT_HOSTS, FORMER, MAX_HOSTS, Record
from meshd.mesh.roster import REVOKED, Roster
from meshd.mesh.tombstones import is_proved
from meshd.state import authority
from meshd.state.authority import RUNAWAY, Terms, label
from meshd.state.directory import State
from tests.conftest import AUTHORITY, NOW, certificate, delegated, delegation, record

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


def test_copy_goes_beyond_a_serial_that_another_copy_gave_by_a_wrong_clock(holder: State) -> None:
    """What it certifies for the name counts, though it has not noted that serial."""
    ahead = certificate("barge2", serial=certificates.new_serial(time.time() + 30 * 86400))
    holder.save_roster(Roster({"barge2": record(2, by=ahead)}))
    again = authority.invite(holder, "barge2", Terms()).certificate
    assert again is not None
    assert again.supersedes(ahead)


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
    """The bound is signed, and at most a thousand. That of version 2, which says none, is for as many as by default."""
    invitation = authority.invite_many(holder, "web-", Terms(expires=int(NOW)))
    assert invitation.delegation is not None
    assert invitation.delegation.hosts == DEFAULT_HOSTS
    few = authority.invite_many(holder, "web-", Terms(expires=int(NOW)), 3)
    assert few.delegation is not None
    assert few.delegation.most == 3
    assert delegation(version=FORMER).most == DEFAULT_HOSTS
    for hosts in (0, MAX_HOSTS + 1):
        with pytest.raises(InputError, match=f"for 1 to 1000 hosts, not {hosts}"):
            authority.invite_many(holder, "web-", Terms(expires=int(NOW)), hosts)


# --- no more hosts than an invitation is for ------------------------------------------------------------------------

FEW = delegation(expires=0, hosts=2, serial=9)


def came(number: int) -> Record:
    return record(number, by=delegated(f"barge{number}", FEW))


def test_no_more_hosts_are_confirmed_than_an_invitation_is_for(holder: State) -> None:
    """The third one of an invitation for two gets nothing; the first two are confirmed again and again, at no cost."""
    first = [authority.confirm(holder, f"barge{n}", came(n)) for n in (2, 3)]
    assert None not in first
    before = holder.issued()
    assert authority.confirm(holder, "barge4", came(4)) is None
    assert [authority.confirm(holder, f"barge{n}", came(n)) for n in (2, 3)] == first
    assert holder.issued() == before
    elsewhere = record(5, by=delegated("barge5", LASTING))
    assert authority.confirm(holder, "barge5", elsewhere) is not None, "another invitation has its own number"


def test_the_authority_says_whom_it_does_not_confirm_and_what_to_do(holder: State) -> None:
    """There is one line for an invitation, whoever waits, and none before its number is reached."""
    hosts = {f"barge{n}": came(n) for n in (2, 3, 4)}
    roster = Roster(hosts, waiting={"barge5": came(5)})
    authority.confirm(holder, "barge2", hosts["barge2"])
    assert authority.used_up(holder, roster) == []
    authority.confirm(holder, "barge3", hosts["barge3"])
    name = label(FEW.serial)
    (text,) = authority.used_up(holder, roster)
    assert text == (
        f"{name} is used up: the authority has confirmed 2 by it, and confirms no others. Run 'meshd invite "
        f"--reusable --hosts N' for more hosts, and 'meshd revoke {name}' if others than yours come by it"
    )
    assert authority.used_up(holder, Roster(waiting={"barge6": came(6)})) == [text], "whoever waits, it is logged once"
    assert authority.used_up(holder, Roster({"barge2": hosts["barge2"], "barge6": record(6)})) == []
    (holder.directory / "authority.key").unlink()
    assert authority.used_up(holder, roster) == []
