"""The chains of nftables, from `nft -j list ruleset`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from meshd.audit import Chain, Packet, Step, Truth, equal, every, opposite

# What changes nothing about whether a rule holds.
SILENT = frozenset({"counter", "log", "comment", "mangle", "notrack", "ct helper", "flow"})


def chains(entries: Iterable[Mapping[str, Any]], packet: Packet) -> dict[str, Chain]:
    """Read the chains of `nft -j list ruleset` as the packet sees them, by name: one is "inet filter input".

    Source: libnftables-json(5).
    """
    bodies = [(kind, body) for entry in entries for kind, body in entry.items() if kind in {"chain", "rule"}]
    seen = [(kind, body) for kind, body in bodies if body["family"] in {packet.family, "inet"}]
    steps: dict[str, list[Step]] = {}
    for rule in (body for kind, body in seen if kind == "rule"):
        steps.setdefault(_place(rule) + rule["chain"], []).extend(_steps(rule.get("expr", ()), packet, _place(rule)))
    found = {_place(body) + body["name"]: body for kind, body in seen if kind == "chain"}
    return {
        name: Chain(name, _hook(chain), chain.get("policy", ""), steps.get(name, ())) for name, chain in found.items()
    }


def _hook(chain: Mapping[str, Any]) -> str:
    """Return a chain's hook. Those of iptables are left out: nft's JSON does not say what its extensions match."""
    return "" if chain["name"] in {"INPUT", "FORWARD"} else str(chain.get("hook", ""))


def _place(body: Mapping[str, Any]) -> str:
    return f"{body['family']} {body['table']} "


def _steps(expressions: Iterable[Any], packet: Packet, place: str) -> Iterator[Step]:
    truth: Truth = True
    for expression in expressions:
        match expression:
            case {"match": body}:
                truth = every([truth, _match(body, packet)])
            case {"vmap": body}:
                yield from _map(body, truth, packet, place)
            case _ if (step := _verdict(expression, truth, place)) is not None:
                yield step
            case _ if SILENT.isdisjoint(expression):
                truth = every([truth, None])
        if truth is False:
            return


def _verdict(expression: Any, truth: Truth, place: str) -> Step | None:
    certain = truth is True
    match expression:
        case {"accept": _} | {"queue": _}:
            return Step("accept", certain)
        case {"drop": _} | {"reject": _}:
            return Step("drop", certain)
        case {"return": _}:
            return Step("return", certain)
        case {"jump": {"target": target}}:
            return Step("jump", certain, place + target)
        case {"goto": {"target": target}}:
            return Step("goto", certain, place + target)
    return None


def _map(body: Mapping[str, Any], truth: Truth, packet: Packet, place: str) -> Iterator[Step]:
    if not isinstance(body["data"], dict):  # a named map: what is in it is written elsewhere
        yield Step("accept", certain=False)
        return
    value = _value(body["key"], packet)
    for key, verdict in body["data"]["set"]:
        here = every([truth, equal(value, key)])
        if here is not False and (step := _verdict(verdict, here, place)) is not None:
            yield step


def _match(body: Mapping[str, Any], packet: Packet) -> Truth:
    match body["left"]:
        # To match a field of TCP is to match the protocol, too.
        case {"payload": {"protocol": str(protocol)}} if not packet.may_be(protocol):
            return False
    truth = equal(_value(body["left"], packet), body["right"])
    return {"==": truth, "in": truth, "!=": opposite(truth)}.get(body["op"])


def _value(left: Any, packet: Packet) -> str | int | None:
    """Return what the packet has where a rule looks, None if that is not known."""
    match left:
        case {"payload": {"protocol": str(place), "field": str(key)}}:
            pass
        case {"meta": {"key": str(key)}}:
            place = "meta"
        case {"ct": {"key": str(key)}}:
            place = "ct"
        case _:
            return None
    return {
        "meta iifname": packet.link_in,
        "meta iif": packet.link_in,
        "meta oifname": packet.link_out,
        "meta oif": packet.link_out,
        "meta nfproto": f"ipv{packet.version}",
        "meta l4proto": packet.protocol,
        "ip protocol": packet.protocol,
        "tcp dport": packet.port,
        "udp dport": packet.port,
        "th dport": packet.port,
        "ct state": "new",
        "ct status": "none",
    }.get(f"{place} {key}")
