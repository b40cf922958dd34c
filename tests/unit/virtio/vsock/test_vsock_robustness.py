"""A hostile guest's packets and buffers on a socket device: rows of docs/robustness.md.

After each the device must still serve; nobody's memory grows by what a guest does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from mmio_harness import wait_for
from vsock_rig import (
    CID,
    GUEST_PORT,
    HOST_PORT,
    MIB,
    Rig,
    guest_packet,
    read_all,
    read_exactly,
    read_line,
    running,
)

from pyvmm.testing import Buffer
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT
from pyvmm.testing.vsock_driver import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    EVENT,
    HEADER,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    RX,
    SEQPACKET,
    SHUTDOWN,
    TX,
    Packet,
)
from pyvmm.virtio.vsock import switch
from pyvmm.virtio.vsock.stream import BUF_ALLOC

BAD = {
    "outside": Buffer(0x8000_0000, 64),
    "straddles the hole": Buffer(16 * MIB - 32, 64),
    "wraps 2^64": Buffer(2**64 - 32, 64),
}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with running(tmp_path) as made:
        yield made
        made.assert_alive()


def is_reset(packet: Packet) -> bool:
    return (packet.op, packet.src_port, packet.dst_port) == (RST, HOST_PORT, GUEST_PORT)


# --- headers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cid", [0, 1, 2, 4, CID | 1 << 32, 2**64 - 1])
def test_v1_a_source_that_is_not_the_guest(rig: Rig, cid: int) -> None:
    with rig.dial() as host:
        rig.guest.send(guest_packet(RW, data=b"forged", src_cid=cid))
        rig.guest.send(guest_packet(RW, data=b"real"))
        assert read_exactly(host, 4) == b"real"
    assert any("dropped" in line for line in rig.lines)


@pytest.mark.parametrize("cid", [0, 1, 3, 4, 2 | 1 << 32, 2**64 - 1])
def test_v1_a_destination_that_is_not_the_host(rig: Rig, cid: int) -> None:
    with rig.listen() as listener:
        rig.guest.send(guest_packet(REQUEST, dst_cid=cid))
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert not rig.guest.has_packet()


@pytest.mark.parametrize("type", [0, SEQPACKET, 3, 0xFFFF])
def test_v2_an_unknown_type(rig: Rig, type: int) -> None:
    rig.guest.send(guest_packet(REQUEST, type=type))
    assert is_reset(rig.guest.receive())
    with rig.dial() as host:
        rig.guest.send(guest_packet(RW, data=b"x", type=type))
        assert is_reset(rig.guest.receive())
        assert read_all(host) == b""
    rig.guest.send(guest_packet(RST, type=type))  # a reset is not reset in turn
    assert not rig.guest.has_packet()


@pytest.mark.parametrize("op", [0, 8, 0xFFFF])
def test_v3_an_unknown_operation(rig: Rig, op: int) -> None:
    rig.guest.send(guest_packet(op))
    assert is_reset(rig.guest.receive())
    with rig.dial() as host:
        rig.guest.send(guest_packet(op))
        assert is_reset(rig.guest.receive())
        assert read_all(host) == b""


@pytest.mark.parametrize("op", [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST])
def test_v4_an_operation_without_a_stream(rig: Rig, op: int) -> None:
    rig.guest.send(guest_packet(op))
    assert is_reset(rig.guest.receive())


@pytest.mark.parametrize("op", [REQUEST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST])
def test_v4_an_operation_before_the_response(rig: Rig, op: int) -> None:
    with rig.client(b"CONNECT 80\n") as client:
        request = rig.guest.receive()
        rig.guest.answer(request, op)
        assert rig.guest.receive().op == RST
        assert read_line(client) == b""


def test_v4_a_reset_without_a_stream_is_not_answered(rig: Rig) -> None:
    rig.guest.send(guest_packet(RST))
    assert not rig.guest.has_packet()


@pytest.mark.parametrize("op", [SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST])
def test_v4_an_operation_before_our_response_has_gone_out(tmp_path: Path, op: int) -> None:
    with running(tmp_path, receive_buffers=0) as rig, rig.listen() as listener:
        rig.guest.send(guest_packet(REQUEST))
        host, _ = listener.accept()
        rig.guest.send(guest_packet(op))
        rig.guest.offer(4)
        assert is_reset(rig.guest.receive())
        host.settimeout(SAFETY_TIMEOUT)
        assert read_all(host) == b""
        host.close()
        rig.assert_alive()


@pytest.mark.parametrize("op", [REQUEST, RESPONSE])
def test_v5_a_port_that_is_in_use(rig: Rig, op: int) -> None:
    with rig.dial() as host, rig.listen() as listener:
        rig.guest.send(guest_packet(op))
        assert is_reset(rig.guest.receive())
        assert read_all(host) == b""
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_v6_a_payload_shorter_than_it_says(rig: Rig) -> None:
    for length in (5, 1 << 16, 2**32 - 1):
        with rig.dial() as host:
            rig.guest.send(guest_packet(RW, data=b"1234", len=length))
            assert is_reset(rig.guest.receive())
            assert read_all(host) == b""


def test_v6_a_buffer_longer_than_the_payload_is_lawful(rig: Rig) -> None:
    with rig.dial() as host:
        rig.guest.send(guest_packet(RW, data=b"1234rest", len=4))
        rig.guest.send(guest_packet(RW, data=b""))
        rig.guest.send(guest_packet(RW, data=b"5"))
        assert read_exactly(host, 5) == b"12345"


def test_v6_a_payload_on_an_operation_without_one_is_ignored(rig: Rig) -> None:
    with rig.dial() as host:
        rig.guest.send(guest_packet(CREDIT_UPDATE, data=b"not for you"))
        rig.guest.send(guest_packet(CREDIT_UPDATE, len=2**32 - 1))
        rig.guest.send(guest_packet(RW, data=b"this"))
        assert read_exactly(host, 4) == b"this"


def test_v7_more_than_the_credit(rig: Rig) -> None:
    with rig.dial() as host:
        sent = rig.fill()
        rig.guest.send(guest_packet(RW, data=bytes(1 << 15)))
        assert is_reset(rig.guest.receive())
        # What had been sent lawfully and was out already can be read; the stream is over.
        received = read_all(host)
        assert sent.startswith(received) and len(received) < len(sent)


def test_v7_a_packet_larger_than_the_whole_buffer(rig: Rig) -> None:
    with rig.dial() as host:
        rig.guest.send(guest_packet(RW, data=bytes(BUF_ALLOC + 1)))
        assert is_reset(rig.guest.receive())
        assert read_all(host) == b""


def test_v8_data_after_the_guest_was_done(rig: Rig) -> None:
    with rig.dial() as host:
        rig.guest.send(guest_packet(SHUTDOWN, flags=0xFFFF_FFFE))  # all but "receive no more"
        rig.guest.send(guest_packet(RW, data=b"more"))
        assert is_reset(rig.guest.receive())
        assert read_all(host) == b""


# --- buffers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_v9_a_packet_outside_ram(rig: Rig, bad: Buffer) -> None:
    assert rig.guest.send_raw([bad]) == 0
    with rig.dial() as host:
        header = guest_packet(RW, len=64).pack_header(CID)
        assert rig.guest.send_raw([header, bad]) == 0
        assert is_reset(rig.guest.receive())
        assert read_all(host) == b""


@pytest.mark.parametrize("size", [0, 1, HEADER.size - 1])
def test_v9_a_packet_shorter_than_a_header(rig: Rig, size: int) -> None:
    assert rig.guest.send_raw([bytes(size) or Buffer(0, 0)]) == 0
    assert not rig.guest.has_packet()


def test_v9_a_header_in_pieces_is_lawful(rig: Rig) -> None:
    with rig.dial() as host:
        raw = guest_packet(RW, data=b"12345").pack_header(CID) + b"12345"
        rig.guest.send_raw([raw[:1], raw[1:43], raw[43:46], raw[46:]])
        assert read_exactly(host, 5) == b"12345"


@pytest.mark.parametrize(
    "bad",
    [*([one] for one in BAD.values()), [HEADER.size - 1], [Buffer(0, 0)], [1]],
    ids=[*BAD, "short", "empty", "one byte"],
)
def test_v10_a_receive_buffer_that_is_no_good(tmp_path: Path, bad: list[int | Buffer]) -> None:
    """It comes back unused, and the packet goes into the next one."""
    with running(tmp_path, receive_buffers=0) as rig:
        chain = rig.guest.offer_raw(bad)
        rig.guest.offer(4)
        rig.guest.send(guest_packet(REQUEST))
        assert rig.driver.wait_used(RX, chain).written == 0
        assert is_reset(rig.guest.receive())
        rig.assert_alive()


def test_v10_a_receive_buffer_without_room_for_data(tmp_path: Path) -> None:
    with running(tmp_path, receive_buffers=1) as rig, rig.dial() as host:
        host.sendall(b"x")
        assert rig.guest.receive().data == b"x"
        chain = rig.guest.offer_raw([HEADER.size])
        host.sendall(b"y")
        assert rig.guest.receive().data == b"y"
        assert rig.driver.wait_used(RX, chain).written == 0


def test_v11_no_receive_buffers_at_all(tmp_path: Path) -> None:
    """The transmit queue goes on until there is no place for another answer, then waits."""
    with running(tmp_path, receive_buffers=0, queue_sizes=(256, 256, 16)) as rig:
        header = guest_packet(RW).pack_header(CID)
        for _ in range(switch.MAX_REPLIES):
            rig.guest.send_raw([header])
        chain = rig.driver.submit(TX, [header])
        rig.driver.kick(TX)
        assert not rig.driver.queues[TX].has_used()
        rig.guest.offer(8)
        assert rig.driver.wait_used(TX, chain).written == 0
        for _ in range(switch.MAX_REPLIES + 1):
            assert is_reset(rig.guest.receive())


def test_v12_more_streams_than_there_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switch, "MAX_STREAMS", 4)
    with running(tmp_path) as rig, rig.listen() as listener:
        hosts = []
        for port in range(4):
            rig.guest.send(Packet(REQUEST, port, HOST_PORT))
            assert rig.guest.receive().op == RESPONSE
            hosts.append(listener.accept()[0])
        rig.guest.send(Packet(REQUEST, 4, HOST_PORT))
        assert rig.guest.receive().op == RST
        # A client of the host waits outside until there is room, and that is said.
        with rig.client(b"CONNECT 80\n"):
            wait_for(lambda: any("4 streams at once" in line for line in rig.lines))
            rig.guest.send(Packet(RST, 0, HOST_PORT))
            assert rig.guest.receive().dst_port == 80
        for host in hosts:
            host.close()


def test_v12_clients_that_say_nothing_take_their_place_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switch, "MAX_STREAMS", 3)
    with running(tmp_path) as rig:
        silent = [rig.client() for _ in range(3)]
        with rig.client(b"CONNECT 80\n"):
            silent[0].close()
            assert rig.guest.receive().dst_port == 80
        for client in silent:
            client.close()


@pytest.mark.parametrize("whose", ["request", "shutdown"])
def test_v13_a_guest_that_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    monkeypatch.setattr(switch, "ANSWER_SECONDS", 0.05)
    with running(tmp_path) as rig:
        if whose == "request":
            client = rig.client(b"CONNECT 80\n")
            assert rig.guest.receive().op == REQUEST
            assert read_line(client) == b""
        else:
            client = rig.dial()
            client.close()
            assert rig.guest.receive().op == SHUTDOWN
        assert rig.guest.receive().op == RST
        client.close()


# --- queues --------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", [RX, TX, EVENT])
def test_row26_a_head_that_is_no_descriptor(tmp_path: Path, queue: int) -> None:
    with running(tmp_path) as rig:
        host = rig.dial()
        ring = rig.driver.queues[queue]
        ring.offer(ring.size)
        ring.publish()
        if queue == EVENT:
            rig.device.interrupt_streams()
        else:
            host.sendall(bytes(20 * 4096))  # uses up the good receive buffers
        rig.driver.kick(queue)
        rig.driver.wait_needs_reset()
        assert read_line(host) == b""  # nothing will come any more
        host.close()
        rig.driver.reset()
        rig.guest.forget()
        rig.driver.start()
        rig.guest.offer(4)
        rig.assert_alive()


def test_row19_missing_queues_are_not_missed(tmp_path: Path) -> None:
    """A driver that sets up no receive queue gets nothing, and costs nothing."""
    with running(tmp_path, queue_sizes=(0, 16, 0), receive_buffers=0) as rig:
        rig.guest.send(guest_packet(REQUEST))
        rig.device.interrupt_streams()
        with rig.client(b"CONNECT 80\n"):
            rig.guest.send(guest_packet(RW))
        assert not rig.driver.needs_reset


def test_row18_a_queue_that_was_stopped(rig: Rig) -> None:
    with rig.dial() as host:
        rig.driver.write(0x030, TX)
        rig.driver.write(0x044, 0)
        chain = rig.driver.queues[TX].add([guest_packet(RW, data=b"x").pack_header(CID)])
        rig.driver.queues[TX].publish()
        rig.driver.kick(TX)
        host.sendall(b"still received")
        assert rig.guest.receive().data == b"still received"
        assert not rig.driver.queues[TX].has_used(), chain
    rig.driver.reset()
    rig.guest.forget()
    rig.driver.start()
    rig.guest.offer(4)


def test_fuzzed_packets(rig: Rig) -> None:
    """Headers of odd and even values in any order: answers come, and the device lives."""
    numbers = random.Random(5)
    ports = [0, 1, HOST_PORT, 80, 2**32 - 1]
    listeners = [rig.listen(port) for port in ports[:3]]
    clients = [rig.client(b"CONNECT 80\n") for _ in range(3)]
    for _ in range(600):
        packet = Packet(
            numbers.choice([*range(9), numbers.randrange(1 << 16)]),
            numbers.choice(ports),
            numbers.choice(ports),
            data=bytes(numbers.choice([0, 1, 100])),
            flags=numbers.choice([0, 1, 2, 3, 2**32 - 1]),
            buf_alloc=numbers.choice([0, 1, 1 << 16, 2**32 - 1]),
            fwd_cnt=numbers.choice([0, 1, 2**31, 2**32 - 1]),
            type=numbers.choice([1, 1, 1, 1, 0, 2]),
            len=numbers.choice([None, None, 0, 99, 2**32 - 1]),
        )
        rig.guest.send(packet)
        while rig.guest.has_packet():
            rig.guest.receive()
    for sock in (*listeners, *clients):
        sock.close()
