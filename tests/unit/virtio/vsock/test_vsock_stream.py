"""One stream at a real Unix socket: credit, what is kept, and how each end hears of the other's."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pyvmm.errors import DriverError
from pyvmm.host import unix_sockets
from pyvmm.virtio.vsock.packet import Counters, Header, PacketEvent
from pyvmm.virtio.vsock.stream import BUF_ALLOC, State, Stream
from pyvmm.virtio.vsock.uapi import (
    SHUTDOWN_BOTH,
    VIRTIO_VSOCK_SHUTDOWN_RCV,
    VIRTIO_VSOCK_SHUTDOWN_SEND,
)

KIB = 1 << 10


class Ends:
    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * KIB)
        sock = unix_sockets.adopt(ours.detach())
        sock.setblocking(False)
        self.peer.setblocking(False)
        self.stream = Stream(sock, 1, 2, State.CONNECTED)
        self.got = b""

    def drain(self) -> bytes:
        """Take all that is there; the socket may take more then."""
        while True:
            try:
                data = self.peer.recv(1 << 20)
            except BlockingIOError:
                break
            if not data:
                break
            self.got += data
        self.stream.writable = True
        return self.got


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.stream.close()
    made.peer.close()


def views(*pieces: bytes) -> tuple[list[memoryview], int]:
    return [memoryview(piece) for piece in pieces], sum(map(len, pieces))


def credit(stream: Stream, buf_alloc: int, fwd_cnt: int) -> int:
    stream.hear_credit(Header(3, 2, 2, 1, buf_alloc=buf_alloc, fwd_cnt=fwd_cnt))
    return stream.credit


# --- credit ---------------------------------------------------------------------------------------


def test_the_guest_s_room_is_what_it_has_less_what_is_on_its_way(ends: Ends) -> None:
    stream = ends.stream
    assert stream.credit == 0
    assert credit(stream, 100, 0) == 100
    stream.sent(30)
    assert stream.credit == 70
    assert credit(stream, 100, 10) == 80
    assert credit(stream, 20, 0) == 0, "a buffer that has become smaller than what is in it"
    assert credit(stream, 30, 0) == 0 and credit(stream, 31, 0) == 1


def test_counters_begin_anew_after_four_gigabytes(ends: Ends) -> None:
    stream = ends.stream
    stream.sent(0xFFFF_FFFF)
    assert credit(stream, 100, 0xFFFF_FFF0) == 85
    stream.sent(5)
    assert stream.credit == 80
    assert credit(stream, 100, 4) == 100
    stream._forward(0xFFFF_FFFF)
    assert stream.credit_fields() == (BUF_ALLOC, 0xFFFF_FFFF)
    stream._forward(2)
    assert not stream.owes_update
    assert stream.credit_fields() == (BUF_ALLOC, 1)


def test_the_guest_is_asked_once_until_it_has_spoken(ends: Ends) -> None:
    stream = ends.stream
    assert [stream.take_credit_request() for _ in range(3)] == [True, False, False]
    credit(stream, 0, 0)
    assert [stream.take_credit_request() for _ in range(2)] == [True, False]


def test_a_stream_begins_with_nothing_owed_and_nothing_there(ends: Ends) -> None:
    stream = ends.stream
    assert (stream.queued, stream.opening, stream.hung_up) == (False, True, False)
    assert (stream.guest_done, stream.host_done, stream.told_done) == (0, 0, 0)
    assert stream.credit_fields() == (BUF_ALLOC, 0)
    stream.hear_credit(Header(3, 2, 2, 1, buf_alloc=9))
    assert stream.credit == 9
    assert Header(1, 2, 3, 4) == (1, 2, 3, 4, 0, 1, 0, 0, 0, 0)
    assert Counters() == Counters(0, 0, 0, 0)


def test_a_quarter_of_the_buffer_is_worth_an_update(ends: Ends) -> None:
    stream = ends.stream
    stream._forward(BUF_ALLOC // 4 - 1)
    assert not stream.owes_update
    stream._forward(1)
    assert stream.owes_update
    assert stream.credit_fields() == (BUF_ALLOC, BUF_ALLOC // 4)
    assert not stream.owes_update
    stream.force_update()
    assert stream.owes_update
    stream.credit_fields()
    assert not stream.owes_update


# --- from the guest to the host -------------------------------------------------------------------


def test_what_the_host_does_not_take_is_kept_in_order(ends: Ends) -> None:
    stream, sent = ends.stream, b""
    pieces = [bytes([n]) * size for n, size in enumerate((1, 5000, 0, 20_000, 3, 9000), 65)]
    for _ in range(3):
        stream.take(*views(*pieces))
        sent += b"".join(pieces)
        assert stream.credit_fields()[1] == len(sent) - len(stream.buffer)
    assert stream.buffer
    while stream.buffer:
        assert ends.drain() + stream.buffer == sent
        stream.take(*views(b"more"))
        sent += b"more"
        stream.flush()
    assert ends.drain() == sent
    assert stream.credit_fields() == (BUF_ALLOC, len(sent))
    stream.take(*views())
    stream.take(*views(b"end"))
    assert ends.drain() == sent + b"end" and not stream.buffer


def test_more_than_the_buffer_is_the_guest_s_fault(ends: Ends) -> None:
    stream = ends.stream
    stream.writable = False
    stream.take(*views(bytes(BUF_ALLOC - 1)))
    with pytest.raises(DriverError, match="2 bytes where there is room for 1"):
        stream.take(*views(b"xx"))
    stream.take(*views(b"x"))
    assert len(stream.buffer) == BUF_ALLOC
    with pytest.raises(DriverError, match="1 bytes where there is room for 0"):
        stream.take(*views(b"x"))


def test_what_nobody_will_read_is_not_kept_and_counts_as_passed_on(ends: Ends) -> None:
    stream = ends.stream
    stream.writable = False
    stream.take(*views(b"kept"))
    assert stream.credit_fields()[1] == 0
    ends.peer.close()
    stream.writable = True
    stream.flush()
    assert (stream.host_done, stream.buffer) == (VIRTIO_VSOCK_SHUTDOWN_RCV, b"")
    assert stream.credit_fields()[1] == 4
    stream.take(*views(b"late", b"r"))
    assert not stream.buffer and stream.credit_fields()[1] == 9


def test_the_first_that_nobody_reads_is_not_kept_either(ends: Ends) -> None:
    ends.peer.close()
    ends.stream.take(*views(b"abc"))
    assert ends.stream.host_done == VIRTIO_VSOCK_SHUTDOWN_RCV
    assert not ends.stream.buffer and ends.stream.credit_fields()[1] == 3


def test_the_host_s_own_words_are_no_bytes_of_the_guest(ends: Ends) -> None:
    ends.stream.answer(b"OK 7\n")
    assert ends.drain() == b"OK 7\n"
    assert ends.stream.credit_fields() == (BUF_ALLOC, 0)


def test_the_guest_s_end_is_passed_on_behind_its_last_byte(ends: Ends) -> None:
    stream = ends.stream
    stream.writable = False
    stream.take(*views(b"last"))
    stream.hear_shutdown(VIRTIO_VSOCK_SHUTDOWN_SEND | 0xF0)
    assert stream.guest_done == VIRTIO_VSOCK_SHUTDOWN_SEND
    with pytest.raises(BlockingIOError):
        ends.peer.recv(1)
    stream.writable = True
    stream.flush()
    assert (ends.peer.recv(9), ends.peer.recv(9)) == (b"last", b"")
    assert ends.peer.send(b"the other way") == 13


def test_a_guest_that_reads_no_more_stops_the_host(ends: Ends) -> None:
    ends.stream.hear_shutdown(VIRTIO_VSOCK_SHUTDOWN_RCV)
    with pytest.raises(BrokenPipeError):
        ends.peer.send(b"x")
    ends.stream.take(*views(b"still"))
    assert ends.drain() == b"still"
    ends.stream.hear_shutdown(VIRTIO_VSOCK_SHUTDOWN_SEND)
    assert ends.stream.guest_done == SHUTDOWN_BOTH
    assert ends.peer.recv(1) == b""
    ends.stream.close()
    ends.stream.hear_shutdown(SHUTDOWN_BOTH)  # of a socket that is gone


# --- from the host to the guest -------------------------------------------------------------------


def test_the_host_s_bytes_and_its_end(ends: Ends) -> None:
    stream, into = ends.stream, [bytearray(3), bytearray(5)]
    room = [memoryview(piece) for piece in into]
    assert (stream.receive(room), stream.readable, stream.host_done) == (0, False, 0)
    stream.readable = True
    assert (stream.has_data(), stream.readable, stream.host_done) == (False, False, 0)
    stream.readable = True
    ends.peer.send(b"hello")
    assert stream.has_data() and stream.readable
    assert stream.receive(room) == 5 and b"".join(into)[:5] == b"hello"
    ends.peer.shutdown(socket.SHUT_WR)
    for look in (stream.has_data, lambda: stream.receive(room)):
        stream.readable, stream.host_done = True, 0
        assert not look()
        assert (stream.readable, stream.host_done) == (False, VIRTIO_VSOCK_SHUTDOWN_SEND)
    assert not stream.hung_up


@pytest.mark.parametrize("look", ["has_data", "receive"])
def test_a_peer_that_left_without_reading_ends_both_ways(ends: Ends, look: str) -> None:
    stream = ends.stream
    stream.take(*views(b"never read"))
    ends.peer.close()  # the next read is a reset
    assert not (
        stream.has_data() if look == "has_data" else stream.receive([memoryview(bytearray(9))])
    )
    assert stream.hung_up and not stream.readable and stream.host_done == SHUTDOWN_BOTH


def test_a_hang_up_ends_both_ways_once_all_is_read(ends: Ends) -> None:
    stream = ends.stream
    ends.peer.send(b"last")
    stream.note_hang_up()
    assert stream.hung_up and stream.host_done == 0
    assert stream.receive([memoryview(bytearray(9))]) == 4
    ends.peer.close()
    assert stream.receive([memoryview(bytearray(9))]) == 0
    assert stream.host_done == SHUTDOWN_BOTH
    stream.host_done = VIRTIO_VSOCK_SHUTDOWN_SEND
    stream.note_hang_up()
    assert stream.host_done == SHUTDOWN_BOTH


def test_a_closed_stream(ends: Ends) -> None:
    ends.stream.close()
    assert ends.stream.state is State.CLOSED and ends.peer.recv(1) == b""


def test_a_packet_as_a_trace_shows_it() -> None:
    header = Header(3, 2, 1024, 80, len=5, op=5, flags=3, buf_alloc=7, fwd_cnt=8)
    assert str(PacketEvent("vsock", header)) == (
        "vsock: cid3:1024 -> host:80 RW 5 bytes flags 0x3, buf_alloc 7 fwd_cnt 8"
    )
    odd = header._replace(src_cid=2, dst_cid=9, op=8, flags=0)
    assert str(PacketEvent("vsock", odd)) == (
        "vsock: host:1024 -> cid9:80 operation 8 5 bytes, buf_alloc 7 fwd_cnt 8"
    )
    assert "operation" not in str(PacketEvent("vsock", header._replace(op=7)))
