"""Whose membership ends soon, because a certificate does, and what renews it. Pure."""

from collections.abc import Mapping

from meshd.mesh.certificates import date, since
from meshd.mesh.model import Certificate, Host, Record

# How long before its end a certificate is warned of: for a third of its life, and for two weeks at most.
SHARE, LONGEST = 3, 14 * 86400
# The authority confirms a host that came by a reusable invitation within seconds, and is given a minute.
CONFIRMED = 60
# How many others are named.
MOST = 20
CERTIFIED = (
    "{whose} membership ends on {date}, when its certificate expires. To renew it, run 'meshd invite {name}' on the "
    "host with the authority, and the line that it prints on {name}. That interrupts nothing"
)
DELEGATED = (
    "{whose} membership ends on {date}, with the invitation by which it came, unless the authority confirms it before: "
    "start the host with the authority. Or run 'meshd invite {name}' there, and the line that it prints on {name}"
)


def is_near(certificate: Certificate, now: float) -> bool:
    """Return whether a certificate ends so soon, in Unix time, that somebody has to be told. It has not ended yet."""
    if not certificate.expires:
        return False
    signed = since((certificate.delegation or certificate).serial)
    life = certificate.expires - signed
    # Of one that was signed by a clock ahead of its end nobody knows how long it was to last.
    notice = min(life / SHARE, LONGEST) if life > 0 else LONGEST
    return certificate.expires - notice <= now < certificate.expires


def of_own(own: Host, now: float) -> list[str]:
    """Return a line if the membership of this host itself ends soon."""
    certificate = own.record.certificate
    # The number of a record is the Unix time of its last change, or higher.
    is_new = certificate.delegation is not None and now < own.record.seq + CONFIRMED
    return [end(own.name, certificate)] if is_near(certificate, now) and not is_new else []


def end(name: str, certificate: Certificate, whose: str = "this host's") -> str:
    """Return when the membership of a host ends by its certificate, which has an end, and what renews it."""
    text = DELEGATED if certificate.delegation else CERTIFIED
    return text.format(name=name, whose=whose, date=date(certificate.expires))


def of_others(hosts: Mapping[str, Record], now: float) -> list[str]:
    """Return a line for each host, by name, whose own certificate by the authority ends soon, and at most MOST + 1.

    One by a reusable invitation is no news to the authority, which has confirmed it or has no place for it.
    """
    near = [
        (name, record.certificate)
        for name, record in sorted(hosts.items())
        if record.certificate.delegation is None and is_near(record.certificate, now)
    ]
    more = ["the membership of more hosts than these ends soon"] if near[MOST:] else []
    return [end(name, certificate, f"{name}'s") for name, certificate in near[:MOST]] + more
