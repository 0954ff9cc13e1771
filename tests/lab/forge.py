"""Gossip as anybody can make it who can send UDP: memberlist's packets, encrypted or not, on their way to an agent.

Run on a host of the lab, by path: `python forge.py`, with JSON on standard input:

    {"key": hex or null, "targets": ["10.10.10.101"], "messages": [["alive", {...}], ["raw", {"hex": "…"}], …]}

The format is that of https://github.com/hashicorp/memberlist (net.go, security.go) and serf (messages.go): a type byte
and msgpack; encrypted: version 1, a nonce of 12 bytes, AES-GCM.
"""

import json
import os
import socket
import sys
import time
from typing import Any

import msgpack
from nacl.bindings import crypto_aead_aes256gcm_encrypt

PORT = 7946
ALIVE, SUSPECT, DEAD, USER = 4, 3, 5, 8
LEAVE_INTENT = 0
TAGS_MAGIC = 255
# Protocol versions as memberlist of Serf 0.8 to 0.10 says them: minimum, maximum, current; the same of Serf's.
VERSIONS = bytes([1, 5, 2, 2, 5, 4])


def pack(kind: str, fields: dict[str, Any]) -> bytes:
    """Give one message in clear."""
    if kind == "raw":
        return bytes.fromhex(fields["hex"])
    if kind == "alive":
        meta = bytes([TAGS_MAGIC]) + encoded(fields["tags"])
        return bytes([ALIVE]) + encoded(
            {
                "Incarnation": fields["incarnation"],
                "Node": fields["name"],
                "Addr": socket.inet_aton(fields["address"]),
                "Port": PORT,
                "Meta": meta,
                "Vsn": VERSIONS,
            }
        )
    if kind == "leave":
        return bytes([USER, LEAVE_INTENT]) + encoded({"LTime": fields["time"], "Node": fields["name"], "Prune": True})
    number = {"dead": DEAD, "suspect": SUSPECT}[kind]
    return bytes([number]) + encoded(
        {"Incarnation": fields["incarnation"], "Node": fields["name"], "From": fields["from"]}
    )


def encoded(value: Any) -> bytes:
    return bytes(msgpack.packb(value, use_bin_type=False))


def sealed(key: bytes, message: bytes) -> bytes:
    """Encrypt as memberlist does."""
    nonce = os.urandom(12)
    return b"\x01" + nonce + bytes(crypto_aead_aes256gcm_encrypt(message, None, nonce, key))


def main() -> None:
    task = json.load(sys.stdin)
    key = bytes.fromhex(task["key"]) if task["key"] else None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number, (kind, fields) in enumerate(task["messages"]):
            message = pack(kind, fields)
            for target in task["targets"]:
                sender.sendto(sealed(key, message) if key else message, (target, PORT))
            if number % 50 == 49:
                time.sleep(0.05)  # what comes faster than it is read is dropped


if __name__ == "__main__":
    main()
