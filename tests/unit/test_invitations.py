"""Invitations survive copying, say what is wrong with them, and keep their secret."""

import json
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
from meshd.mesh.model import FORMER, Delegation
from tests.conftest import GOLDEN, MESH, NOW, certificate, delegation, seed


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


FORMER_INVITATION = invitation(certificate=certificate("web1", version=FORMER))


@pytest.mark.parametrize(
    "original",
    [
        INVITATION,
        reusable(delegation("web-", extensions=b"\x05\x01x")),
        FORMER_INVITATION,
        reusable(delegation("web-", version=FORMER)),
    ],
    ids=["named", "reusable", "named of version 2", "reusable of version 2"],
)
def test_invitation_round_trip(original: Invitation) -> None:
    """An invitation survives the way to text and back."""
    assert invitations.decode(invitations.encode(original)) == original


@pytest.mark.parametrize("commit", ["527c77a", "d164600"])
def test_invitations_of_version_2_are_read(commit: str) -> None:
    """Invitations that version 2 made admit hosts, with the certificates that they allow."""
    texts = json.loads((GOLDEN / "version-2" / f"{commit}.json").read_text())
    named = invitations.decode(texts["invitation"])
    assert named.redeem(None, "localhost", NOW).certificate == certificate("barge2", version=FORMER)
    many = invitations.decode(texts["reusable invitation"])
    made = many.redeem(None, "barge9", NOW).certificate
    assert (made.version, made.delegation) == (FORMER, many.delegation)
    for again, text in ((named, texts["invitation"]), (many, texts["reusable invitation"])):
        assert invitations.encode(again) == text


def test_named_invitation_admits_only_its_name() -> None:
    """A named invitation admits a host under that name and no other one."""
    admission = INVITATION.redeem(None, "localhost", NOW)
    assert (admission.name, admission.certificate) == ("web1", certificate("web1"))
    assert certificates.public(admission.seed) == admission.certificate.identity
    with pytest.raises(InputError, match="the invitation is for the host 'web1', not for 'web2'"):
        INVITATION.redeem("web2", "localhost", NOW)


def test_reusable_invitation_admits_within_its_terms() -> None:
    """A reusable invitation admits hosts with its prefix, each with an identity of its own."""
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


def test_expired_invitation_is_refused() -> None:
    """An expired invitation is refused, and the error names its end."""
    for expired in (invitation(certificate=certificate("web1", expires=int(NOW + 60))), reusable(delegation())):
        with pytest.raises(InputError, match="the invitation expired on 1970-01-12"):
            expired.redeem(None, "web1", NOW + 60)


def test_invitation_of_another_authority_is_refused() -> None:
    """An invitation that its mesh's authority has not signed is refused."""
    with pytest.raises(InputError, match="not made by its mesh's authority"):
        invitation(authority=seed("other")).redeem(None, "web1", NOW)


def test_invitation_survives_line_breaks() -> None:
    """An invitation that a mail program has wrapped is still read."""
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
        ("meshd3.", "damaged"),
        ("meshd3.!!!", "damaged"),
        ("meshd2." + invitations.encode(INVITATION).removeprefix("meshd3."), "cannot be read"),
        ("meshd3." + invitations.encode(FORMER_INVITATION).removeprefix("meshd2."), "cannot be read"),
        (invitations.encode(reusable(delegation(extensions=b"\x85\x00"))), "needs a newer version of meshd"),
    ],
)
def test_text_that_is_no_invitation_is_refused(text: str, message: str) -> None:
    """Text that is no invitation is refused with the reason."""
    with pytest.raises(InputError, match=message):
        invitations.decode(text)


@given(st.integers(7, len(invitations.encode(INVITATION)) - 1), st.characters(codec="ascii"))
def test_changed_character_in_invitation_is_detected(position: int, character: str) -> None:
    """A changed character in an invitation is detected."""
    text = invitations.encode(INVITATION)
    spoiled = text[:position] + character + text[position + 1 :]
    try:
        result = invitations.decode(spoiled)
    except InputError:
        return
    # The last base64 character has bits that mean nothing.
    assert result == INVITATION


@given(st.integers(7, len(invitations.encode(INVITATION)) - 1))
def test_truncated_invitation_is_detected(length: int) -> None:
    """A truncated invitation is detected."""
    with pytest.raises(InputError, match="damaged"):
        invitations.decode(invitations.encode(INVITATION)[:length])


@given(st.text())
def test_invitation_error_is_short(text: str) -> None:
    """The error for any text is short and does not repeat the text."""
    with pytest.raises(InputError) as error:
        invitations.decode("meshd3." + text)
    assert len(str(error.value)) < 200


def test_invitation_repr_has_no_secret() -> None:
    """The repr of an invitation contains no secret."""
    assert repr(INVITATION) == "Invitation(mesh='meshd', overlay=172.20.0.0/16, name='web1')"


def test_key_is_made_once_with_mode_0600(tmp_path: Path) -> None:
    """A key is made once, and only root can read its file."""
    path = tmp_path / "wireguard.key"
    first = keys.key(path)
    assert len(first) == 32
    assert keys.key(path) == first
    assert path.stat().st_mode & 0o777 == 0o600


def test_damaged_key_is_not_replaced(tmp_path: Path) -> None:
    """A damaged key file raises an error and is not replaced."""
    path = tmp_path / "wireguard.key"
    path.write_text("AAAA\n")
    with pytest.raises(InputError, match=r"wireguard\.key is damaged"):
        keys.key(path)
    assert path.read_text() == "AAAA\n"


def test_public_key_matches_rfc_7748() -> None:
    """The public key of Alice's private key is the one of RFC 7748."""
    # Section 6.1, Alice's pair.
    private = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    expected = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert b64decode(keys.public_key(private)) == expected
