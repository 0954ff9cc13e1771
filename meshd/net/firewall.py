"""The host's own `nft` and `iptables`: meshd's table, and its rules in Docker's chains.

iptables is the one in PATH, as for dockerd, so both write to the same of its two variants.
"""

import json
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from threading import Event
from typing import Any, ClassVar

from meshd.errors import ApplyError, MissingError
from meshd.interrupts import uninterrupted
from meshd.net.netlink import NETLINK_NETFILTER, notifications, subscribe
from meshd.net.resources import Action, Chain, Change, IptablesRule, Resource, Rule, Table

PACKAGES = {"nft": "nftables", "iptables": "iptables", "iptables-save": "iptables", "ip6tables-save": "iptables"}
MARK = "meshd:"
# Where meshd may have rules of its own.
PLACES = (("filter", "DOCKER-USER"), ("filter", "FORWARD"), ("raw", "PREROUTING"))
TIMEOUT = 20.0


def run(argv: Sequence[str], text: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a firewall program to its end. Raises MissingError if it is not installed, ApplyError if it hangs.

    Comments hold any bytes; what is no text in them is replaced, since nothing of meshd's is in need of it.
    """
    try:
        with uninterrupted():
            return subprocess.run(
                argv, input=text, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=TIMEOUT
            )
    except FileNotFoundError:
        raise MissingError(f"{argv[0]} is not installed: apt install {PACKAGES[argv[0]]}") from None
    except subprocess.TimeoutExpired:
        raise ApplyError(f"{' '.join(argv)}: no answer in {TIMEOUT:g} s") from None
    except OSError as error:
        raise ApplyError(f"{' '.join(argv)}: {error.strerror or error}") from error


class Nftables:
    """meshd's own tables, which share a name. Each rule carries its digest as a comment, by which it is recognised.

    `families` are those that the kernel has: `ip`, and `ip6` where there is IPv6.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"table"})

    def __init__(self, name: str, families: Sequence[str]) -> None:
        self.name = name
        self.families = tuple(families)

    def read(self) -> list[Resource]:
        # One question each: nft 1.0.6 does not find the first of two tables that it is asked for at once.
        return [table for family in self.families if (table := self._read(family)) is not None]

    def _read(self, family: str) -> Table | None:
        done = run(["nft", "-j", "list", "table", family, self.name])
        if done.returncode != 0:
            if "No such file or directory" in done.stderr:
                return None
            raise ApplyError(f"listing nftables table {family} {self.name}: {_first_line(done.stderr)}")
        try:
            return parse(family, self.name, json.loads(done.stdout)["nftables"])
        except (ValueError, KeyError, TypeError) as error:
            what = f"listing nftables table {family} {self.name}"
            raise ApplyError(f"{what}: unexpected answer of nft: {error!r}") from error

    def apply(self, change: Change) -> None:
        table = change.resource
        assert isinstance(table, Table)  # noqa: S101  what the dispatch by kind guarantees, for the type checker
        # "Make it, then delete it" succeeds whether or not it was there; all of it is one transaction.
        text = f"table {table.key} {{\n}}\ndelete table {table.key}\n"
        if change.action is not Action.REMOVE:
            text += render(table)
        done = run(["nft", "-f", "-"], text)
        if done.returncode != 0:
            raise ApplyError(f"{change.action} {table}: {_first_line(done.stderr)}")


def render(table: Table) -> str:
    """Return the table in nft's language. nft 1.0.6 wants each closing brace on a line of its own."""
    lines = [f"table {table.key} {{"]
    for name, _ in table.counters:
        lines += [f"  counter {name} {{", "  }"]
    for chain in table.chains:
        lines += [
            f"  chain {chain.name} {{",
            f"    type {chain.type} hook {chain.hook} priority {chain.priority}; policy accept;",
            *(f'    {rule.text} comment "{MARK}{rule.digest}"' for rule in chain.rules),
            "  }",
        ]
    return "\n".join([*lines, "}", ""])


def parse(family: str, name: str, entries: list[dict[str, Any]]) -> Table:
    """Read nft's JSON: a rule of others has an empty digest, a policy of others spoils its chain's type."""
    chains = [entry["chain"] for entry in entries if "chain" in entry]
    rules = [entry["rule"] for entry in entries if "rule" in entry]
    return Table(
        family,
        name,
        tuple(
            Chain(
                chain["name"],
                chain.get("type", "") + ("" if chain.get("policy", "accept") == "accept" else " drop"),
                chain.get("hook", ""),
                int(chain.get("prio", 0)),
                tuple(_rule(rule) for rule in rules if rule["chain"] == chain["name"]),
            )
            for chain in chains
        ),
        tuple((e["counter"]["name"], int(e["counter"]["packets"])) for e in entries if "counter" in e),
    )


