"""Gossip as anybody can make it who can send UDP: memberlist's packets, encrypted or not, on their way to an agent.

Run on a host of the lab, by path: `python forge.py`, with JSON on standard input:

    {"key": hex or null, "targets": ["10.10.10.101"], "messages": [["alive", {...}], ["raw", {"hex": "…"}], …]}

With "streams", which is as "messages", what is in there goes by TCP. With "seconds" all of it is sent for so long. With
"answer" so many probes are answered, with coordinates that are no numbers, and it ends when they are.

The format is that of https://github.com/hashicorp/memberlist (net.go, security.go) and serf (messages.go): a type byte
and msgpack; encrypted: version 1, a nonce of 12 bytes, AES-GCM.
"""

import json
import os
import socket
import sys
import time
from contextlib import suppress
from typing import Any

import msgpack
from nacl.bindings import crypto_aead_aes256gcm_decrypt, crypto_aead_aes256gcm_encrypt

PORT = 7946
PING, ACK, STATE, COMPOUND, CHECKED = 0, 2, 6, 7, 12
ALIVE, SUSPECT, DEAD, USER, COMPRESSED, ENCRYPTED = 4, 3, 5, 8, 9, 10
LEAVE_INTENT = 0
LZW_FIRST, LZW_LAST = 258, 4094
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
    if kind == "zeros":
        return bytes([COMPRESSED]) + encoded({"Algo": 0, "Buf": compressed_zeros(fields["codes"])})
    if kind == "state":
        return exchanged(fields["members"], fields["address"])
    number = {"dead": DEAD, "suspect": SUSPECT}[kind]
    return bytes([number]) + encoded(
        {"Incarnation": fields["incarnation"], "Node": fields["name"], "From": fields["from"]}
    )


def exchanged(members: int, address: str) -> bytes:
    """Give one side of an exchange of all state, which lists so many members that nobody has seen."""
    listed = b"".join(
        encoded(
            {
                "Name": f"listed{number}",
                "Addr": socket.inet_aton(address),
                "Port": PORT,
                "Meta": bytes([TAGS_MAGIC]) + encoded({}),
                "Incarnation": 1,
                "State": 0,
                "Vsn": VERSIONS,
            }
        )
        for number in range(members)
    )
    return bytes([STATE]) + encoded({"Nodes": members, "UserStateLen": 0, "Join": False}) + listed


def probes(message: bytes) -> list[int]:
    """Give the numbers of the probes in a message in clear."""
    if message[0] == CHECKED:
        return probes(message[5:])
    if message[0] == COMPOUND:
        count, found = message[1], list[int]()
        at = 2 + 2 * count
        for part in range(count):
            length = int.from_bytes(message[2 + 2 * part : 4 + 2 * part], "big")
            found += probes(message[at : at + length])
            at += length
        return found
    return [msgpack.unpackb(message[1:], raw=True)[b"SeqNo"]] if message[0] == PING else []


def answer_probes(key: bytes, task: dict[str, Any]) -> None:
    """Answer Serf's probes with coordinates that are no numbers, and be announced anew until there are enough."""
    nan, answered, announced = float("nan"), 0, time.monotonic()
    coordinate = bytes([1]) + encoded({"Vec": [nan] * 8, "Error": nan, "Adjustment": nan, "Height": float("inf")})
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gossip:
        gossip.bind(("", PORT))
        gossip.settimeout(0.2)
        while answered < task["answer"]:
            with suppress(TimeoutError):
                packet, sender = gossip.recvfrom(65536)
                for number in probes(crypto_aead_aes256gcm_decrypt(packet[13:], None, packet[1:13], key)):
                    reply = bytes([ACK]) + encoded({"SeqNo": number, "Payload": coordinate})
                    gossip.sendto(sealed(key, reply), sender)
                    answered += 1
            if time.monotonic() > announced + 1:
                # Whoever has answered too late is taken for dead, and lives again by a greater number.
                announced = time.monotonic()
                for _, fields in task["messages"]:
                    fields["incarnation"] += 1
                send(task, key)


def compressed_zeros(codes: int) -> bytes:
    """Give some 3800 zeros for each of these codes, as Go's compress/lzw reads them (LSB first, literals of 8 bits).

    The first 3838 codes stand for 1, 2, 3, … zeros. Then the table is full, and its last entry is repeated.
    """
    code, width, waiting, bits, out = 0, 9, 0, 0, bytearray()
    for number in range(codes):
        waiting, bits = waiting | code << bits, bits + width
        while bits >= 8:
            out.append(waiting & 255)
            waiting, bits = waiting >> 8, bits - 8
        code = min(LZW_FIRST + number, LZW_LAST)
        if width < 12 and code >= 1 << width:
            width += 1
    return bytes(out)


def stream(key: bytes, message: bytes) -> bytes:
    """Encrypt for TCP, where the type and the length are authenticated, too."""
    head = bytes([ENCRYPTED]) + (len(message) + 29).to_bytes(4, "big")
    return head + sealed(key, message, head)


def encoded(value: Any) -> bytes:
    return bytes(msgpack.packb(value, use_bin_type=False))


def sealed(key: bytes, message: bytes, head: bytes | None = None) -> bytes:
    """Encrypt as memberlist does."""
    nonce = os.urandom(12)
    return b"\x01" + nonce + bytes(crypto_aead_aes256gcm_encrypt(message, head, nonce, key))


def send(task: dict[str, Any], key: bytes | None) -> None:
    """Send each message to each target, by UDP."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number, (kind, fields) in enumerate(task["messages"]):
            message = pack(kind, fields)
            for target in task["targets"]:
                sender.sendto(sealed(key, message) if key else message, (target, PORT))
            if number % 50 == 49:
                time.sleep(0.05)  # what comes faster than it is read is dropped


def send_streams(task: dict[str, Any], key: bytes) -> None:
    """Send each message to each target that listens, by TCP."""
    for kind, fields in task.get("streams", []):
        message = stream(key, pack(kind, fields))
        for target in task["targets"]:
            with suppress(OSError), socket.create_connection((target, PORT), timeout=1) as sender:
                sender.sendall(message)


def main() -> None:
    task = json.load(sys.stdin)
    key = bytes.fromhex(task["key"]) if task["key"] else None
    until = time.monotonic() + task.get("seconds", 0)
    while True:
        send(task, key)
        if key is not None:
            send_streams(task, key)
        if time.monotonic() >= until:
            break
        time.sleep(0.1)
    if key is not None and "answer" in task:
        answer_probes(key, task)


if __name__ == "__main__":
    main()
