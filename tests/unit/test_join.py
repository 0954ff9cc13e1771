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


def test_renewal_refuses_other_mesh(state: State, reusable: Invitation) -> None:
    """An invitation to another mesh is refused on a host that is a member."""
    with pytest.raises(InputError, match="this host is in the mesh 'meshd' already, and the invitation is of another"):
        renewal(state, replace(reusable, authority=certificates.public(seed("other"))), NOW)


def test_renewal_takes_named_invitation(state: State) -> None:
    """An invitation for this name renews the certificate; one for another name is refused."""
    state.save_authority_key(AUTHORITY)
    invitation = authority.invite(state, "barge1", Terms(expires=LATER))
    admission = renewal(state, invitation, NOW)
    assert admission is not None
    assert (admission.certificate, admission.seed) == (invitation.certificate, invitation.seed)
    with pytest.raises(InputError, match="the invitation is for the host 'web', not for 'barge1'"):
        renewal(state, authority.invite(state, "web", Terms()), NOW)


def test_renewal_ignores_reusable_invitation(state: State, reusable: Invitation) -> None:
    """A reusable invitation adds nothing to a certificate by the authority itself."""
    assert state.certificate.delegation is None
    assert renewal(state, reusable, NOW) is None


def test_renewal_keeps_identity(state: State, reusable: Invitation) -> None:
    """A reusable invitation renews a delegated certificate and keeps the identity."""
    by_delegation(state)
    admission = renewal(state, reusable, NOW)
    assert admission is not None
    assert admission.certificate.delegation == reusable.delegation
    assert (admission.seed, admission.certificate.identity) == (OWN, certificates.public(OWN))


def test_renewal_replaces_revoked_identity(state: State, reusable: Invitation) -> None:
    """A host whose identity was revoked gets another one."""
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
def test_renumber_refuses_wrong_subnet(state: State, subnet: str, message: str) -> None:
    """A wrong subnet is refused before a container is touched."""
    only = certificate("barge1", subnets=(record(1).subnet,))
    state.save_claim(Claim(record(1, by=only), settled=True))
    with pytest.raises(InputError, match=message):
        renumber(state, IPv4Network(subnet), force=True, say=print)
