"""The chains of iptables, of both its variants, from `iptables-save`."""

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence

from meshd.audit import Chain, Packet, Step, Truth, equal, every, opposite

VERDICTS = {"ACCEPT": "accept", "QUEUE": "accept", "NFQUEUE": "accept", "DROP": "drop", "REJECT": "drop"}
COMMENT = re.compile(r' -m comment --comment (?:"(?:[^"\\]|\\.)*"|\S+)')


def chains(saved: str, packet: Packet) -> dict[str, Chain]:
    """Read the chains of the table filter in the output of iptables-save or ip6tables-save as the packet sees them."""
    text = COMMENT.sub("", saved.partition("*filter\n")[2].partition("COMMIT\n")[0])
    lines = [shlex.split(line) for line in text.splitlines()]
    policies = {words[0][1:]: words[1].lower() for words in lines if words[0].startswith(":")}
    steps: dict[str, list[Step]] = {name: [] for name in policies}
    for _, chain, *words in (words for words in lines if words[0] == "-A"):
        steps[chain] += _steps(words, packet, policies)
    hooks = {"INPUT": "input", "FORWARD": "forward"}
    return {name: Chain(name, hooks.get(name, ""), policies[name], steps[name]) for name in policies}


def _steps(words: Sequence[str], packet: Packet, names: Collection[str]) -> Iterator[Step]:
    end = next((n for n, word in enumerate(words) if word in {"-j", "-g"}), len(words))
    truth = every(_match(option, packet) for option in _options(words[:end]))
    how, target = words[end : end + 2] or ("", "")
    verdict = {"RETURN": "return"} | VERDICTS | dict.fromkeys(names, "goto" if how == "-g" else "jump")
    if target in verdict and truth is not False:
        yield Step(verdict[target], truth is True, target)


def _options(words: Iterable[str]) -> Iterator[list[str]]:
    """Split conditions into options, each with its values; one that is inverted begins with `!`."""
    option: list[str] = []
    for word in words:
        if option not in ([], ["!"]) and (word == "!" or word.startswith("-")):
            yield option
            option = []
        option.append(word)
    if option:
        yield option


def _match(option: Sequence[str], packet: Packet) -> Truth:
    name, wanted = option[0], option[1] if len(option) == 2 else ""
    if name == "!":
        return opposite(_match(option[1:], packet))
    if name == "-m":
        # Their options decide.
        return wanted in {"tcp", "udp", "multiport", "conntrack", "state"} or None
    if name in {"--dport", "--dports"}:
        return equal(packet.port, [_range(entry) for entry in wanted.split(",")])
    if name in {"--ctstate", "--state"}:
        return "NEW" in wanted.split(",")
    value = {"-i": packet.link_in, "-o": packet.link_out, "-p": packet.protocol}.get(name)
    return equal(value, wanted.replace("+", "*"))


def _range(text: str) -> dict[str, list[int]]:
    """Write a port or range of iptables' as nft's JSON does."""
    low, _, high = text.partition(":")
    return {"range": [int(low), int(high or low)]}
