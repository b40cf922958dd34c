"""Streams of a socket device between a lawful guest and lawful programs of the host, whose ends are
slow, ask for credit, end one direction or leave: every byte is followed.

It raises AssertionError, with the steps so far, if

- a byte comes as another one than was sent, out of its order, twice, or never although both ends
  go on,
- the guest gets more than it has said that it has room for, or is told of more than it has sent,
- a stream is reset that nobody has ended, or is not ended although somebody has,
- a stream, a descriptor or a thread is left.
"""

from __future__ import annotations

import functools
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from random import Random

from fuzz.inline import Workers
from fuzz.room import check_closed, check_ended, open_files, told

from pyvmm.host import unix_sockets
from pyvmm.host.named_listener import NamedListener
from pyvmm.memory import GuestMemory
from pyvmm.testing import Arena, MmioDriver
from pyvmm.testing.mmio_driver import Ring
from pyvmm.testing.mock_driver import Chain
from pyvmm.testing.vsock_driver import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HEADER,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    RX,
    SHUTDOWN,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    TX,
    Packet,
)
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.vsock.device import VsockDevice
from pyvmm.virtio.vsock.stream import BUF_ALLOC

CID, PORT = 3, 52
BOTH = SHUTDOWN_RECEIVE | SHUTDOWN_SEND
_MOST = 4  # streams at a time
_FLOWS = 400  # turns that the rest of what was sent may take at the end
_RAM = 32 << 20


@functools.cache
def _memory() -> GuestMemory:
    return GuestMemory([(0, _RAM)])


class _Stream:
    """One stream as its two ends know it. What the guest is `told` is what it last said itself."""

    def __init__(self, host_port: int, guest_port: int, host: socket.socket | None) -> None:
        self.ports = host_port, guest_port
        self.host = host
        self.called = False  # by the host, which gets a line first
        self.is_open = self.is_over = False  # for the guest
        self.to_host, self.got = bytearray(), bytearray()
        self.to_guest, self.received = bytearray(), bytearray()
        self.alloc, self.consumed = 1 << 16, 0
        self.said = 0, 0  # (buf_alloc, fwd_cnt) as the device knows them
        self.peer_alloc = self.peer_fwd = 0
        self.guest_done = self.host_done = 0  # SHUTDOWN flags, by whom they were sent
        self.host_ended = False  # it sends no more
        self.asked = False

    @property
    def credit(self) -> int:
        return self.peer_alloc - (len(self.to_host) - self.peer_fwd)


