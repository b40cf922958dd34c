"""A guest of a few lines at the end of passt's cable: it answers ARP, speaks UDP and asks by DHCP.

Run as a program, it finds out what such a guest learns of name servers on this machine as it is:
tests run it in name spaces of its own.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time
from threading import Thread
from typing import NamedTuple

from pyvmm.host import passt

MAC = bytes.fromhex("5254000a0b0c")
GATEWAY_MAC = bytes.fromhex(passt._GATEWAY_MAC.replace(":", ""))
IPV4, ARP = b"\x08\x00", b"\x08\x06"
_PATIENCE = 60.0


class Datagram(NamedTuple):
    """A UDP payload, and the length of the frame around it."""

    source: str
    source_port: int
    port: int
    data: bytes
    frame: int


class Peer:
    """The guest. `cable` is what `passt.start` returns."""

    def __init__(self, cable: socket.socket) -> None:
        self._cable = cable
        cable.settimeout(_PATIENCE)
        self.send(arp_request(MAC))

    def close(self) -> None:
        self._cable.close()

    def send(self, frame: bytes) -> None:
        self._cable.sendall(struct.pack(">I", len(frame)) + frame)

    def send_udp(
        self, data: bytes, to: tuple[str, int], port: int, *, source: str = passt.GUEST
    ) -> None:
        """A datagram from our `port`."""
        addresses = socket.inet_aton(source) + socket.inet_aton(to[0])
        length = 8 + len(data)
        udp = struct.pack(">HHHH", port, to[1], length, 0) + data
        pseudo = addresses + struct.pack(">BBH", 0, 17, length)
        udp = udp[:6] + struct.pack(">H", _checksum(pseudo + udp) or 0xFFFF) + udp[8:]
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 1, 0, 64, 17, 0) + addresses
        head = head[:10] + struct.pack(">H", _checksum(head)) + head[12:]
        mac = b"\xff" * 6 if to[0] == "255.255.255.255" else GATEWAY_MAC
        self.send(mac + MAC + IPV4 + head + udp)

    def receive_udp(self, patience: float = _PATIENCE) -> Datagram | None:
        """The next one; None if none comes."""
        give_up_at = time.monotonic() + patience
        while (left := give_up_at - time.monotonic()) > 0:
            self._cable.settimeout(left)
            try:
                frame = self._frame()
            except TimeoutError:
                return None
            if frame[12:14] == ARP:
                self._answer_arp(frame)
            elif frame[12:14] == IPV4 and frame[23] == 17:
                udp = frame[14 + 4 * (frame[14] & 15) :]
                source, port = struct.unpack_from(">HH", udp)
                return Datagram(socket.inet_ntoa(frame[26:30]), source, port, udp[8:], len(frame))
        return None

    def dhcp(self) -> dict[int, bytes]:
        """The options of an offer, by number (RFC 2132, RFC 3397)."""
        wanted = bytes([53, 1, 1, 55, 5, 1, 3, 6, 15, 119, 255])
        ask = struct.pack(">BBBBIHH", 1, 1, 6, 0, 1, 0, 0) + bytes(16) + MAC + bytes(202)
        broadcast = ("255.255.255.255", 67)
        self.send_udp(ask + b"\x63\x82\x53\x63" + wanted, broadcast, 68, source="0.0.0.0")
        offer = self.receive_udp()
        assert offer is not None
        rest, options = offer.data[240:], {}
        while rest and rest[0] != 255:
            if rest[0]:
                options[rest[0]] = rest[2 : 2 + rest[1]]
                rest = rest[2 + rest[1] :]
            else:
                rest = rest[1:]
        return options

    def _frame(self) -> bytes:
        [length] = struct.unpack(">I", self._bytes(4))
        return self._bytes(length)

    def _bytes(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._cable.recv(size - len(data))
            assert part, "passt has gone"
            data += part
        return data

    def _answer_arp(self, frame: bytes) -> None:
        mine = socket.inet_aton(passt.GUEST)
        if frame[20:22] == b"\x00\x01" and frame[38:42] == mine:
            answer = struct.pack(">HHBBH", 1, 0x800, 6, 4, 2) + MAC + mine + frame[22:32]
            self.send(frame[6:12] + MAC + ARP + answer)


def arp_request(mac: bytes) -> bytes:
    """The guest asks for its gateway, by which passt learns the guest's address."""
    ask = struct.pack(">HHBBH", 1, 0x800, 6, 4, 1) + mac + socket.inet_aton(passt.GUEST)
    return b"\xff" * 6 + mac + ARP + ask + bytes(6) + socket.inet_aton(passt.GATEWAY)


def _checksum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def main(recent: list[str]) -> None:
    """Print, as JSON, what the guest is told by DHCP, and what becomes of a query of its."""
    if recent:
        passt.newer_by(lambda make: recent)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
        resolver.bind(("127.0.0.1", 53))

        def serve() -> None:
            while True:
                query, who = resolver.recvfrom(512)
                resolver.sendto(b"answer to " + query, who)

        Thread(target=serve, daemon=True).start()
        peer = Peer(passt.start([]))
        told = peer.dhcp()
        servers = [socket.inet_ntoa(told[6][n : n + 4]) for n in range(0, len(told.get(6, b"")), 4)]
        peer.send_udp(b"query", (passt.DNS, 53), 1234)
        answer = peer.receive_udp(_PATIENCE if passt.DNS in servers else 0.5)
        said = None if answer is None else [answer.source, answer.source_port, answer.data.decode()]
        search = told.get(119, b"").decode("latin-1")
        print(json.dumps({"servers": servers, "search": search, "answer": said}), flush=True)
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
