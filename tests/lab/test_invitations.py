"""Inviting, renewing, revoking, and handing the authority on, as a person does it."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from meshd.lab.hosts import Lab, LabHost
from meshd.mesh import certificates, invitations
from meshd.state import authority
from meshd.state.authority import Terms
from meshd.state.directory import State
from tests.lab.conftest import eventually, init, invitation, join, log, members, overlay, peers, ping, snapshot
from tests.lab.traffic import unbroken

pytestmark = [pytest.mark.root, pytest.mark.lab]

PASSPHRASE = ["--passphrase-file", "/run/passphrase"]


@pytest.fixture
def hosts(lab: Lab) -> Iterator[list[LabHost]]:
    """Three hosts; the first has begun a mesh."""
    lab.up(3, docker=False)
    hosts = lab.hosts()
    init(hosts[0], "--no-docker")
    try:
        yield hosts
    finally:
        lab.down()


def invite(host: LabHost, *arguments: str) -> str:
    return host.run(["meshd", "invite", *arguments]).stdout.split("MESHD_INVITE=")[1].split()[0]


def refused(host: LabHost, offer: str, *arguments: str) -> str:
    """Join, which must fail and leave nothing; give the error."""
    command = ["meshd", "join", "10.10.10.101", "--no-docker", *arguments]
    done = host.run(command, env={"MESHD_INVITE": offer}, check=False)
    assert done.returncode == 2, done
    assert host.run(["ls", "-A", "/var/lib/meshd"]).stdout == ""
    assert offer[10:50] not in done.stderr
    return done.stderr


def state(host: LabHost) -> State:
    return State(host.directory / "meshd")


def test_named_invitation_fixes_name_and_subnet(hosts: list[LabHost]) -> None:
    """A named invitation fixes the name and the subnet of its host, and admits only one."""
    one, two, three = hosts
    offer = invite(one, "db1", "--subnet", "172.20.77.0/24")
    assert "the invitation is for the host 'db1', not for 'web1'" in refused(two, offer, "--name", "web1")
    assert "allows subnets of 172.20.77.0/24 only" in refused(two, offer, "--subnet", "172.20.78.0/24")
    output = join(two, one, offer, "--no-docker")
    assert re.search(r"^db1 +172\.20\.77\.0/24 +10\.10\.10\.102:51820 +alive", output, re.MULTILINE), output
    # Somebody else with the same line is told that the name is taken.
    done = three.run(["meshd", "join", "10.10.10.101", "--no-docker"], env={"MESHD_INVITE": offer}, check=False)
    assert done.returncode == 1
    assert "the name db1 is already in the mesh" in done.stderr
    assert peers(one) == [state(two).claim().record.public_key]  # type: ignore[union-attr]


def test_expired_invitation_error_names_reason(hosts: list[LabHost]) -> None:
    """An expired invitation is refused with its end, and a reusable one with its prefix."""
    one, two, _ = hosts
    old = invitations.encode(authority.invite(state(one), "barge2", Terms(expires=int(time.time()) - 60)))
    assert re.search(
        r"the invitation expired on 20\d\d-\d\d-\d\d \d\d:\d\d UTC: ask for another one", refused(two, old)
    )
    many = invite(one, "--reusable", "web-", "--ttl", "90m")
    assert "names that begin with 'web-', not for 'barge2': pass --name" in refused(two, many)
    assert "web-1 " in join(two, one, many, "--no-docker", "--name", "web-1")


def test_revoked_invitation_admits_nobody(hosts: list[LabHost]) -> None:
    """A revoked invitation, named or reusable, admits nobody."""
    one, two, three = hosts
    offer, many = invite(one, "ghost"), one.run(["meshd", "invite", "--reusable"]).stdout
    one.run(["meshd", "revoke", "ghost"])
    one.run(["meshd", "revoke", re.findall(r"'(invitation-[0-9a-f]+)'", many)[0]])
    for host, text in ((two, offer), (three, many.split("MESHD_INVITE=")[1].split()[0])):
        before = snapshot(host)
        assert "the authority has revoked this host, or the invitation by which it came" in refused(host, text)
        assert snapshot(host) == before
        assert peers(one) == []
    unknown = one.run(["meshd", "revoke", "nobody"], check=False)
    assert unknown.returncode == 2
    assert "nothing to revoke for 'nobody'; known: barge1, ghost" in unknown.stderr


def test_certificate_renewal_loses_no_packet(hosts: list[LabHost]) -> None:
    """A certificate is renewed by a second join without the loss of a packet."""
    one, two, _ = hosts
    join(two, one, invite(one, "barge2", "--ttl", "90d"), "--no-docker")
    before = state(two).certificate
    eventually(lambda: ping(one, overlay(two)), 5, "the tunnel is there")
    with unbroken([(one, two)]) as lost:
        join(two, one, invite(one, "barge2", "--ttl", "180d"))
        after = state(two).certificate
        eventually(lambda: state(one).roster().hosts["barge2"].certificate == after, 5, "the other has the new one")
    assert lost == []
    assert after.expires > before.expires


def test_end_of_a_membership_is_told_before(hosts: list[LabHost]) -> None:
    """At join, in the log and in `status`, here and where the authority is, until the certificate is renewed."""
    one, two, _ = hosts
    # Given 80 days ago, for 90.
    offer = authority.invite(state(one), "barge2", Terms(expires=int(time.time()) + 10 * 86400))
    assert offer.certificate is not None
    old = replace(offer.certificate, serial=certificates.new_serial(time.time() - 80 * 86400))
    old = certificates.certify(authority.key(state(one)), "meshd", "barge2", old)
    line = invitations.encode(replace(offer, certificate=old))
    done = two.run(["meshd", "join", "10.10.10.101", "--no-docker"], env={"MESHD_INVITE": line})
    told = f"membership ends on {certificates.date(old.expires)}"
    assert f"Warning: this host's {told}" in done.stderr
    eventually(lambda: f"this host's {told}" in log(two), 10, "the daemon of the host says it")
    eventually(lambda: f"barge2's {told}" in log(one), 10, "the daemon where the authority is says it")
    for host, whose in ((one, "barge2's"), (two, "this host's")):
        status = host.run(["meshd", "status"], check=False)
        assert status.returncode == 1
        assert f"{whose} {told}, when its certificate expires. To renew it, run 'meshd invite barge2'" in status.stdout
    join(two, one, invite(one, "barge2"))
    eventually(lambda: all("no longer: " in log(host) for host in (one, two)), 10, "both say that it is over")
    for host in (one, two):
        assert host.run(["meshd", "status"]).returncode == 0
        assert log(host).count(told) == 2, "once when it began, once when it was over"


def test_reusable_invitation_host_is_confirmed(hosts: list[LabHost]) -> None:
    """The authority confirms a host that joined by a reusable invitation."""
    one, two, _ = hosts
    join(two, one, invitation(one), "--no-docker")
    eventually(lambda: state(two).certificate.delegation is None, 20, "the authority has confirmed it")
    assert state(two).certificate.expires == 0
    eventually(lambda: state(one).roster().hosts["barge2"].certificate == state(two).certificate, 5, "and it is used")


def test_authority_export_and_import(hosts: list[LabHost]) -> None:
    """The authority is handed on and outlives its first host."""
    one, two, three = hosts
    join(two, one, invite(one, "barge2"), "--no-docker")
    for command in (["invite", "barge3"], ["revoke", "barge1"], ["forget", "barge1"], ["authority", "export"]):
        done = two.run(["meshd", *command], check=False)
        assert done.returncode == 2
        assert "this host does not hold the authority of the mesh 'meshd'" in done.stderr
    assert "this host holds the authority of the mesh" in one.run(["meshd", "leave"], check=False).stderr

    for host in (one, two):
        host.run(["sh", "-c", "umask 077; echo 'correct horse' >/run/passphrase"])
    export = one.run(["meshd", "authority", "export", *PASSPHRASE]).stdout
    assert state(one).authority_key is not None
    assert state(one).authority_key.hex() not in export  # type: ignore[union-attr]
    three.run(["sh", "-c", "umask 077; echo 'wrong horse' >/run/passphrase"])
    two.run(["sh", "-c", "echo 'wrong horse' >/run/wrong"])
    wrong = two.run(["meshd", "authority", "import", "-", "--passphrase-file", "/run/wrong"], text=export, check=False)
    assert (wrong.returncode, "the passphrase is wrong" in wrong.stderr) == (2, True)
    assert state(two).authority_key is None
    two.run(["meshd", "authority", "import", "-", *PASSPHRASE], text=export)

    one.run(["meshd", "leave"])
    eventually(lambda: peers(two) == [], 5, "the first host has left")
    join(three, two, invite(two, "barge3"), "--no-docker")
    assert ping(three, overlay(two))
    assert members(two)["barge3"]["state"] == "alive"
