"""Who is told that a certificate ends, when, and with which words."""

from dataclasses import replace

import pytest

from meshd.mesh import certificates, endings
from meshd.mesh.model import Certificate, Host
from tests.conftest import NOW, certificate, delegated, delegation, record

DAY = 86400


def lasting(begin: float, end: float, name: str = "barge1") -> Certificate:
    """A certificate that was signed at one Unix time and ends at another."""
    return certificate(name, serial=int(begin * 1000) << 20, expires=int(end))


@pytest.mark.parametrize(
    ("life", "notice"),
    [(90 * DAY, 14 * DAY), (42 * DAY, 14 * DAY), (30 * DAY, 10 * DAY), (3 * DAY, DAY), (3600, 1200)],
)
def test_notice_is_a_third_of_a_life_and_two_weeks_at_most(life: int, notice: int) -> None:
    """It begins once, at that moment, and ends with the certificate."""
    given = lasting(NOW, NOW + life)
    end = NOW + life
    near = [endings.is_near(given, now) for now in (NOW, end - notice - 1, end - notice, end - 1, end)]
    assert near == [False, False, True, True, False]


def test_certificate_without_an_end_is_never_near() -> None:
    assert not endings.is_near(certificate("barge1"), NOW)


def test_notice_of_a_certificate_that_a_wrong_clock_signed() -> None:
    """One that was signed after its end, by its number, is warned of for two weeks."""
    given = lasting(NOW + 90 * DAY, NOW)
    assert not endings.is_near(given, NOW - 14 * DAY - 1)
    assert endings.is_near(given, NOW - 14 * DAY)


def test_own_end_says_what_to_type() -> None:
    given = lasting(0, NOW + 60)
    (text,) = endings.of_own(Host("barge1", record(1, by=given)), NOW)
    assert f"this host's membership ends on {certificates.date(given.expires)}" in text
    assert "run 'meshd invite barge1' on the host with the authority" in text
    assert endings.of_own(Host("barge1", record(1, by=given)), NOW + 60) == [], (
        "then it has ended, which is told as such"
    )


def test_own_invitation_that_ends_before_the_authority_has_confirmed() -> None:
    """A host is not told in its first minute, in which the authority confirms it."""
    host = Host("barge1", record(1, seq=int(NOW), by=delegated("barge1", delegation(expires=int(NOW) + 3600))))
    assert endings.of_own(host, NOW + 59) == []
    (text,) = endings.of_own(host, NOW + 60)
    assert "with the invitation by which it came, unless the authority confirms it before" in text


def test_others_are_named_up_to_a_number() -> None:
    """Hosts by a reusable invitation are not: anyone who has it makes any number of them."""
    soon, later = lasting(0, NOW + 60), lasting(NOW, NOW + 90 * DAY)
    own, many = record(2, by=delegated("barge2", delegation(serial=1))), endings.MOST + 3
    assert endings.of_others({"barge1": record(1, by=later), "barge2": own, "barge3": record(3)}, NOW) == []
    hosts = {f"barge{number:03}": replace(own, certificate=soon) for number in range(many)}
    lines = endings.of_others(hosts, NOW)
    assert len(lines) == endings.MOST + 1
    assert lines[0].startswith("barge000's membership ends on")
    assert lines[-1] == "the membership of more hosts than these ends soon"
