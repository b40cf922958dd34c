"""Streams between a guest and programs of the host, through registers, rings and Unix sockets."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest
from mmio_harness import wait_for
from vsock_rig import (
    GUEST_PORT,
    HOST_PORT,
    Rig,
    guest_packet,
    read_all,
    read_exactly,
    read_line,
    running,
)

from pyvmm.testing.mock_driver import Buffer, Chain
from pyvmm.testing.vsock_driver import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    EVENT,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    RX,
    SHUTDOWN,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    Packet,
)
from pyvmm.virtio.features import ring_features
from pyvmm.virtio.queue.ring import Ring
from pyvmm.virtio.vsock.packet import HEADER
from pyvmm.virtio.vsock.stream import BUF_ALLOC

BOTH = SHUTDOWN_RECEIVE | SHUTDOWN_SEND


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with running(tmp_path) as made:
        yield made
        made.assert_alive()


def test_a_guest_reaches_a_listener_of_the_host(rig: Rig) -> None:
    with rig.dial() as host:
        rig.guest.send(guest_packet(RW, data=b"from the guest"))
        assert read_exactly(host, 14) == b"from the guest"
        host.sendall(b"from the host")
        packet = rig.guest.receive()
        assert (packet.op, packet.data, packet.len) == (RW, b"from the host", 13)
        assert (packet.src_cid, packet.dst_cid) == (2, 3)
        assert (packet.src_port, packet.dst_port) == (HOST_PORT, GUEST_PORT)


def test_a_program_of_the_host_reaches_a_listener_of_the_guest(rig: Rig) -> None:
    client, request = rig.call(80)
    with client:
        client.sendall(b"hello")
        assert rig.guest.receive().data == b"hello"
        rig.guest.answer(request, RW, data=b"you too")
        assert read_exactly(client, 7) == b"you too"


def test_what_a_client_sends_after_its_command_belongs_to_the_stream(rig: Rig) -> None:
    with rig.client(b"CONNECT 80\nGET /") as client:
        request = rig.guest.receive()
        rig.guest.answer(request, RESPONSE)
        assert rig.guest.receive().data == b"GET /"
        assert read_line(client).startswith(b"OK ")


def test_a_command_may_come_in_pieces_and_end_in_a_carriage_return(rig: Rig) -> None:
    with rig.client(b"CONN") as client:
        client.sendall(b"ECT 80")
        client.sendall(b"\r\n")
        assert rig.guest.receive().dst_port == 80


@pytest.mark.parametrize(
    "command",
    [
        b"HELLO\n",
        b"\n",
        b"CONNECT\n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 80 81\n",
        b"CONNECT " + b"0" * 40,
        b"GET / HTTP/1.0",
    ],
)
def test_s5_a_client_that_says_something_else_is_turned_away(rig: Rig, command: bytes) -> None:
    with rig.client(command) as client:
        assert read_line(client) == b""
        assert not rig.guest.has_packet()


def test_a_guest_without_a_listener_closes_the_client(rig: Rig) -> None:
    with rig.client(b"CONNECT 80\n") as client:
        rig.guest.answer(rig.guest.receive(), RST)
        assert read_line(client) == b""


def test_a_host_without_a_listener_resets_the_guest(rig: Rig) -> None:
    rig.guest.send(guest_packet(REQUEST))
    answer = rig.guest.receive()
    assert (answer.op, answer.src_port, answer.dst_port) == (RST, HOST_PORT, GUEST_PORT)


def test_clients_that_come_before_the_driver_wait_for_it(tmp_path: Path) -> None:
    with running(tmp_path, start=False) as rig, rig.client(b"CONNECT 80\n") as client:
        rig.driver.start()
        rig.guest.offer(4)
        rig.guest.answer(rig.guest.receive(), RESPONSE)
        assert read_line(client).startswith(b"OK ")


def test_a_client_that_leaves_before_its_answer_ends_the_stream(rig: Rig) -> None:
    with rig.client(b"CONNECT 80\n"):
        request = rig.guest.receive()
    rig.guest.answer(request, RESPONSE)
    assert rig.guest.receive().op == SHUTDOWN


# --- ends ----------------------------------------------------------------------------------------


def test_the_host_half_closes(rig: Rig) -> None:
    with rig.dial() as host:
        host.sendall(b"last")
        host.shutdown(socket.SHUT_WR)
        assert rig.guest.receive().data == b"last"
        done = rig.guest.receive()
        assert (done.op, done.flags) == (SHUTDOWN, SHUTDOWN_SEND)
        rig.guest.send(guest_packet(RW, data=b"the answer"))
        assert read_exactly(host, 10) == b"the answer"
        rig.guest.send(guest_packet(SHUTDOWN, flags=BOTH))
        assert rig.guest.receive().op == RST
        assert host.recv(1) == b""


def test_the_guest_half_closes(rig: Rig) -> None:
    with rig.dial() as host:
        rig.guest.send(guest_packet(RW, data=b"last"))
        rig.guest.send(guest_packet(SHUTDOWN, flags=SHUTDOWN_SEND))
        assert read_exactly(host, 4) == b"last"
        assert host.recv(1) == b""
        host.sendall(b"the answer")
        assert rig.guest.receive().data == b"the answer"


def test_the_guest_will_receive_no_more(rig: Rig) -> None:
    with rig.dial() as host:
        rig.guest.send(guest_packet(SHUTDOWN, flags=SHUTDOWN_RECEIVE))
        wait_for(lambda: refuses(host))
        rig.guest.send(guest_packet(RW, data=b"still here"))
        assert read_exactly(host, 10) == b"still here"


def refuses(host: socket.socket) -> bool:
    try:
        host.send(b"x")
    except BrokenPipeError:
        return True
    return False


def test_hints_of_a_shutdown_add_up(rig: Rig) -> None:
    with rig.dial() as host:
        rig.guest.send(guest_packet(SHUTDOWN, flags=SHUTDOWN_SEND))
        rig.guest.send(guest_packet(SHUTDOWN, flags=0))
        rig.guest.send(guest_packet(SHUTDOWN, flags=SHUTDOWN_RECEIVE))
        while (packet := rig.guest.receive()).op != RST:
            assert packet.op == SHUTDOWN
        assert host.recv(1) == b""


def test_the_host_closes(rig: Rig) -> None:
    with rig.dial() as host:
        host.sendall(b"last")
    assert rig.guest.receive().data == b"last"
    done = rig.guest.receive()
    assert (done.op, done.flags) == (SHUTDOWN, BOTH)
    rig.guest.send(guest_packet(RST))
    rig.guest.send(guest_packet(CREDIT_UPDATE))  # the stream is gone
    assert rig.guest.receive().op == RST


def test_the_guest_resets(rig: Rig) -> None:
    with rig.dial() as host:
        rig.guest.send(guest_packet(RST))
        assert host.recv(1) == b""
    assert not rig.guest.has_packet()  # RST is not answered


def test_what_the_guest_sent_before_it_closed_reaches_a_slow_reader(rig: Rig) -> None:
    with rig.dial() as host:
        sent = rig.fill()
        rig.guest.send(guest_packet(SHUTDOWN, flags=BOTH))
        assert rig.guest.receive().op == RST
        # The port is free again, though the old stream's data is not out yet.
        rig.guest.send(guest_packet(REQUEST))
        assert rig.guest.receive().op == RST
        assert read_all(host) == sent


# --- credit: 5.10.6.3 Buffer Space Management ----------------------------------------------------


def test_data_for_the_guest_waits_for_its_credit(rig: Rig) -> None:
    with rig.dial(buf_alloc=10) as host:
        host.sendall(b"0123456789abcdef")
        assert rig.guest.receive().data == b"0123456789"
        assert rig.guest.receive().op == CREDIT_REQUEST
        rig.guest.send(guest_packet(CREDIT_UPDATE, buf_alloc=10, fwd_cnt=4))
        assert rig.guest.receive().data == b"abcd"
        assert rig.guest.receive().op == CREDIT_REQUEST
        rig.guest.send(guest_packet(CREDIT_UPDATE, buf_alloc=10, fwd_cnt=14))
        assert rig.guest.receive().data == b"ef"


def test_a_guest_without_credit_is_asked_once(rig: Rig) -> None:
    with rig.dial(buf_alloc=0) as host:
        host.sendall(b"x")
        assert rig.guest.receive().op == CREDIT_REQUEST
        host.sendall(b"y")
        rig.assert_alive()  # takes what comes next: an answer to a packet of its own
        rig.guest.send(guest_packet(CREDIT_UPDATE, buf_alloc=2))
        assert rig.guest.receive().data == b"xy"


@pytest.mark.parametrize(("buf_alloc", "fwd_cnt"), [(0, 1), (100, 101), (2**32 - 1, 2**31), (0, 0)])
def test_impossible_credit_stops_only_its_own_stream(
    rig: Rig, buf_alloc: int, fwd_cnt: int
) -> None:
    with rig.dial(buf_alloc=buf_alloc, fwd_cnt=fwd_cnt) as host:
        host.sendall(b"x")
        packet = rig.guest.receive()
        assert packet.op in (RW, CREDIT_REQUEST)
        client, _ = rig.call(99)
        client.close()
        assert rig.guest.receive().op == SHUTDOWN


def test_the_guest_hears_when_there_is_room_again(rig: Rig) -> None:
    with rig.dial() as host:
        reader = threading.Thread(target=read_all, args=(host,))
        reader.start()
        credit, sent = BUF_ALLOC, 0
        data = bytes(1 << 15)
        for _ in range(64):  # 2 MiB, as far as the device's word goes
            while sent + len(data) > credit:
                packet = rig.guest.receive()
                assert packet.op == CREDIT_UPDATE
                credit = packet.fwd_cnt + packet.buf_alloc
            rig.guest.send(guest_packet(RW, data=data))
            sent += len(data)
        rig.guest.send(guest_packet(SHUTDOWN, flags=BOTH))
        reader.join()
        while rig.guest.receive().op != RST:
            pass


def test_a_credit_request_is_answered(rig: Rig) -> None:
    with rig.dial():
        rig.guest.send(guest_packet(RW, data=b"12345"))
        rig.guest.send(guest_packet(CREDIT_REQUEST))
        answer = rig.guest.receive()
        assert (answer.op, answer.buf_alloc, answer.fwd_cnt) == (CREDIT_UPDATE, BUF_ALLOC, 5)


def test_a_large_transfer_both_ways_at_once(rig: Rig) -> None:
    data = os.urandom(3 << 20)
    received = bytearray()
    with rig.dial() as host:
        writer = threading.Thread(target=host.sendall, args=(data,))
        writer.start()
        while len(received) < len(data):
            packet = rig.guest.receive()
            received += packet.data
            if packet.op == RW:
                echo = guest_packet(CREDIT_UPDATE, fwd_cnt=len(received))
                rig.guest.send(echo)
        writer.join()
    assert received == data


@contextmanager
def waiting(folder: Path, data: bytes, *, packed: bool) -> Iterator[Rig]:
    """A stream whose host has sent `data` and closed it, to a guest that has given neither credit
    nor receive buffers yet."""
    with running(folder, start=False) as rig:
        rig.device.features |= ring_features(packed=packed)
        rig.driver.start()
        rig.guest.offer(1)
        with rig.dial(buf_alloc=0) as host:
            host.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            host.sendall(data)
        assert rig.guest.receive_and_keep().op == CREDIT_REQUEST
        yield rig


FORMS: list[list[int | Buffer]] = [
    *([HEADER.size, 4096] for _ in range(5)),
    [HEADER.size + 4052],
    [20, HEADER.size - 20, 4096],
    [HEADER.size, 96, 4000],
    [HEADER.size, 4096],
    [20, Buffer(1 << 40, 4096)],
    [HEADER.size, 4096],
    [HEADER.size],
    *([HEADER.size, 4096] for _ in range(20)),
    [HEADER.size, 200 << 10],
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("credit", [9_000, 40_001, 130_000])
def test_much_data_fills_buffers_of_any_form_in_order(
    tmp_path: Path, packed: bool, credit: int
) -> None:
    """The device takes several at a time; nothing is lost at a buffer that is no good. Credit comes
    when the buffers are there, so that they are."""
    data, received, packets = os.urandom(150_001), bytearray(), list[Packet]()
    chains, forms, unused = deque[Chain](), cycle(FORMS), 0
    with waiting(tmp_path, data, packed=packed) as rig:
        while not packets or packets[-1].op != SHUTDOWN:
            while len(chains) < len(FORMS):
                chains.append(rig.guest.offer_raw(next(forms)))
            end = len(received) + credit
            update = guest_packet(CREDIT_UPDATE, buf_alloc=credit, fwd_cnt=len(received))
            rig.guest.send(update)
            while len(received) < end and (not packets or packets[-1].op != SHUTDOWN):
                chain = chains.popleft()
                written = rig.driver.wait_used(RX, chain).written
                unused += not written
                if written:
                    raw = rig.driver.queues[RX].contents(chain)[:written]
                    packets.append(Packet.unpack(raw))
                    received += packets[-1].data
                    assert packets[-1].len == len(packets[-1].data)
            assert len(received) <= end
    assert received == data
    counters = rig.device.stats()
    assert counters["bytes_to_guest"] == len(data)
    # The RESPONSE, and the first CREDIT_REQUEST
    assert counters["packets_to_guest"] == len(packets) + 2
    traced = [str(event) for event in rig.events]
    assert sum("host:" in line and " RW " in line for line in traced) == sum(
        packet.op == RW for packet in packets
    )
    # Those without room for data may have got something else.
    assert len(rig.lines) == unused <= 2 * (len(packets) + unused) / len(FORMS) + 2


@pytest.mark.parametrize("packed", [False, True])
def test_much_data_fills_buffers_in_many_parts(tmp_path: Path, packed: bool) -> None:
    """Of which several have more parts together than one system call takes (readv(2), IOV_MAX)."""
    data, received = os.urandom(100_001), bytearray()
    form: list[int | Buffer] = [HEADER.size, *[40] * 90]
    with waiting(tmp_path, data, packed=packed) as rig:
        # They are there before the data may come.
        count = len(data) // 3600 + 2
        chains = deque(rig.driver.submit(RX, [], form, indirect=True) for _ in range(count))
        rig.guest.send(guest_packet(CREDIT_UPDATE, buf_alloc=len(data)))
        while len(received) < len(data):
            chain = chains.popleft()
            written = rig.driver.wait_used(RX, chain).written
            packet = Packet.unpack(rig.driver.queues[RX].contents(chain)[:written])
            assert packet.op == RW, f"after {len(received)} bytes"
            received += packet.data
    assert received == data


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head", [[HEADER.size], [20, HEADER.size - 20], [*[4] * 10, 4]])
def test_much_data_takes_no_buffer_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool, head: list[int]
) -> None:
    """Sixteen at a time, wherever the driver cuts the header: none is looked at and put back."""
    count, received, back = 1 + 2 * 16, bytearray(), list[object]()
    reads, readv, step_back = list[int](), os.readv, Ring.step_back
    data = os.urandom(4096 * count)
    monkeypatch.setattr(os, "readv", lambda *of: reads.append(len(of[1])) or readv(*of))
    monkeypatch.setattr(Ring, "step_back", lambda *of: back.append(of) or step_back(*of))
    with waiting(tmp_path, data, packed=packed) as rig:
        chains = [rig.driver.submit(RX, [], [*head, 4096], indirect=True) for _ in range(count)]
        back.clear()
        rig.guest.send(guest_packet(CREDIT_UPDATE, buf_alloc=len(data)))
        for chain in chains:
            written = rig.driver.wait_used(RX, chain).written
            received += Packet.unpack(rig.driver.queues[RX].contents(chain)[:written]).data
        assert received == data
        assert not back
    assert [views for views in reads if views] == [1, 16, 16]


# --- many, and starved ---------------------------------------------------------------------------


def test_streams_take_turns(rig: Rig) -> None:
    ends = []
    for port in range(100, 108):
        client, request = rig.call(port)
        ends.append((client, request))
    for client, _ in ends:
        client.sendall(bytes(3 * 4096))
    order = [rig.guest.receive() for _ in range(3 * len(ends))]
    assert {packet.op for packet in order} == {RW}
    for request in (request for _, request in ends):
        assert sum(packet.src_port == request.src_port for packet in order) == 3
    for client, _ in ends:
        client.close()
    assert all(rig.guest.receive().op == SHUTDOWN for _ in ends)


def test_receiving_goes_on_after_the_ring_was_empty(tmp_path: Path) -> None:
    with running(tmp_path, receive_buffers=1) as rig, rig.dial() as host:
        host.sendall(b"a" * 4096 + b"b" * 4096 + b"c")
        for wanted in (b"a" * 4096, b"b" * 4096, b"c"):
            assert rig.guest.receive().data == wanted


def test_a_reset_closes_the_streams_and_the_next_driver_begins_anew(rig: Rig) -> None:
    host = rig.dial()
    rig.driver.reset()
    assert host.recv(1) == b""
    host.close()
    rig.driver.start()
    rig.guest.forget()
    rig.guest.offer(8)
    with rig.dial() as again:
        again.sendall(b"anew")
        assert rig.guest.receive().data == b"anew"


def test_the_driver_hears_that_streams_were_interrupted(rig: Rig) -> None:
    with rig.dial() as host:
        event = rig.driver.submit(EVENT, [], [4])
        rig.device.interrupt_streams()
        assert rig.driver.wait_used(EVENT, event).written == 4
        assert rig.driver.queues[EVENT].contents(event) == bytes(4)
        assert host.recv(1) == b""


def test_an_interruption_is_told_when_there_is_a_buffer_for_it(rig: Rig) -> None:
    rig.device.interrupt_streams()
    rig.assert_alive()
    event = rig.driver.submit(EVENT, [], [4])
    assert rig.driver.wait_used(EVENT, event).written == 4


def test_packets_and_bytes_are_counted(rig: Rig) -> None:
    with rig.dial() as host:
        rig.guest.send(guest_packet(RW, data=b"12345"))
        host.sendall(b"123")
        assert rig.guest.receive().data == b"123"
        assert rig.device.stats() == {
            "streams": 1,
            "packets_from_guest": 2,
            "packets_to_guest": 2,
            "bytes_from_guest": 5,
            "bytes_to_guest": 3,
        }


def test_packets_are_traced(rig: Rig) -> None:
    with rig.dial():
        rig.guest.send(guest_packet(RW, data=b"12345"))
    lines = [str(event) for event in rig.events]
    assert "vsock: cid3:1000 -> host:52 RW 5 bytes, buf_alloc 262144 fwd_cnt 0" in lines
    assert any(line.startswith("vsock: host:52 -> cid3:1000 RESPONSE") for line in lines)


def test_the_end_is_told_though_the_guest_has_no_room(rig: Rig) -> None:
    with rig.dial(buf_alloc=1) as host:
        host.sendall(b"x")
        assert rig.guest.receive().data == b"x"
    assert rig.guest.receive().op == SHUTDOWN
