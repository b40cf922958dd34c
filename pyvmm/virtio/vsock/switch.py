"""The streams of a socket device: what the guest's packets do to them, what they say to the guest.

It knows no rings: packets from the guest come as a header and a payload, and packets for the guest
are asked for when there are buffers for them: one at a time, or the data of one stream in several.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from pyvmm.errors import DriverError, HostError
from pyvmm.host.files import IOV_MAX
from pyvmm.host.poller import ENDED, FAILED, HUNG_UP, READABLE, WRITABLE, Poller
from pyvmm.host.unix_sockets import Socket
from pyvmm.virtio.queue.chain import DescriptorChain, Reader, spread
from pyvmm.virtio.vsock.host_side import HostSide
from pyvmm.virtio.vsock.packet import HEADER, HEADER_BYTES, Counters, Header
from pyvmm.virtio.vsock.stream import State, Stream
from pyvmm.virtio.vsock.uapi import (
    SHUTDOWN_BOTH,
    VIRTIO_VSOCK_OP_CREDIT_REQUEST,
    VIRTIO_VSOCK_OP_CREDIT_UPDATE,
    VIRTIO_VSOCK_OP_REQUEST,
    VIRTIO_VSOCK_OP_RESPONSE,
    VIRTIO_VSOCK_OP_RST,
    VIRTIO_VSOCK_OP_RW,
    VIRTIO_VSOCK_OP_SHUTDOWN,
    VIRTIO_VSOCK_SHUTDOWN_SEND,
    VIRTIO_VSOCK_TYPE_STREAM,
    VMADDR_CID_HOST,
)

# Streams and clients at a time, whoever opened them. Each is a file descriptor and BUF_ALLOC bytes.
MAX_STREAMS = 512
# RSTs that wait for a receive buffer. With so many the guest's packets are left in its ring, as
# 5.10.6.1 Virtqueue Flow Control has it.
MAX_REPLIES = 256
ANSWER_SECONDS = 10.0  # for a REQUEST, or a SHUTDOWN of both directions
_LONGEST_PAYLOAD = 64 << 10
_SPEAKING = (State.REQUESTED, State.CONNECTED, State.ENDING)

_Ports = tuple[int, int]  # the host's, the guest's
_ADDRESSING = "5.10.6.2 Addressing"
_STREAMS = "5.10.6.5 Stream Sockets"


class Switch:
    """All streams between a guest and a host. Used by the device's thread only.

    `warn` gets a line for what the guest did wrong, `trace` each packet's header.
    """

    def __init__(
        self,
        guest_cid: int,
        host: HostSide,
        poller: Poller,
        *,
        stream_type_agreed: bool = True,
        counters: Counters,
        warn: Callable[[str], None],
        trace: Callable[[Header], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cid = guest_cid
        self._host = host
        self._poller = poller
        self._types = (VIRTIO_VSOCK_TYPE_STREAM,) if stream_type_agreed else ()
        self._counters = counters
        self._warn = warn
        self._trace = trace
        self._clock = clock
        self._streams: dict[_Ports, Stream] = {}
        self._lingering: set[Stream] = set()
        self._replies: deque[Header] = deque()  # RSTs, which belong to no stream any more
        self._talking: deque[Stream] = deque()  # may have something for the guest
        self._woken: list[Stream] = []  # their sockets may take something, or have hung up
        self._due: deque[tuple[float, Stream]] = deque()
        self._full = False  # which has been said
        self._freed = False  # there is room for a stream that was not there when last looked at

    def __len__(self) -> int:
        return len(self._streams)

    # --- the host's events -----------------------------------------------------------------------

    def attend(self) -> None:
        """Take what happened on the host, and give up streams that the guest does not answer."""
        self._freed = False
        while self._woken:
            stream = self._woken.pop()
            if stream.state is not State.CLOSED:
                self._flush(stream)
        self._let_clients_in()
        waiting = len(self._host)
        commands = self._host.commands()
        for sock, port in commands:
            self._request(sock, port)
        self._freed |= len(self._host) + len(commands) < waiting  # some were turned away
        for sock, port in self._host.calls(self._room()):
            self._request(sock, port)
        while self._due and self._due[0][0] <= self._clock():
            deadline, stream = self._due.popleft()
            if self._is_due(stream, deadline):
                self._reset(stream)

    @property
    def wants_attention(self) -> bool:
        """True if `attend` has something to do before anything else happens."""
        return self._freed

    def patience(self) -> float | None:
        """Seconds until `attend` has to look at a stream that waits for the guest, or None."""
        return max(0.0, self._due[0][0] - self._clock()) if self._due else None

    def _let_clients_in(self) -> None:
        room = self._room()
        if room <= 0 and not self._full and self._host.has_arrivals:
            self._warn(f"{MAX_STREAMS} streams at once; other clients of the host wait")
            self._full = True
        elif room > 0:
            self._full = False
        try:
            self._host.accept(room)
        except HostError as error:  # no file descriptors left: they wait until some are
            self._warn(str(error))

    def _room(self) -> int:
        return MAX_STREAMS - len(self._streams) - len(self._lingering) - len(self._host)

    def _request(self, sock: Socket, port: int) -> None:
        host_port = self._host.new_port()
        while (host_port, port) in self._streams:
            host_port = self._host.new_port()
        stream = Stream(sock, host_port, port, State.REQUESTED)
        self._poller.replace(sock.fileno(), self._listen_to(stream))
        self._streams[host_port, port] = stream
        self._expect_answer(stream)
        self._let_speak(stream)

    def _listen_to(self, stream: Stream) -> Callable[[int], None]:
        def hear(events: int) -> None:
            if events & (READABLE | ENDED | HUNG_UP | FAILED):
                stream.readable = True
                self._let_speak(stream)
            if events & (WRITABLE | HUNG_UP | FAILED):
                stream.writable = True
                self._woken.append(stream)
            if events & (HUNG_UP | FAILED):
                stream.note_hang_up()

        return hear

    def _let_speak(self, stream: Stream) -> None:
        if not stream.queued:
            stream.queued = True
            self._talking.append(stream)

    def _flush(self, stream: Stream) -> None:
        stream.flush()
        if stream.state is not State.LINGERING:
            self._let_speak(stream)
        elif not stream.buffer:
            self._lingering.remove(stream)
            self._close(stream)

    def _expect_answer(self, stream: Stream) -> None:
        stream.deadline = self._clock() + ANSWER_SECONDS
        self._due.append((stream.deadline, stream))

    def _is_due(self, stream: Stream, deadline: float) -> bool:
        waits = stream.state in (State.REQUESTED, State.ENDING)
        return waits and stream.deadline == deadline

    # --- packets from the guest ------------------------------------------------------------------

    @property
    def takes_packets(self) -> bool:
        """True if another packet of the guest's may be looked at: its answer needs a place."""
        return len(self._replies) < MAX_REPLIES

    def take_packet(self, header: Header, payload: Reader) -> None:
        """Do what the guest's packet says. Nothing in it is trusted; errors end in RST."""
        self._counters.packets_from_guest += 1
        if self._trace is not None:
            self._trace(header)
        if header.src_cid != self._cid or header.dst_cid != VMADDR_CID_HOST:
            self._warn(
                f"a packet from CID {header.src_cid} to CID {header.dst_cid} dropped:"
                f" not from {self._cid} to {VMADDR_CID_HOST}"
            )
            return
        stream = self._streams.get((header.dst_port, header.src_port))
        try:
            if header.type not in self._types:
                raise DriverError(f"unknown socket type {header.type}", section=_ADDRESSING)
            if stream is None:
                self._take_first(header)
            else:
                self._take_next(stream, header, payload)
        except DriverError as error:
            self._refuse(header, stream, error)

    def _refuse(self, header: Header, stream: Stream | None, error: DriverError) -> None:
        self._warn(f"port {header.src_port} to host port {header.dst_port}: {error}")
        if header.op == VIRTIO_VSOCK_OP_RST:
            if stream is not None:
                self._forget(stream)
        elif stream is not None:
            self._reset(stream)
        else:
            self._reply_rst(header.dst_port, header.src_port)

    def _take_first(self, header: Header) -> None:
        if header.op == VIRTIO_VSOCK_OP_RST:
            return  # whatever it was is gone already
        if header.op != VIRTIO_VSOCK_OP_REQUEST:
            # Lawful: the host may have closed while this was on its way.
            self._reply_rst(header.dst_port, header.src_port)
            return
        if self._room() <= 0:
            raise DriverError(f"more than {MAX_STREAMS} streams", section=_STREAMS)
        try:
            sock = self._host.connect(header.dst_port)
        except HostError:  # nobody listens: nothing unusual; or the host has no room
            self._reply_rst(header.dst_port, header.src_port)
            return
        stream = Stream(sock, header.dst_port, header.src_port, State.CONNECTED)
        stream.hear_credit(header)
        self._poller.replace(sock.fileno(), self._listen_to(stream))
        self._streams[stream.host_port, stream.guest_port] = stream
        self._let_speak(stream)

    def _take_next(self, stream: Stream, header: Header, payload: Reader) -> None:
        op = header.op
        if op == VIRTIO_VSOCK_OP_RST:
            self._forget(stream)
            return
        answered = stream.state is State.REQUESTED and not stream.opening
        if answered != (op == VIRTIO_VSOCK_OP_RESPONSE) or (not answered and stream.opening):
            raise DriverError(f"operation {op} out of turn: {stream.state.value}", section=_STREAMS)
        stream.hear_credit(header)
        if op == VIRTIO_VSOCK_OP_RW:
            self._take_data(stream, header, payload)
        elif op == VIRTIO_VSOCK_OP_SHUTDOWN:
            self._take_shutdown(stream, header.flags)
        elif op == VIRTIO_VSOCK_OP_CREDIT_REQUEST:
            stream.force_update()
        elif op == VIRTIO_VSOCK_OP_RESPONSE:
            stream.state = State.CONNECTED
            stream.answer(f"OK {stream.host_port}\n".encode())
        elif op != VIRTIO_VSOCK_OP_CREDIT_UPDATE:
            raise DriverError(f"operation {op} on a stream", section=_STREAMS)
        if stream.state is not State.CLOSED:
            self._let_speak(stream)

    def _take_data(self, stream: Stream, header: Header, payload: Reader) -> None:
        if header.len > payload.available:
            raise DriverError(
                f"{header.len} bytes announced, {payload.available} in the buffer",
                section="5.10.6 Device Operation",
            )
        if stream.guest_done & VIRTIO_VSOCK_SHUTDOWN_SEND:
            raise DriverError("data after the guest has shut down sending", section=_STREAMS)
        stream.take(payload.take(header.len), header.len)
        self._counters.bytes_from_guest += header.len

    def _take_shutdown(self, stream: Stream, flags: int) -> None:
        stream.hear_shutdown(flags)
        if stream.guest_done != SHUTDOWN_BOTH:
            return
        # RST now, so that the guest need not wait; what it sent still goes out to the host.
        del self._streams[stream.host_port, stream.guest_port]
        self._replies.append(self._header(stream, VIRTIO_VSOCK_OP_RST, 0))
        if stream.buffer:
            stream.state = State.LINGERING
            self._lingering.add(stream)
        else:
            self._close(stream)

    # --- ends ------------------------------------------------------------------------------------

    def _reply_rst(self, host_port: int, guest_port: int) -> None:
        self._replies.append(
            Header(VMADDR_CID_HOST, self._cid, host_port, guest_port, op=VIRTIO_VSOCK_OP_RST)
        )

    def _reset(self, stream: Stream) -> None:
        unheard_of = stream.state is State.REQUESTED and stream.opening
        self._forget(stream)
        if not unheard_of:
            self._replies.append(self._header(stream, VIRTIO_VSOCK_OP_RST, 0))

    def _forget(self, stream: Stream) -> None:
        del self._streams[stream.host_port, stream.guest_port]
        self._close(stream)

    def _close(self, stream: Stream) -> None:
        self._poller.remove(stream.sock.fileno())
        stream.close()
        self._freed = True

    def close(self) -> None:
        """End all streams; the guest hears nothing of it from here."""
        for stream in (*self._streams.values(), *self._lingering):
            self._close(stream)
        self._streams.clear()
        self._lingering.clear()
        self._talking.clear()
        self._replies.clear()
        self._due.clear()

    # --- packets for the guest -------------------------------------------------------------------

    @property
    def has_packets(self) -> bool:
        """True if there may be a packet for the guest."""
        return bool(self._replies or self._talking)

    def give_packet(self, chain: DescriptorChain) -> int:
        """Write the next packet for the guest; its size with header, 0 if there is none after all.

        Raises DriverError if the buffer cannot take it; the packet is then still there. Streams
        take turns.
        """
        if self._replies:
            self._write(chain, self._replies[0])
            self._replies.popleft()
            return HEADER_BYTES
        while self._talking:
            stream = self._talking[0]
            size = self._speak(stream, chain) if stream.state in _SPEAKING else 0
            self._talking.popleft()
            if size:
                self._talking.append(stream)
                return size
            stream.queued = False
        return 0

    @property
    def has_much_data(self) -> bool:
        """True if the next packets are presumably all data of one stream, which filled the last
        buffer that it got."""
        if self._replies or not self._talking or not self._talking[0].fills_buffers:
            return False
        stream = self._talking[0]
        connected = stream.state is State.CONNECTED and not stream.opening
        return connected and stream.readable and stream.credit > 0

    def give_data(self, chains: Sequence[DescriptorChain]) -> list[int]:
        """Where there is much data, write packets of it into as many of `chains` as it takes, by
        one system call; their sizes with headers, none if there is nothing after all.

        Raises DriverError if the first buffer cannot take one; the data is then still there.
        """
        stream = self._talking[0]
        stream.fills_buffers = False
        credit = stream.credit
        heads: list[list[memoryview]] = []
        views: list[memoryview] = []
        room: list[int] = []
        for chain in chains:
            try:
                head, payload, size = self._room_in(chain, credit)
            except DriverError:
                if not room:
                    raise
                break  # it is told of when its turn comes
            if not size or len(views) + len(payload) > IOV_MAX:
                break
            heads.append(head)
            views += payload
            room.append(size)
            credit -= size
        left = self._receive(stream, views, sum(room)) if room else 0
        sizes: list[int] = []
        packed, packed_for = b"", -1
        for place, size in zip(heads, room, strict=True):
            if size > left:
                if not left:
                    break
                size = left
            left -= size
            if size != packed_for:
                packed, packed_for = self._packed_header(stream, size), size
            if len(place) == 1:
                place[0][:] = packed
            else:
                spread(packed, place)
            sizes.append(size + HEADER_BYTES)
        self._note_data(stream, sizes)
        self._talking.rotate(-1)
        return sizes

    def _speak(self, stream: Stream, chain: DescriptorChain) -> int:
        if stream.opening:
            requested = stream.state is State.REQUESTED
            op = VIRTIO_VSOCK_OP_REQUEST if requested else VIRTIO_VSOCK_OP_RESPONSE
            size = self._tell(stream, chain, op)
            stream.opening = False
            return size
        if stream.state is State.CONNECTED:
            if stream.readable and (size := self._speak_of_data(stream, chain)):
                return size
            if stream.host_done & ~stream.told_done:
                return self._tell_done(stream, chain)
        if stream.owes_update:
            return self._tell(stream, chain, VIRTIO_VSOCK_OP_CREDIT_UPDATE)
        return 0

    def _speak_of_data(self, stream: Stream, chain: DescriptorChain) -> int:
        if stream.credit:
            return self._pass_on(stream, chain)
        if stream.has_data() and stream.take_credit_request():
            return self._tell(stream, chain, VIRTIO_VSOCK_OP_CREDIT_REQUEST)
        return 0

    def _pass_on(self, stream: Stream, chain: DescriptorChain) -> int:
        head, views, room = self._room_in(chain, stream.credit)
        size = self._receive(stream, views, room)
        if not size:
            return 0
        spread(self._packed_header(stream, size), head)
        self._note_data(stream, [size + HEADER_BYTES])
        return size + HEADER_BYTES

    def _room_in(
        self, chain: DescriptorChain, credit: int
    ) -> tuple[list[memoryview], list[memoryview], int]:
        """The places for a header and for as much data as `chain` and `credit` have room for, and
        for how many bytes of it."""
        parts, room = chain.writable, chain.writable_size - HEADER_BYTES
        fits = room <= credit and room <= _LONGEST_PAYLOAD
        if fits and len(parts) == 2 and parts[0][1] == HEADER_BYTES:
            # What Linux offers, in a third of the time.
            head, payload = chain.writable_views()
            return [head], [payload], room
        writer = chain.writer()
        place = writer.take(HEADER_BYTES)
        if not writer.available:
            raise DriverError(
                "a receive buffer without room for data", section="5.10.6.4 Receive and Transmit"
            )
        room = min(credit, room, _LONGEST_PAYLOAD)
        return place, writer.take(room), room

    def _receive(self, stream: Stream, views: list[memoryview], room: int) -> int:
        """Read the host's data into `views`, which have `room` bytes in all."""
        size = stream.receive(views)
        stream.fills_buffers = size == room
        stream.sent(size)
        self._counters.bytes_to_guest += size
        return size

    def _packed_header(self, stream: Stream, size: int) -> bytes:
        return HEADER.pack(
            VMADDR_CID_HOST, self._cid, stream.host_port, stream.guest_port, size,
            VIRTIO_VSOCK_TYPE_STREAM, VIRTIO_VSOCK_OP_RW, 0, *stream.credit_fields(),
        )  # fmt: skip

    def _note_data(self, stream: Stream, sizes: list[int]) -> None:
        """Packets of data of these sizes, headers included, have been written."""
        self._counters.packets_to_guest += len(sizes)
        if self._trace is not None:
            for size in sizes:
                self._trace(self._header(stream, VIRTIO_VSOCK_OP_RW, size - HEADER_BYTES))

    def _tell_done(self, stream: Stream, chain: DescriptorChain) -> int:
        flags = stream.host_done
        size = self._tell(stream, chain, VIRTIO_VSOCK_OP_SHUTDOWN, flags)
        stream.told_done = flags
        if flags == SHUTDOWN_BOTH:
            stream.state = State.ENDING
            self._expect_answer(stream)
        return size

    def _tell(self, stream: Stream, chain: DescriptorChain, op: int, flags: int = 0) -> int:
        return self._write(chain, self._header(stream, op, 0, flags))

    def _header(self, stream: Stream, op: int, size: int, flags: int = 0) -> Header:
        return Header(
            VMADDR_CID_HOST, self._cid, stream.host_port, stream.guest_port, size,
            VIRTIO_VSOCK_TYPE_STREAM, op, flags, *stream.credit_fields(),
        )  # fmt: skip

    def _write(self, chain: DescriptorChain, header: Header) -> int:
        chain.writer().write(header.pack())
        self._counters.packets_to_guest += 1
        if self._trace is not None:
            self._trace(header)
        return HEADER_BYTES
