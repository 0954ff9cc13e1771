"""Signatures: what they cover, and the vectors by which another implementation can check itself."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.endpoint import Endpoint
from meshd.gossip.messages import APPLIED, EVENT_LIMIT, Answer, Applied, TellRecord
from meshd.mesh import certificates, extensions, tombstones
from meshd.mesh.certificates import CredentialError, Trust
from meshd.mesh.model import FORMER, VERSION, Certificate, Delegation, Record, Tombstone
from meshd.mesh.records import encode, pack_certificate, pack_delegation, to_wire
from meshd.mesh.tombstones import Tombstones, grave
from tests.conftest import AUTHORITY, MESH, certificate, delegated, delegation, forgotten, public_key, record, seed


def vectors(version: int) -> dict[str, object]:
    """One of each kind in this version, with its secrets; of version 3 with an extension where one may be."""
    is_new = version >= VERSION
    more = extensions.pack({5: b"later"}) if is_new else b""
    web = delegation("web-", subnets=(IPv4Network("172.20.101.0/24"),), extensions=more, version=version)
    own = certificate("barge1", extensions=more, version=version)
    plain = record(1, seq=7, by=own, extensions=more, version=version)
    by_delegation = record(2, by=delegated("barge2", delegation(version=version)), version=version)
    leaving = record(1, seq=8, leaving=True, version=version)
    dead = Tombstone(7, public_key("barge1"), identity=own.identity if is_new else b"", extensions=more)
    forget = certificates.forget(AUTHORITY, "meshd", "barge1", dead)
    return {
        "mesh": "meshd",
        "authority": {"seed": AUTHORITY.hex(), "public": MESH.trust.authority.hex()},
        "delegation": {"seed": seed("delegate").hex(), "packed": pack_delegation(web).hex()},
        "certificate": {
            "name": "barge1",
            "identity seed": seed("identity of barge1").hex(),
            "packed": pack_certificate(own).hex(),
        },
        "record": {"name": "barge1", "tags": encode(plain), "wire": to_wire(plain).hex()},
        "delegated record": {"name": "barge2", "tags": encode(by_delegation), "wire": to_wire(by_delegation).hex()},
        "goodbye": {"name": "barge1", "proof": tombstones.proof(tombstones.of_leaving(leaving)).hex()},
        "forget": {"name": "barge1", "proof": tombstones.proof(forget).hex()}
        if is_new
        else {"name": "barge1", "seq": 7, "signature": forget.forgotten.hex()},
    }


def test_documented_vectors(golden: Callable[[str, str], None]) -> None:
    """The format is the one of the documented test vectors, of version 2 and of version 3."""
    revocation = certificates.revoke(AUTHORITY, "meshd", 99, "barge1").signature.hex()
    former = {**vectors(FORMER), "revocation": {"name": "barge1", "serial": 99, "signature": revocation}}
    former_in_3 = record(1, seq=7, by=certificate("barge1", version=FORMER))
    host, question = record(1), Applied("barge2", 7, seed("identity"), public_key("barge2"), bytes(8)).payload()
    answer = certificates.answer(seed("identity of barge1"), "meshd", "barge1", APPLIED, question, refusal="")
    newer = {
        **vectors(VERSION),
        "record with a certificate of version 2": {
            "name": "barge1",
            "tags": encode(former_in_3),
            "wire": to_wire(former_in_3).hex(),
        },
        "messages": {
            "applied": question.hex(),
            "answer": Answer("", answer).payload().hex(),
            "record": TellRecord("barge1", to_wire(host)).payload().hex(),
            "tombstones": next(Tombstones(grave("barge2", forgotten(record(2), 2))).pages(EVENT_LIMIT)).hex(),
        },
    }
    golden("vectors.json", json.dumps({"version 2": former, "version 3": newer}, indent=2) + "\n")


OTHER: dict[str, object] = {
    "public_key": public_key("other"),
    "subnet": IPv4Network("172.20.9.0/24"),
    "endpoint": Endpoint(IPv4Address("10.10.10.9"), 51820),
    "seq": 9,
    "certificate": certificate("barge1", serial=5),
    "leaving": True,
    "signature": bytes(64),
    "extensions": extensions.pack({5: b"later"}),
    "version": FORMER,
}


@pytest.mark.parametrize("field", [field.name for field in fields(Record)])
def test_signature_covers_every_record_field(field: str) -> None:
    """A change to any field of a record invalidates it."""
    changed = replace(record(1), **{field: OTHER[field]})  # type: ignore[arg-type]
    with pytest.raises(CredentialError):
        MESH.trust.check("barge1", changed)


CHANGED: dict[str, object] = {
    "serial": 5,
    "expires": 2**32 - 1,
    "identity": certificates.public(seed("other")),
    "subnets": (IPv4Network("172.20.9.0/24"),),
    "signature": bytes(64),
    "since": 5,
    "extensions": extensions.pack({5: b"later"}),
    "version": FORMER,
    "key": certificates.public(seed("other")),
    "prefix": "b",
    "hosts": 5,
}


@pytest.mark.parametrize("field", [field.name for field in fields(Certificate) if field.name != "delegation"])
def test_signature_covers_every_certificate_field(field: str) -> None:
    """A change to any field of a certificate by the authority invalidates it."""
    changed = replace(certificate("barge1"), **{field: CHANGED[field]})  # type: ignore[arg-type]
    with pytest.raises(CredentialError):
        MESH.trust.check_certificate("barge1", changed)


@pytest.mark.parametrize("field", [field.name for field in fields(Delegation)])
def test_signature_covers_every_delegation_field(field: str) -> None:
    """A change to any field of a delegation invalidates it."""
    with pytest.raises(CredentialError):
        MESH.trust.check_delegation(replace(delegation(), **{field: CHANGED[field]}))  # type: ignore[arg-type]


def test_signature_is_bound_to_kind_and_mesh() -> None:
    """A signature counts for one kind of statement and one mesh only."""
    word = certificates.revoke(AUTHORITY, "meshd", 7, "barge1")
    assert MESH.trust.is_revocation(word)
    assert not MESH.trust.is_forget("barge1", Tombstone(7, public_key("barge1"), forgotten=word.signature))
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
