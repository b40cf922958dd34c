"""virtio-net under the fuzzer; at the other end of its cable, a socket pair, a host makes noise."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from random import Random

import net_rig
from fuzz.request import Request, pieces

from pyvmm.testing import Buffer, MmioDriver
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.net.device import NetDevice

SIZES = (0, 1, 13, 14, 60, 60, 1514, 1515, 9000, 65535, 70000)
RX, TX, CONTROL = 0, 1, 2
MOST_WAITING = 100  # more frames than a host sends in a case


def look_at(event: object) -> None:
    str(event)


class Card(NetDevice):
    """A network card that knows its cable."""

    cable: net_rig.Cable


@contextmanager
def make(rng: Random, pairs: int = 1) -> Iterator[VirtioDevice]:
    """With several pairs it is traced as well."""
    cable = net_rig.Cable(pairs)
    for end in cable.ends:
        end.setblocking(False)
    trace = None if pairs == 1 else look_at
    card = Card(cable, name="fuzzed", mac=net_rig.MAC, log=lambda line: None, trace=trace)
    card.cable = cable
    try:
        yield card
    finally:
        cable.close()


def header(rng: Random) -> bytes:
    """A struct virtio_net_hdr: nothing asked for, or something."""
    if rng.random() < 0.4:
        return net_rig.header()
    small = (0, 0, 1, 14, 34, 54, 1448, 0xFFFF)
    return net_rig.header(
        rng.choice((0, 1, 1, 2, 0xFF)),
        rng.choice((0, 1, 3, 4, 5, 0x81, 0xFF)),
        *(rng.choice(small) for _ in range(4)),
        num_buffers=rng.choice((0, 1, 0xFFFF)),
    )


def request(rng: Random) -> Request:
    kind = rng.randrange(6)
    if kind < 2:
        return Request(RX, [], [len(part) for part in pieces(rng, bytes(rng.choice(SIZES)))])
    if kind < 5:
        to = rng.choice((net_rig.MAC, net_rig.BROADCAST, net_rig.OTHER))
        data = header(rng) + net_rig.frame(rng.choice(SIZES), to)
        return Request(TX, pieces(rng, data), [])
    return Request(CONTROL, pieces(rng, _command(rng)), [rng.choice((0, 1, 1, 2))])


def begin(rng: Random) -> list[Request]:
    """Buffers to receive in, and a choice of what is received."""
    sizes = [rng.choice((60, 1526, 1526, 1526, 4096, 65550)) for _ in range(rng.randrange(9))]
    return [*(Request(RX, [], [size]) for size in sizes), Request(TX, [net_rig.header()], [])]


PAIRS = 3


def make_pairs(rng: Random) -> AbstractContextManager[VirtioDevice]:
    return make(rng, PAIRS)


def request_of_pairs(rng: Random) -> Request:
    """The same in one of the pairs."""
    found = request(rng)
    pair = rng.randrange(PAIRS)
    return found._replace(queue=2 * PAIRS if found.queue == CONTROL else found.queue + 2 * pair)


def _command(rng: Random) -> bytes:
    """5.1.6.5 Control Virtqueue: class, command and what it takes; or whatever."""
    if rng.random() < 0.6:
        table = b"".join(
            struct.pack("<L", count) + net_rig.OTHER * count
            for count in (rng.choice((0, 1, 3)), rng.choice((0, 2, 50)))
        )
        fits: tuple[tuple[int, int, bytes], ...] = (
            *((0, mode, bytes([rng.randrange(2)])) for mode in range(6)),
            (1, 0, table),
            (1, 1, rng.choice((net_rig.MAC, net_rig.OTHER))),
            (4, 0, struct.pack("<H", rng.choice((1, 1, 2, 3, 4)))),
            (5, 0, struct.pack("<Q", rng.choice((0, 2, 2 | 1 << 7, 1 << 7, rng.getrandbits(16))))),
        )
        kind, command, body = rng.choice(fits)
        return bytes([kind, command]) + body
    body = rng.choice(
        (
            b"", b"\0", b"\1", bytes(6), net_rig.OTHER, struct.pack("<H", 1), struct.pack("<Q", 1),
            struct.pack("<L", 1) + net_rig.OTHER + struct.pack("<L", 0xFFFF_FFFF),
            rng.randbytes(20),
        )
    )  # fmt: skip
    return bytes([rng.randrange(7), rng.randrange(4)]) + body


def stir(device: VirtioDevice, rng: Random) -> None:
    """The host sends a frame or two, and takes some."""
    assert isinstance(device, Card)
    send_and_take(device, device.cable.ends, rng)


def send_and_take(device: NetDevice, ends: Sequence[socket.socket], rng: Random) -> None:
    """One of the other ends does."""
    end = rng.choice(ends)
    if len(ends) > 1 and not rng.randrange(8):
        device.set_link(rng.random() < 0.7)
    with suppress(BlockingIOError):
        for _ in range(rng.choice((0, 0, 1, 2))):
            to = rng.choice((net_rig.MAC, net_rig.BROADCAST, net_rig.GROUP, net_rig.OTHER))
            end.send(header(rng) + net_rig.frame(rng.choice(SIZES[2:9]), to))
        for _ in range(rng.choice((0, 0, 1, 100))):
            end.recv(1 << 17)


def check(device: VirtioDevice, driver: MmioDriver) -> None:
    assert isinstance(device, Card)
    end = device.cable.ends[0]
    device.set_link(True)
    with suppress(BlockingIOError):
        while True:
            end.recv(1 << 17)
    hello = net_rig.frame(fill=0x11)
    driver.request(TX, [net_rig.header() + hello], [])
    sent = [end.recv(1 << 17)]
    with suppress(BlockingIOError):  # what the driver before had sent, and was kept
        while True:
            sent.append(end.recv(1 << 17))
    assert any(one[net_rig.HEADER :] == hello for one in sent)
    answer = net_rig.frame(fill=0x22)
    place = Buffer(driver.arena.alloc(70_000), 70_000)
    for _ in range(MOST_WAITING):  # frames of the time before come first
        with suppress(BlockingIOError):
            end.send(net_rig.header() + answer)
        chain = driver.submit(RX, [], [place])
        driver.kick(RX)
        used = driver.wait_used(RX, chain)
        if driver.queues[RX].contents(chain)[net_rig.HEADER : used.written] == answer:
            return
    raise AssertionError("the frame never came")
