"""Record <-> Serf tags: what a host publishes, and the strict reading of what others claim (docs/record.md).

Three tags. `wg` and `subnet` stay readable in `serf members`; `meshd` holds the rest, `;` between its fields
because Serf prints tags with commas and escapes neither commas nor `=`:

    wg=<base64 public key>  subnet=172.20.101.0/24  meshd=1;seq=1764000000;ep=10.10.10.101:51820
"""

import base64
import binascii
from collections.abc import Mapping
from ipaddress import IPv4Network

from meshd.addressing import is_usable
from meshd.errors import InputError
from meshd.model import Endpoint, IPAddress, Record

NAMES = ("meshd", "subnet", "wg")
VERSION = "1"
# memberlist's limit for a member's metadata: one type byte and the msgpack map of all tags.
LIMIT = 512
MAX_SEQ = 2**48


class RecordError(InputError):
    """A member's tags are not a valid record; the message is the reason that `meshd members` shows."""


def encode(record: Record) -> dict[str, str]:
    """Give the tags of a record. Raises RecordError if Serf would refuse them as too long."""
    fields = [VERSION, f"seq={record.seq}", f"ep={record.endpoint}"]
    if record.leaving:
        fields.append("leaving")
    tags = {"wg": record.public_key, "subnet": str(record.subnet), "meshd": ";".join(fields)}
    if size(tags) > LIMIT:
        raise RecordError(f"the record takes {size(tags)} bytes, Serf carries {LIMIT}")
    return tags


def size(tags: Mapping[str, str]) -> int:
    """Give the bytes that Serf needs for tags: its type byte, the map's header, a header for each string."""

    def encoded(text: str) -> int:
        length = len(text.encode())
        return length + (1 if length < 32 else 3)

    return 1 + (1 if len(tags) < 16 else 3) + sum(encoded(k) + encoded(v) for k, v in tags.items())


def decode(tags: Mapping[str, str], overlay: IPv4Network, length: int) -> Record:
    """Read a record from tags that anybody may have written; RecordError says why it is not one."""
    missing = [name for name in NAMES if name not in tags]
    if missing:
        raise RecordError("no record" if len(missing) == len(NAMES) else f"no {missing[0]} tag")
    version, *rest = tags["meshd"].split(";")
    if version != VERSION:
        raise RecordError(f"record version {version[:16]!r}, this meshd reads {VERSION}")
    fields = _fields(rest)
    return Record(
        public_key=_public_key(tags["wg"]),
        subnet=_subnet(tags["subnet"], overlay, length),
        endpoint=_endpoint(fields["ep"], overlay),
        seq=_seq(fields["seq"]),
        leaving="leaving" in fields,
    )


def _fields(parts: list[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for part in parts:
        name, _, value = part.partition("=")
        if name not in {"seq", "ep", "leaving"} or name in fields or (name == "leaving" and part != name):
            raise RecordError(f"unexpected field {part[:32]!r} in the record")
        fields[name] = value
    if not {"seq", "ep"} <= fields.keys():
        raise RecordError("the record lacks seq or ep")
    return fields


def is_public_key(text: str) -> bool:
    """Tell whether a text is a WireGuard public key, in its only spelling."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    # The all-zero key is how WireGuard spells "no key"; the re-encoding refuses a second spelling of one key.
    return len(raw) == 32 and raw != bytes(32) and base64.b64encode(raw).decode() == text


def _public_key(text: str) -> str:
    if not is_public_key(text):
        raise RecordError("the wg tag is not a WireGuard public key")
    return text


def _subnet(text: str, overlay: IPv4Network, length: int) -> IPv4Network:
    try:
        subnet = IPv4Network(text)
    except ValueError:
        raise RecordError(f"subnet {text[:32]!r} is not a prefix") from None
    if str(subnet) != text:
        raise RecordError(f"subnet {text[:32]!r} is not written as {subnet}")
    if not subnet.subnet_of(overlay):
        raise RecordError(f"subnet {subnet} is outside of the overlay {overlay}")
    if subnet.prefixlen != length:
        raise RecordError(f"subnet {subnet} is not a /{length}")
    if not is_usable(subnet, overlay):
        raise RecordError(f"subnet {subnet} is at the overlay's edge")
    return subnet


def _endpoint(text: str, overlay: IPv4Network) -> Endpoint:
    try:
        endpoint = Endpoint.parse(text)
    except ValueError:
        raise RecordError(f"endpoint {text[:64]!r} is not ADDRESS:PORT") from None
    if problem := unusable(endpoint.address, overlay):
        raise RecordError(f"endpoint {endpoint} is {problem}")
    return endpoint


def unusable(address: IPAddress, overlay: IPv4Network) -> str:
    """Say why no other host can reach a host at this address, or the empty string."""
    if address.version == 6 and address.is_link_local:
        return "local to one link"
    if address.is_unspecified or address.is_multicast or address.is_loopback:
        return "no address of a host"
    if address in overlay:
        return f"inside of the overlay {overlay}"
    return ""


def _seq(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 15 and 0 < int(text) < MAX_SEQ):
        raise RecordError(f"sequence number {text[:20]!r} is not a positive number")
    return int(text)
