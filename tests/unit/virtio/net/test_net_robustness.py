"""Frames and buffers of a hostile driver, which hurt nobody."""

from __future__ import annotations

import random
import struct

import pytest
from net_rig import (
    ERR,
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    GSO_UDP_L4,
    HEADER,
    HOST_OFFLOADS,
    MAC,
    NEEDS_CSUM,
    OK,
    Cable,
    frame,
    header,
    running,
    wait_for,
)

from pyvmm.testing import illegal_chains
from pyvmm.testing.ring import Buffer

OUTSIDE = Buffer(1 << 40, 100)
LAST_PAGE = (4 << 20) - 50

# What the header of a frame of 200 bytes must not say.
BAD_HEADERS = {
    "checksum past the end": header(NEEDS_CSUM, 0, 0, 0, 34, 165),
    "checksum field half in": header(NEEDS_CSUM, 0, 0, 0, 199, 0),
    "checksum start past the end": header(NEEDS_CSUM, 0, 0, 0, 0xFFFF, 0),
    "checksum sum wraps 16 bits": header(NEEDS_CSUM, 0, 0, 0, 0xFFFF, 0xFFFF),
    "unknown gso_type": header(NEEDS_CSUM, 2, 54, 1448, 34, 16),
    "gso_type 6": header(NEEDS_CSUM, 6, 54, 1448, 34, 16),
    "gso_type 0x7f": header(NEEDS_CSUM, 0x7F, 54, 1448, 34, 16),
    "tunnel": header(NEEDS_CSUM, GSO_TCPV4 | 0x20, 54, 1448, 34, 16),
    "only ECN": header(NEEDS_CSUM, GSO_ECN, 54, 1448, 34, 16),
    "ECN with UDP": header(NEEDS_CSUM, GSO_UDP | GSO_ECN, 54, 1448, 34, 6),
    "segments of 0": header(NEEDS_CSUM, GSO_TCPV4, 54, 0, 34, 16),
    "segments without checksum": header(0, GSO_TCPV4, 54, 1448, 34, 16),
}
GOOD = {
    GSO_TCPV4: 1 << 11,
    GSO_TCPV6: 1 << 12,
    GSO_UDP: 1 << 14,
    GSO_UDP_L4: 1 << 56,
    GSO_TCPV4 | GSO_ECN: 1 << 13,
}


