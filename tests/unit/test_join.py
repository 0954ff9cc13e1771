"""What a second join gives to a host, and what a renumber may ask for, decided before anything is touched."""

from dataclasses import replace
from ipaddress import IPv4Network

import pytest

from meshd.errors import InputError
from meshd.lifecycle.join import renewal
from meshd.lifecycle.renumber import renumber
from meshd.mesh import certificates
from meshd.mesh.invitations import Invitation
from meshd.mesh.model import Revocation
from meshd.mesh.roster import Roster
from meshd.state import authority
from meshd.state.authority import Terms
from meshd.state.directory import Claim, State
from tests.conftest import AUTHORITY, NOW, certificate, delegated, delegation, record, seed

LATER = 2**32 - 1
OWN = seed("identity of barge1")


@pytest.fixture
def reusable(state: State) -> Invitation:
    state.save_authority_key(AUTHORITY)
    return authority.invite_many(state, "", Terms(expires=LATER))


def by_delegation(state: State) -> None:
    """Make the host one that came by a reusable invitation and is not confirmed yet."""
    state.save_certificate(delegated("barge1", delegation(expires=LATER)), OWN)


def test_an_invitation_to_another_mesh_is_refused(state: State, reusable: Invitation) -> None:
    with pytest.raises(InputError, match="this host is in the mesh 'meshd' already, and the invitation is of another"):
        renewal(state, replace(reusable, authority=certificates.public(seed("other"))), NOW)


def test_an_invitation_for_this_name_renews_its_certificate(state: State) -> None:
    state.save_authority_key(AUTHORITY)
    invitation = authority.invite(state, "barge1", Terms(expires=LATER))
    admission = renewal(state, invitation, NOW)
    assert admission is not None
    assert (admission.certificate, admission.seed) == (invitation.certificate, invitation.seed)
    with pytest.raises(InputError, match="the invitation is for the host 'web', not for 'barge1'"):
        renewal(state, authority.invite(state, "web", Terms()), NOW)


def test_a_reusable_invitation_adds_nothing_to_the_authoritys_own_certificate(
    state: State, reusable: Invitation
) -> None:
    assert state.certificate.delegation is None
    assert renewal(state, reusable, NOW) is None


def test_a_reusable_invitation_renews_a_delegated_certificate_and_keeps_the_identity(
    state: State, reusable: Invitation
) -> None:
    by_delegation(state)
    admission = renewal(state, reusable, NOW)
    assert admission is not None
    assert admission.certificate.delegation == reusable.delegation
    assert (admission.seed, admission.certificate.identity) == (OWN, certificates.public(OWN))


def test_an_identity_that_was_revoked_is_replaced(state: State, reusable: Invitation) -> None:
    by_delegation(state)
    serial = state.certificate.serial
    state.save_roster(Roster(revoked={serial: Revocation(serial, "barge1", b"signature")}))
    admission = renewal(state, reusable, NOW)
    assert admission is not None
    assert admission.seed != OWN


@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        ("10.0.0.0/24", "is not a /24 of 172.20.0.0/16"),
        ("172.20.200.0/24", "the certificate of this host allows 172.20.101.0/24 only, not 172.20.200.0/24"),
        ("172.20.101.0/24", "this host has the subnet 172.20.101.0/24 already"),
    ],
)
def test_a_wrong_subnet_is_refused_before_a_container_is_touched(state: State, subnet: str, message: str) -> None:
    only = certificate("barge1", subnets=(record(1).subnet,))
    state.save_claim(Claim(record(1, by=only), settled=True))
    with pytest.raises(InputError, match=message):
        renumber(state, IPv4Network(subnet), force=True, say=print)
