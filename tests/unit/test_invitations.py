"""Invitations survive copying, say what is wrong with them, and keep their secret."""

from base64 import b64decode
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd import keys
from meshd.endpoint import Endpoint
from meshd.errors import InputError
from meshd.mesh import certificates, invitations
from meshd.mesh.invitations import Invitation
from meshd.mesh.model import Delegation
from tests.conftest import MESH, NOW, certificate, delegation, seed


def invitation(**changes: object) -> Invitation:
    fields: dict[str, object] = {
        "mesh": "meshd",
        "overlay": IPv4Network("172.20.0.0/16"),
        "subnet_length": 24,
        "gossip_key": bytes(range(32)),
        "gossip_port": 7946,
        "authority": MESH.trust.authority,
        "seed": seed("identity of web1"),
        "name": "web1",
        "certificate": certificate("web1"),
        "addresses": (Endpoint(IPv4Address("10.10.10.101"), 7946),),
    }
    return Invitation(**(fields | changes))  # type: ignore[arg-type]


def reusable(by: Delegation) -> Invitation:
    return invitation(name=None, certificate=None, delegation=by, seed=seed("delegate"))


INVITATION = invitation()
LATER = 2**32 - 1


@pytest.mark.parametrize("original", [INVITATION, reusable(delegation("web-"))], ids=["named", "reusable"])
def test_round_trip(original: Invitation) -> None:
    assert invitations.decode(invitations.encode(original)) == original


def test_a_named_invitation_makes_its_host_a_member_under_its_own_name() -> None:
    admission = INVITATION.redeem(None, "localhost", NOW)
    assert (admission.name, admission.certificate) == ("web1", certificate("web1"))
    assert certificates.public(admission.seed) == admission.certificate.identity
    with pytest.raises(InputError, match="the invitation is for the host 'web1', not for 'web2'"):
        INVITATION.redeem("web2", "localhost", NOW)


def test_a_reusable_invitation_makes_anybody_a_member_within_its_terms() -> None:
    wanted = reusable(delegation("web-", expires=LATER))
    one, two = wanted.redeem(None, "web-1", NOW), wanted.redeem("web-2", "localhost", NOW)
    assert (one.name, two.name) == ("web-1", "web-2")
    assert one.seed != two.seed, "each host has an identity of its own"
    again = wanted.redeem("web-1", "localhost", NOW, one.seed)
    assert (again.seed, again.certificate) == (one.seed, one.certificate), "and keeps it"
    MESH.trust.check_certificate("web-1", one.certificate)
    with pytest.raises(InputError, match="for names that begin with 'web-', not for 'db1': pass --name"):
        wanted.redeem(None, "db1", NOW)
    with pytest.raises(InputError, match="the host name 'web-_'"):
        wanted.redeem(None, "web-_", NOW)


def test_an_expired_invitation_says_so() -> None:
    for expired in (invitation(certificate=certificate("web1", expires=int(NOW + 60))), reusable(delegation())):
        with pytest.raises(InputError, match="the invitation expired on 1970-01-12"):
            expired.redeem(None, "web1", NOW + 60)


def test_an_invitation_that_the_authority_did_not_make_says_so() -> None:
    with pytest.raises(InputError, match="not made by its mesh's authority"):
        invitation(authority=seed("other")).redeem(None, "web1", NOW)


def test_round_trip_also_when_a_mail_program_wrapped_it() -> None:
    text = invitations.encode(INVITATION)
    assert invitations.decode(text) == INVITATION
    assert invitations.decode(f"  {text[:40]}\n{text[40:]}\r\n") == INVITATION


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an invitation"),
        ("hello", "not an invitation"),
        ("meshd9.AAAA", "another version"),
        ("meshd2.", "damaged"),
        ("meshd2.!!!", "damaged"),
    ],
)
def test_what_is_no_invitation_says_so(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        invitations.decode(text)


@given(st.integers(7, len(invitations.encode(INVITATION)) - 1), st.characters(codec="ascii"))
def test_any_changed_character_is_noticed(position: int, character: str) -> None:
    text = invitations.encode(INVITATION)
    spoiled = text[:position] + character + text[position + 1 :]
    try:
        result = invitations.decode(spoiled)
    except InputError:
        return
    # The last base64 character has bits that mean nothing.
    assert result == INVITATION


@given(st.integers(7, len(invitations.encode(INVITATION)) - 1))
def test_a_cut_invitation_is_noticed(length: int) -> None:
    with pytest.raises(InputError, match="damaged"):
        invitations.decode(invitations.encode(INVITATION)[:length])


@given(st.text())
def test_any_text_gives_an_input_error_that_does_not_repeat_it_at_length(text: str) -> None:
    with pytest.raises(InputError) as error:
        invitations.decode("meshd2." + text)
    assert len(str(error.value)) < 200


def test_an_invitation_does_not_print_its_key() -> None:
    assert repr(INVITATION) == "Invitation(mesh='meshd', overlay=172.20.0.0/16, name='web1')"


def test_a_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "wireguard.key"
    first = keys.key(path)
    assert len(first) == 32
    assert keys.key(path) == first
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_key_is_an_error_and_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "wireguard.key"
    path.write_text("AAAA\n")
    with pytest.raises(InputError, match=r"wireguard\.key is damaged"):
        keys.key(path)
    assert path.read_text() == "AAAA\n"


def test_the_public_key_is_the_one_of_rfc_7748() -> None:
    # Section 6.1, Alice's pair.
    private = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    expected = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert b64decode(keys.public_key(private)) == expected