def _rule(rule: dict[str, Any]) -> Rule:
    comment = str(rule.get("comment", ""))
    return Rule(comment.removeprefix(MARK) if comment.startswith(MARK) else "")


class Iptables:
    """meshd's rules in Docker's chains, recognised by a comment that names their owner."""

    kinds: ClassVar[frozenset[str]] = frozenset({"iptables"})

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def read(self) -> list[Resource]:
        # iptables-save creates nothing, where `iptables -t raw -S` would leave an empty table behind.
        done = run(["iptables-save"])
        if done.returncode != 0:
            raise ApplyError(f"listing iptables rules: {_first_line(done.stderr)}")
        found = {rule.key: rule for rule in parse_saved(done.stdout, self.owner)}
        return list(found.values())

    def apply(self, change: Change) -> None:
        rule = change.resource
        assert isinstance(rule, IptablesRule)  # noqa: S101  as above
        arguments = [rule.chain, *rule.match, "-m", "comment", "--comment", rule.owner]
        base = ["iptables", "-w", "-t", rule.table]
        if change.action is Action.REMOVE:
            while run([*base, "-D", *arguments]).returncode == 0:
                pass
            return
        if run([*base, "-C", *arguments]).returncode == 0:
            return
        if rule.chain == "DOCKER-USER":
            # Docker keeps the chain if it is there before Docker is.
            run([*base, "-N", rule.chain])
        done = run([*base, "-I", *arguments])
        if done.returncode != 0:
            raise ApplyError(f"{change.action} {rule}: {_first_line(done.stderr)}")


def parse_saved(text: str, owner: str) -> Iterator[IptablesRule]:
    """Find the rules of an owner in the output of iptables-save."""
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        if not line.startswith("-A ") or owner not in line:
            continue
        words = shlex.split(line)[1:]
        chain, *rest = words
        comment = ["-m", "comment", "--comment", owner]
        for start in range(len(rest) - 3):
            if rest[start : start + 4] == comment and (table, chain) in PLACES:
                yield IptablesRule(table, chain, tuple(rest[:start] + rest[start + 4 :]), owner)
                break


# --- the rules of all ------------------------------------------------------------------------------------------------


def ruleset() -> list[dict[str, Any]]:
    """Return everything in nftables, as libnftables-json(5) writes it. Raises ApplyError."""
    done = run(["nft", "-j", "list", "ruleset"])
    if done.returncode != 0:
        raise ApplyError(f"listing all nftables rules: {_first_line(done.stderr)}")
    try:
        return list(json.loads(done.stdout)["nftables"])
    except (ValueError, KeyError, TypeError) as error:
        raise ApplyError(f"listing all nftables rules: unexpected answer of nft: {error!r}") from error


def saved(version: int) -> str:
    """Return what iptables-save prints, for IPv6 ip6tables-save; without iptables, or without its answer, nothing."""
    try:
        return run(["iptables-save" if version == 4 else "ip6tables-save"]).stdout
    except MissingError:
        return ""


# --- changes by others ---------------------------------------------------------------------------------------------

NFNLGRP_NFTABLES = 7


def watch(table: str, hint: Callable[[str], None], stop: Event) -> None:
    """Hint when someone changes a table named `table` or one of the chains in PLACES, until `stop` is set.

    The kernel tells of every change by nft and by iptables' nft variant; the legacy variant's nobody tells of. meshd's
    own changes hint too. Raises ApplyError.
    """
    # Names travel in messages as text that ends with a NUL; a flushed ruleset names each table that went, this one too.
    chains = {chain for _, chain in PLACES} - {"FORWARD"}  # where Docker and others come and go all the time
    words = {f"{name}\0".encode(): name for name in (table, *sorted(chains))}
    try:
        with subscribe(NETLINK_NETFILTER, NFNLGRP_NFTABLES) as sock:
            for data in notifications(sock, stop):
                if data is None:
                    hint("messages were lost")
                elif changed := [name for word, name in words.items() if word in data]:
                    hint(f"{changed[0]} changed")
    except OSError as error:
        raise ApplyError(f"watching nftables: {error.strerror or error}") from error


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "no reason given")