class _Case:
    def __init__(self, rng: Random, ring: Ring, closing: ExitStack, steps: list[str]) -> None:
        self.rng, self.steps = rng, steps
        folder = closing.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        self.path = f"{folder}/v"
        listener = closing.enter_context(NamedListener(self.path))
        self.program = closing.enter_context(socket.socket(socket.AF_UNIX))
        self.program.bind(f"{self.path}_{PORT}")
        self.program.listen(_MOST)
        self.workers = Workers(in_threads=rng.random() < 0.2)
        closing.enter_context(self.workers.instead_of_threads())
        self.lines: list[str] = []
        self.device = VsockDevice(CID, listener.socket, self.path, log=self.lines.append)
        transport = MmioTransport(self.device, _memory(), lambda: None, log=self.lines.append)
        closing.callback(transport.close)
        if ring == "packed":
            self.device.features |= 1 << 34
            transport.negotiation.offered |= 1 << 34
        self.driver = MmioDriver(
            transport.registers, _memory(), kicks=[self._Bell(self)] * 3, ring=ring,
            arena=Arena(_memory(), 0x1000),
        )  # fmt: skip
        self.driver.start(queue_sizes=(rng.choice((16, 64, 256)), 64, 16))
        self.offered: deque[Chain] = deque()
        self.sending: list[Chain] = []
        self.streams: list[_Stream] = []
        self.calls: list[_Stream] = []  # that the guest has not heard of
        self.next_port = 1000
        self.heard = 0  # packets of the device's
        closing.callback(self._close_all)

    class _Bell:
        def __init__(self, case: _Case) -> None:
            self.case = case

        def signal(self) -> None:
            for index in range(3):
                self.case.driver.notify(index)
            self.case.workers.pump()

    def _close_all(self) -> None:
        for stream in (*self.streams, *self.calls):
            if stream.host is not None:
                stream.host.close()
        self.device.reset()

    # --- the guest's queues -----------------------------------------------------------------------

    def offer(self) -> None:
        size = self.rng.choice((1, 64, 4096, 4096, 4096, 20_000))
        for _ in range(self.rng.choice((1, 4, 16))):
            queue = self.driver.queues[RX]
            if len(self.offered) * 2 + 2 <= queue.size:
                self.offered.append(queue.add([], [HEADER.size, size]))
        self.driver.queues[RX].publish()
        self.turn()

    def turn(self) -> None:
        """The device's, and then the guest takes what there is."""
        self.driver.kicks[0].signal()
        self._reclaim()
        while self.offered and (used := self.driver.queues[RX].pop_used()) is not None:
            chain = next(one for one in self.offered if one.head == used.head)
            self.offered.remove(chain)
            self.heard += 1
            raw = self.driver.queues[RX].contents(chain)[: used.written]
            self._take(Packet.unpack(raw))

    def _reclaim(self) -> None:
        while self.driver.queues[TX].pop_used() is not None:
            pass

    def _say(self, stream: _Stream, op: int, data: bytes = b"", flags: int = 0) -> None:
        stream.said = stream.alloc, stream.consumed
        host_port, guest_port = stream.ports
        packet = Packet(
            op, guest_port, host_port, data, flags, buf_alloc=stream.alloc, fwd_cnt=stream.consumed
        )
        self.driver.queues[TX].add([packet.pack_header(CID), *([data] if data else [])])
        self.driver.queues[TX].publish()
        self.driver.kicks[1].signal()
        self._reclaim()

    # --- what the guest hears ---------------------------------------------------------------------

    def _take(self, packet: Packet) -> None:
        ports = packet.src_port, packet.dst_port
        if packet.op == REQUEST:
            self._hear_call(packet)
            return
        stream = next((one for one in self.streams if one.ports == ports), None)
        if stream is None or stream.is_over:
            assert packet.op in (RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST)
            return  # on its way when the guest ended it
        assert packet.op == RST or packet.buf_alloc == BUF_ALLOC
        if packet.op == RST:
            self._hear_reset(stream)
            return
        assert stream.peer_fwd <= packet.fwd_cnt <= len(stream.to_host), "told of what was not sent"
        stream.peer_alloc, stream.peer_fwd = packet.buf_alloc, packet.fwd_cnt
        if packet.op == RESPONSE:
            assert not stream.is_open and not stream.called
            stream.is_open = True
        elif packet.op == RW:
            self._hear_data(stream, packet)
        elif packet.op == SHUTDOWN:
            self._hear_shutdown(stream, packet.flags)
        elif packet.op == CREDIT_REQUEST:
            self._say(stream, CREDIT_UPDATE)
        else:
            assert packet.op == CREDIT_UPDATE

    def _hear_call(self, packet: Packet) -> None:
        stream = self.calls.pop(0)
        stream.ports = packet.src_port, packet.dst_port
        stream.peer_alloc = packet.buf_alloc
        self.streams.append(stream)
        stream.is_open = True
        self._say(stream, RESPONSE)

    def _hear_reset(self, stream: _Stream) -> None:
        ended = stream.host is None or stream.guest_done == BOTH
        assert ended, f"{stream.ports} is reset, which nobody has ended: {self.lines}"
        stream.is_over = True

    def _hear_data(self, stream: _Stream, packet: Packet) -> None:
        assert stream.is_open and packet.data and packet.len == len(packet.data)
        assert not stream.host_done & SHUTDOWN_SEND, "data behind its end"
        start = len(stream.received)
        sent = stream.to_guest[start : start + len(packet.data)]
        assert packet.data == sent, f"{len(packet.data)} bytes at {start} of {stream.ports}"
        stream.received += packet.data
        alloc, known = stream.said
        assert len(stream.received) - known <= alloc, "more than the guest has room for"

    def _hear_shutdown(self, stream: _Stream, flags: int) -> None:
        assert flags & ~BOTH == 0 and flags | stream.host_done == flags
        # Where the guest takes no more there is nothing more either.
        if flags & SHUTDOWN_SEND and not stream.guest_done & SHUTDOWN_RECEIVE:
            assert stream.host_ended
            assert stream.received == stream.to_guest, "what it had sent before is lost"
        both_done = stream.host_ended and stream.guest_done & SHUTDOWN_SEND
        assert flags & SHUTDOWN_RECEIVE == 0 or stream.host is None or both_done
        stream.host_done = flags
        if flags == BOTH:
            self._say(stream, RST)
            stream.is_over = True

    # --- steps ------------------------------------------------------------------------------------

    def _living(self) -> Iterator[_Stream]:
        return (one for one in self.streams if one.is_open and not one.is_over)

    def _any(self) -> _Stream | None:
        living = list(self._living())
        return self.rng.choice(living) if living else None

    def dial(self) -> None:
        if len(list(self._living())) + len(self.calls) >= _MOST:
            return
        self.next_port += 1
        stream = _Stream(PORT, self.next_port, None)
        self.note(f"the guest dials from {self.next_port}")
        self.streams.append(stream)
        stream.alloc = self.rng.choice((0, 1, 5000, 1 << 16, 1 << 18))
        self._say(stream, REQUEST)
        stream.host = self._new(self.program.accept()[0])
        self.turn()

    def _new(self, host: socket.socket) -> socket.socket:
        host.setblocking(False)
        if self.rng.random() < 0.4 and self.device._active is not None:
            for stream in self.device._active._switch._streams.values():  # they are full soon
                stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        return host

    def call(self) -> None:
        if len(list(self._living())) + len(self.calls) >= _MOST:
            return
        stream = _Stream(0, 0, None)
        stream.called = True
        if self.rng.random() < 0.5:
            self.note("a program connects")
            stream.host = socket.socket(socket.AF_UNIX)
            stream.host.connect(self.path)
            stream.host.sendall(b"CONNECT 80\n")
        else:
            self.note("the monitor calls")
            ours, theirs = unix_sockets.pair()
            self.device.call(ours, 80)
            stream.host = socket.socket(fileno=theirs.detach())
        self._new(stream.host)
        self.calls.append(stream)
        self.turn()

    def send(self) -> None:
        """The guest does, as much as it has credit for."""
        stream = self._any()
        if stream is None or stream.guest_done & SHUTDOWN_SEND:
            return
        for _ in range(self.rng.choice((1, 1, 6))):
            size = min(stream.credit, self.rng.choice((1, 300, 4096, 65536, 65536)))
            if size <= 0 or stream.is_over or self.driver.arena.next > _RAM - (1 << 20):
                return
            self.note(f"the guest sends {size} bytes on {stream.ports}")
            data = self.rng.randbytes(size)
            stream.to_host += data
            self._say(stream, RW, data)
        self.turn()

    def consume(self) -> None:
        stream = self._any()
        if stream is not None:
            left = len(stream.received) - stream.consumed
            stream.consumed += self.rng.choice((left, left // 2, min(left, 1)))
            stream.alloc = self.rng.choice((stream.alloc, 0, 1, 4096, 1 << 16, 1 << 18))
            self.note(f"the guest has taken {stream.consumed}, and has room for {stream.alloc}")
            self._say(stream, self.rng.choice((CREDIT_UPDATE, CREDIT_UPDATE, CREDIT_REQUEST)))
            self.turn()

    def shut(self) -> None:
        stream = self._any()
        if stream is not None and self.rng.random() < 0.4:
            stream.guest_done |= self.rng.choice((1, 2, 2, 3))
            self.note(f"the guest shuts down {stream.guest_done} of {stream.ports}")
            self._say(stream, SHUTDOWN, flags=stream.guest_done)
            self.turn()

    def host_sends(self) -> None:
        stream = self._any()
        if stream is None or stream.host is None or stream.host_ended:
            return
        for _ in range(self.rng.choice((1, 1, 6))):
            data = self.rng.randbytes(self.rng.choice((1, 300, 4096, 30_000)))
            with suppress(BlockingIOError, BrokenPipeError):
                count = stream.host.send(data)
                self.note(f"the host sends {count} bytes on {stream.ports}")
                stream.to_guest += data[:count]
        self.turn()

    def host_reads(self) -> None:
        stream = self._any()
        if stream is not None:
            self._read(stream, self.rng.choice((1, 4096, 1 << 18)))
            self.turn()

    def _read(self, stream: _Stream, size: int) -> bool:
        """Whether something has come."""
        if stream.host is None:
            return False
        try:
            data = stream.host.recv(size)
        except (BlockingIOError, ConnectionResetError):
            return False
        stream.got += data
        if stream.called and stream.got.find(b"\n") >= 0:
            line, _, rest = bytes(stream.got).partition(b"\n")
            assert line == f"OK {stream.ports[0]}".encode()
            stream.got, stream.called = bytearray(rest), False
        if not stream.called:
            assert stream.to_host.startswith(stream.got), f"other bytes on {stream.ports}"
        return bool(data)

    def host_ends(self) -> None:
        stream = self._any()
        if stream is None or stream.host is None or self.rng.random() < 0.5:
            return
        stream.host_ended = True
        if self.rng.random() < 0.5:
            self.note(f"the host sends no more on {stream.ports}")
            with suppress(OSError):
                stream.host.shutdown(socket.SHUT_WR)
        else:
            self.note(f"the host leaves {stream.ports}")
            stream.host.close()
            stream.host = None
        self.turn()

    def renew(self) -> None:
        """A queue is reset: streams go on. What the device has not returned is not its any more."""
        self.note("the receive queue is reset")
        self.turn()
        self.driver.reset_queue(RX, self.rng.choice((16, 64)))
        self.offered.clear()
        self.offer()

    def _left(self) -> str:
        """The streams of which one end knows still."""
        active = self.device._active
        ours = [] if active is None else [*active._switch._streams]
        return f"{ours}, {[one.ports for one in self._living()]}"

    def note(self, step: str) -> None:
        self.steps.append(step)

    # --- the end ----------------------------------------------------------------------------------

    def flow(self) -> None:
        """Both ends of all streams take all that comes: nothing is left on the way."""
        self.note("all goes on to its end")
        for _ in range(_FLOWS):
            moved = bool(self.calls)
            for stream in list(self._living()):
                moved |= self._read(stream, 1 << 20)
                if stream.consumed < len(stream.received) or stream.alloc < 1 << 16:
                    stream.consumed, stream.alloc = len(stream.received), 1 << 16
                    self._say(stream, CREDIT_UPDATE)
                    moved = True
            before = self.heard
            while len(self.offered) * 2 + 2 <= min(self.driver.queues[RX].size, 16):
                self.offered.append(self.driver.queues[RX].add([], [HEADER.size, 8192]))
            self.driver.queues[RX].publish()
            self.turn()
            moved |= before != self.heard
            if not moved:
                break
        for stream in self._living():
            self._check_flown(stream)

    def _check_flown(self, stream: _Stream) -> None:
        what = f"{stream.ports}: {len(stream.got)} of {len(stream.to_host)} bytes came to the host,"
        what += f" {len(stream.received)} of {len(stream.to_guest)} to the guest"
        assert stream.host is not None, f"{what}; the guest does not hear that it has left"
        assert stream.got == stream.to_host, what
        if not stream.guest_done & SHUTDOWN_RECEIVE:
            assert stream.received == stream.to_guest, what
            assert bool(stream.host_done & SHUTDOWN_SEND) == stream.host_ended, what
        if stream.guest_done & SHUTDOWN_SEND:
            assert stream.host.recv(1) == b"", "the host does not hear that the guest is done"

    def run(self) -> None:
        ways = (
            *(self.dial, self.dial, self.call, self.offer, self.offer, self.send, self.send),
            *(self.send, self.consume, self.consume, self.shut, self.host_sends, self.host_sends),
            *(self.host_sends, self.host_reads, self.host_reads, self.host_ends, self.renew),
        )
        self.offer()
        self.dial()
        for _ in range(self.rng.randint(4, 60)):
            self.rng.choice(ways)()
        self.flow()
        for stream in list(self._living()):
            self._say(stream, SHUTDOWN, flags=BOTH)
            stream.guest_done = BOTH
        self.flow()
        assert not list(self._living()) and self.device.stats()["streams"] == 0, self._left()
        assert not self.lines, self.lines


def vsock_streams_case(rng: Random, ring: Ring) -> int:
    """One guest and its streams; how many steps there were."""
    steps: list[str] = []
    _memory()
    files, threads = open_files(), threading.active_count()
    with told(vsock_streams_case, steps), ExitStack() as closing:
        _Case(rng, ring, closing, steps).run()
    check_closed(files)
    check_ended(threads)
    return len(steps)
