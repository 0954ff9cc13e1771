"""Signatures: what they cover, and the vectors by which another implementation can check itself."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.endpoint import Endpoint
from meshd.mesh import certificates, tombstones
from meshd.mesh.certificates import CredentialError, Trust
from meshd.mesh.model import Record
from meshd.mesh.records import encode, pack_certificate, pack_delegation, to_wire
from tests.conftest import AUTHORITY, MESH, certificate, delegated, delegation, public_key, record, seed


def test_documented_vectors(golden: Callable[[str, str], None]) -> None:
    """The format is the one of the documented test vectors."""
    web = delegation("web-", subnets=(IPv4Network("172.20.101.0/24"),))
    plain, by_delegation = record(1, seq=7), record(2, by=delegated("barge2", delegation()))
    leaving = record(1, seq=8, leaving=True)
    vectors = {
        "mesh": "meshd",
        "authority": {"seed": AUTHORITY.hex(), "public": MESH.trust.authority.hex()},
        "delegation": {"seed": seed("delegate").hex(), "packed": pack_delegation(web).hex()},
        "certificate": {
            "name": "barge1",
            "identity seed": seed("identity of barge1").hex(),
            "packed": pack_certificate(certificate("barge1")).hex(),
        },
        "record": {"name": "barge1", "tags": encode(plain), "wire": to_wire(plain).hex()},
        "delegated record": {"name": "barge2", "tags": encode(by_delegation), "wire": to_wire(by_delegation).hex()},
        "goodbye": {"name": "barge1", "proof": tombstones.proof(tombstones.of_leaving(leaving)).hex()},
        "forget": {
            "name": "barge1",
            "seq": 7,
            "signature": certificates.forget(AUTHORITY, "meshd", "barge1", 7, public_key("barge1")).hex(),
        },
        "revocation": {
            "name": "barge1",
            "serial": 99,
            "signature": certificates.revoke(AUTHORITY, "meshd", 99, "barge1").signature.hex(),
        },
    }
    golden("vectors.json", json.dumps(vectors, indent=2) + "\n")


OTHER: dict[str, object] = {
    "public_key": public_key("other"),
    "subnet": IPv4Network("172.20.9.0/24"),
    "endpoint": Endpoint(IPv4Address("10.10.10.9"), 51820),
    "seq": 9,
    "certificate": certificate("barge1", serial=5),
    "leaving": True,
    "signature": bytes(64),
}


@pytest.mark.parametrize("field", [field.name for field in fields(Record)])
def test_signature_covers_every_record_field(field: str) -> None:
    """A change to any field of a record invalidates it."""
    changed = replace(record(1), **{field: OTHER[field]})  # type: ignore[arg-type]
    if field == "certificate":
        # Another certificate of the same identity stands behind the same record: that is how one is renewed.
        MESH.trust.check("barge1", changed)
        changed = replace(changed, certificate=certificate("barge2"))
    with pytest.raises(CredentialError):
        MESH.trust.check("barge1", changed)


def test_signature_is_bound_to_kind_and_mesh() -> None:
    """A signature counts for one kind of statement and one mesh only."""
    word = certificates.revoke(AUTHORITY, "meshd", 7, "barge1")
    assert MESH.trust.is_revocation(word)
    assert not MESH.trust.is_forget("barge1", 7, public_key("barge1"), word.signature)
    assert not Trust("other", MESH.trust.authority).is_revocation(word)


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_signed_body_is_unambiguous(a: str, b: str, c: str, d: str) -> None:
    """Two different lists of fields never have the same signed bytes."""
    one, two = (certificates._body("kind", "mesh", *(t.encode() for t in texts)) for texts in ((a, b), (c, d)))
    assert (one == two) is ((a, b) == (c, d))


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_noise_is_no_signature(key: bytes, signature: bytes) -> None:
    """Random bytes are neither a key nor a signature, and raise no error."""
    assert not certificates._holds(key, b"body", signature)