@pytest.mark.parametrize("head", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_s4_a_lying_header_sends_nothing(head: bytes) -> None:
    with running() as rig:
        assert rig.send(head + frame(200)) == 0
        assert rig.nothing_sent()
        assert sum(rig.device.sent[0].dropped.values()) == 1
        rig.assert_alive()


@pytest.mark.parametrize("gso_type", GOOD)
def test_segmentation_goes_through_only_where_it_was_negotiated(gso_type: int) -> None:
    head = header(NEEDS_CSUM, gso_type, 54, 1448, 34, 16)
    with running() as rig:
        rig.send(head + frame(60000))
        assert rig.sent() == (head, frame(60000))
    with running(without=GOOD[gso_type]) as rig:
        rig.send(head + frame(60000))
        assert rig.nothing_sent()


def test_no_offload_goes_through_without_csum() -> None:
    with running(without=HOST_OFFLOADS) as rig:
        rig.send(header(NEEDS_CSUM, 0, 0, 0, 34, 16) + frame(200))
        assert rig.nothing_sent()
        rig.assert_alive()


@pytest.mark.parametrize("size", [0, 1, 13, 65590, 70000, 1 << 20])
def test_s4_a_frame_of_an_impossible_size_is_dropped(size: int) -> None:
    with running(ram=16 << 20) as rig:
        parts = [bytes(65536)] * (size // 65536) + [bytes(size % 65536)]
        rig.send(header(), *filter(None, parts))
        assert rig.nothing_sent()
        rig.assert_alive()


@pytest.mark.parametrize("size", [1, 5, 11])
def test_row30_a_header_cut_short_is_dropped(size: int) -> None:
    with running() as rig:
        rig.send(bytes(size))
        rig.send(b"\0" * size, indirect=True)
        assert rig.nothing_sent()
        rig.assert_alive()


@pytest.mark.parametrize(
    "cut", [[12, 60], [1, 71], [11, 1, 60], [5, 7, 14, 46], [13, 59], [72], [1] * 72]
)
def test_row35_a_frame_may_be_cut_in_any_way(cut: list[int]) -> None:
    whole = header() + bytes(range(60))
    places = [sum(cut[:n]) for n in range(len(cut))]
    parts = [whole[at : at + length] for at, length in zip(places, cut, strict=True)]
    with running(queue_size=128) as rig:
        rig.send(*parts)
        assert rig.sent() == (header(), bytes(range(60)))


def test_row29_buffers_outside_of_ram_come_back_unused() -> None:
    with running() as rig:
        assert rig.send(OUTSIDE) == 0
        assert rig.send(header(), OUTSIDE) == 0
        assert rig.send(Buffer(LAST_PAGE, 100)) == 0
        chains = rig.offer(2048)
        bad = rig.driver.queues[0].add([], [OUTSIDE])
        rig.driver.queues[0].publish()
        rig.driver.kick(0)
        rig.inject(frame())
        assert rig.received(chains[0])[0] == HEADER + 60
        rig.inject(frame())
        assert rig.driver.mmio.wait_used(0, bad).written == 0
        rig.offer(2048)
        assert rig.nothing_sent()
        assert not rig.driver.needs_reset


def test_receive_buffers_without_room_or_without_a_writable_part_come_back_unused() -> None:
    with running() as rig:
        queue = rig.driver.queues[0]
        bad = [queue.add([], [1]), queue.add([], [11]), queue.add([b"readable"], [])]
        queue.publish()
        rig.driver.kick(0)
        for chain in bad:
            assert rig.driver.mmio.wait_used(0, chain).written == 0
        rig.assert_alive()


def test_row39_a_readable_part_of_a_receive_buffer_is_not_written() -> None:
    with running() as rig:
        queue = rig.driver.queues[0]
        chain = queue.add([b"do not touch"], [200])
        queue.publish()
        rig.driver.kick(0)
        rig.inject(frame(100))
        assert rig.received(chain)[1] == header(num_buffers=1) + frame(100)
        [readable] = chain.readable
        assert rig.driver.memory.read(*readable) == b"do not touch"


def test_row39_a_writable_part_of_a_frame_to_send_is_not_written() -> None:
    with running() as rig:
        answer = rig.driver.request([header() + frame()], [64], queue=1)
        assert answer.written == 0 and answer.buffers == bytes(64)
        assert rig.sent()[1] == frame()


@pytest.mark.parametrize("queue", [0, 1, 2], ids=["receive", "transmit", "control"])
@pytest.mark.parametrize("illegal", illegal_chains("split"), ids=str)
def test_an_illegal_chain_stops_the_card_or_is_contained(illegal: object, queue: int) -> None:
    with running() as rig:
        ring = rig.driver.queues[queue]
        illegal.offer(ring)  # type: ignore[attr-defined]
        rig.driver.kick(queue)
        if queue == 0:
            rig.inject(frame())
        if illegal.outcome == "refused":  # type: ignore[attr-defined]
            rig.driver.mmio.wait_needs_reset()
        rig.driver.restart()
        while not rig.nothing_sent():
            pass
        rig.driver.mmio.request(2, [bytes([0, 0, 1])], [1])
        rig.send(header() + frame(fill=0x33))
        assert rig.sent()[1] == frame(fill=0x33)


# --- the control queue ----------------------------------------------------------------------------

COMMANDS = {
    "unknown class": (9, 0, b"\1"),
    "class 255": (255, 255, b"\1"),
    "unknown command": (0, 6, b"\1"),
    "no data": (0, 0, b""),
    "a mode that is not a truth value": (0, 0, b"\2"),
    "two bytes for one": (0, 0, b"\1\0"),
    "VLAN, not offered": (2, 0, b"\1\0"),
    "announce, not offered": (3, 0, b""),
    "MQ, not offered": (4, 0, b"\1\0"),
    "RSS, not offered": (4, 1, bytes(60)),
    "MAC of 5 bytes": (1, 1, MAC[:5]),
    "MAC of 7 bytes": (1, 1, MAC + b"\0"),
    "MAC of a group": (1, 1, b"\1" + MAC[1:]),
    "table without tables": (1, 0, b""),
    "table with one": (1, 0, struct.pack("<L", 0)),
    "table that is cut": (1, 0, struct.pack("<L", 3) + MAC),
    "table of 2^32 - 1": (1, 0, struct.pack("<L", 0xFFFF_FFFF) + MAC),
    "table whose size wraps": (1, 0, struct.pack("<L", 0x2AAA_AAAB) + bytes(8)),
    "something behind the tables": (1, 0, bytes(9)),
    "offloads of 7 bytes": (5, 0, bytes(7)),
    "offloads not offered": (5, 0, b"\xff" * 8),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_command_is_an_error_and_changes_nothing(command: tuple[int, int, bytes]) -> None:
    with running() as rig:
        before = (rig.device._filter, list(rig.cable.offloads_set), list(rig.cable.active))
        assert rig.command(*command) == ERR
        after = (rig.device._filter, list(rig.cable.offloads_set), list(rig.cable.active))
        assert after == before
        rig.assert_alive()


def test_commands_cut_in_any_way_and_without_room_for_an_answer() -> None:
    with running() as rig:
        request, queue = rig.driver.request, rig.control_queue
        assert request([b"\0", b"\0", b"\1"], [1], queue=queue).data == bytes([OK])
        assert request([b"\0\0\1"], [16], queue=queue).data == bytes([OK])
        assert request([b"\0\0\1"], [], queue=queue).written == 0
        assert request([b"\0"], [1], queue=queue).data == bytes([ERR])
        assert request([], [1], queue=queue).data == bytes([ERR])
        assert request([OUTSIDE], [1], queue=queue).data == bytes([ERR])
        chain = rig.driver.queues[queue].add([b"\0\0\1"], [OUTSIDE])
        rig.driver.queues[queue].publish()
        rig.driver.kick(queue)
        assert rig.driver.mmio.wait_used(queue, chain).written == 0
        assert not rig.driver.needs_reset


def test_a_huge_command_is_not_copied() -> None:
    with running(ram=16 << 20) as rig:
        answer = rig.driver.request([b"\1\0", Buffer(0, 8 << 20)], [1], queue=2)
        assert answer.data == bytes([ERR])


def test_more_addresses_than_are_kept_let_all_of_a_kind_through() -> None:
    with running() as rig:
        many = b"".join(b"\2" + struct.pack(">LB", n, 0) for n in range(2000))
        data = struct.pack("<L", 2000) + many + struct.pack("<L", 0)
        assert rig.command(1, 0, data) == OK
        rig.expect(frame(to=b"\x02zzzzz"))


def test_a_transmit_flood_is_sent_in_order_and_waits_for_the_cable() -> None:
    with running(queue_size=256, ram=8 << 20) as rig:
        queue = rig.driver.queues[1]
        chains = [queue.add([header() + frame(fill=n)], []) for n in range(250)]
        queue.publish()
        rig.driver.kick(1)
        for n in range(250):  # more than the cable holds: the rest waits in the ring
            assert rig.sent()[1] == frame(fill=n)
        for chain in chains:
            rig.driver.mmio.wait_used(1, chain)


def test_random_headers_and_commands_never_need_a_reset() -> None:
    chance = random.Random(1)
    with running(Cable(2), ram=16 << 20) as rig:
        for _ in range(400):
            rig.send(chance.randbytes(12) + frame(chance.randrange(14, 300)))
            rig.driver.request([chance.randbytes(chance.randrange(1, 40))], [1], queue=4)
            while not rig.nothing_sent():
                pass
        assert not rig.driver.needs_reset
        assert len(rig.device.sent[0].dropped) <= 8, "reasons are a few fixed texts"
        wait_for(lambda: rig.device.link_up)
