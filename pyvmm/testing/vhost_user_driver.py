"""A vhost-user front end for tests: lends its memory to a back end, sets rings up and uses them.

    with VhostUserDriver(connected_socket, memory) as driver:
        driver.start()
        written, data = driver.request(0, [header], [512, 1])

Messages and numbers are those of QEMU's docs/interop/vhost-user.rst, written down here a second
time on purpose. The front end's user addresses are made up: guest addresses plus USER_BASE.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Self

from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT, DriverTimeout
from pyvmm.testing.mock_driver import MockSplitDriver
from pyvmm.testing.packed_driver import MockPackedDriver
from pyvmm.testing.queue_user import QueueUser
from pyvmm.testing.ring import Arena, MockDriver

GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE = 1, 2, 3, 4, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
SET_BACKEND_REQ_FD, GET_CONFIG, SET_CONFIG, RESET_DEVICE = 21, 24, 25, 34
GET_INFLIGHT_FD, SET_INFLIGHT_FD = 31, 32
GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG = 36, 37, 38

F_EVENT_IDX, F_PROTOCOL_FEATURES, F_RING_PACKED = 1 << 29, 1 << 30, 1 << 34
PACKED_START = 0x8000_8000  # both positions at offset 0, both wrap counters 1
P_MQ, P_REPLY_ACK, P_CONFIG, P_INFLIGHT = 1 << 0, 1 << 3, 1 << 9, 1 << 12
P_RESET_DEVICE, P_MEM_SLOTS = 1 << 13, 1 << 15
VERSION, REPLY, NEED_REPLY, NO_FD = 1, 4, 8, 0x100
USER_BASE = 0x7F12_0000_0000


class Refused(AssertionError):
    """The back end answered a request with an error."""


class Gone(AssertionError):
    """The back end has closed the connection."""


class VhostUserDriver(QueueUser):
    """One front end. `queues` are its rings once `start` was called, `kicks`, `calls` and `errors`
    their eventfds."""

    def __init__(self, connection: socket.socket, memory: GuestMemory) -> None:
        self.connection = connection
        connection.settimeout(SAFETY_TIMEOUT)
        self.memory = memory
        self.arena = Arena(memory)
        super().__init__()
        self.kicks: list[EventFd] = []
        self.calls: list[EventFd] = []
        self.errors: list[EventFd] = []
        self.features = 0
        self.protocol_features = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disappear, as a front end that was killed."""
        self.connection.close()
        for eventfd in (*self.kicks, *self.calls, *self.errors):
            eventfd.close()

    # --- messages --------------------------------------------------------------------------------

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = VERSION
    ) -> None:
        """Send one message, whatever is in it."""
        message = struct.pack("=III", request, flags, len(payload)) + payload
        try:
            if fds:
                socket.send_fds(self.connection, [message], [*fds])
            else:
                self.connection.sendall(message)
        except (BrokenPipeError, ConnectionResetError):
            raise Gone from None

    def receive(self, request: int) -> bytes:
        """The payload of the answer to `request`. Raises Gone."""
        header = self._exactly(12)
        answered, flags, size = struct.unpack("=III", header)
        assert (answered, flags) == (request, VERSION | REPLY), f"not the answer to {request}"
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self.connection.recv(size - len(data))
            except ConnectionResetError:
                part = b""
            if not part:
                raise Gone
            data += part
        return data

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        """The payload that answers a request that always has an answer."""
        self.send(request, payload)
        return self.receive(request)

    def ask_u64(self, request: int) -> int:
        """As `ask`, for a number."""
        value: int = struct.unpack("=Q", self.ask(request))[0]
        return value

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request and wait until it is carried out. Raises Refused, Gone."""
        if not self.protocol_features & P_REPLY_ACK:
            self.send(request, payload, fds)
            self.ask(GET_FEATURES)
            return
        self.send(request, payload, fds, VERSION | NEED_REPLY)
        if struct.unpack("=Q", self.receive(request)) != (0,):
            raise Refused(f"request {request}")

    def tell_u64(self, request: int, value: int, fds: Sequence[int] = ()) -> None:
        """As `tell`, with a number."""
        self.tell(request, struct.pack("=Q", value), fds)

    def tell_vring(self, request: int, index: int, num: int) -> None:
        """As `tell`, with a vring state description."""
        self.tell(request, struct.pack("=II", index, num))

    # --- set-up ----------------------------------------------------------------------------------

    def negotiate(self, features: int | None = None, protocol_features: int | None = None) -> None:
        """Agree on features, all that are offered unless given."""
        offered = self.ask_u64(GET_FEATURES)
        if offered & F_PROTOCOL_FEATURES:
            offered_here = self.ask_u64(GET_PROTOCOL_FEATURES)
            wanted = offered_here if protocol_features is None else protocol_features
            self.tell_u64(SET_PROTOCOL_FEATURES, wanted)
            self.protocol_features = wanted
        self.tell(SET_OWNER)
        self.features = offered if features is None else features
        self.tell_u64(SET_FEATURES, self.features)

    def regions(self) -> list[tuple[int, int, int, int]]:
        """(guest address, size, user address, mmap offset) of each region of the memory."""
        return [
            (r.guest_addr, r.size, r.guest_addr + USER_BASE, r.fd_offset)
            for r in self.memory.regions
        ]

    def lend(self) -> None:
        """Lend all of the memory to the back end."""
        rows = self.regions()
        payload = struct.pack("=II", len(rows), 0) + b"".join(struct.pack("=4Q", *r) for r in rows)
        self.tell(SET_MEM_TABLE, payload, [self.memory.fd] * len(rows))

    def lay_out(self, index: int, size: int) -> MockDriver:
        """Make ring `index`, which is the next one, without a word to the back end."""
        assert index == len(self.queues)
        layout = MockPackedDriver if self.features & F_RING_PACKED else MockSplitDriver
        queue = layout(
            self.memory, size, arena=self.arena, event_idx=bool(self.features & F_EVENT_IDX)
        )
        self.queues.append(queue)
        for eventfds in (self.kicks, self.calls, self.errors):
            eventfds.append(EventFd())
        return queue

    def set_up(self, index: int, base: int | None = None) -> None:
        """Tell the back end of a ring, and start and enable it."""
        queue = self.queues[index]
        if base is None:
            base = PACKED_START if self.features & F_RING_PACKED else 0
        self.tell_vring(SET_VRING_NUM, index, queue.size)
        self.tell_vring(SET_VRING_BASE, index, base)
        self.tell(SET_VRING_ADDR, self.addresses(index))
        self.tell_u64(SET_VRING_CALL, index, [self.calls[index].fd])
        self.tell_u64(SET_VRING_ERR, index, [self.errors[index].fd])
        self.tell_u64(SET_VRING_KICK, index, [self.kicks[index].fd])
        if self.features & F_PROTOCOL_FEATURES:
            self.tell_vring(SET_VRING_ENABLE, index, 1)

    def addresses(self, index: int) -> bytes:
        """The vring address description of ring `index`."""
        queue = self.queues[index]
        areas = (queue.desc_addr, queue.device_addr, queue.driver_addr)
        return struct.pack("=IIQQQQ", index, 0, *(area + USER_BASE for area in areas), 0)

    def start(self, *, features: int | None = None, sizes: Sequence[int] = (64,)) -> None:
        """Negotiate, lend the memory, and set up a ring of each of `sizes`."""
        self.negotiate(features)
        self.lend()
        for index, size in enumerate(sizes):
            self.lay_out(index, size)
            self.set_up(index)

    def stop(self, index: int = 0) -> int:
        """Stop a ring; the position in its available ring where it is to go on."""
        answer = self.ask(GET_VRING_BASE, struct.pack("=II", index, 0))
        answered, base = struct.unpack("=II", answer)
        assert answered == index
        number: int = base
        return number

    def config(self, offset: int, length: int) -> bytes:
        """Bytes of the configuration space; none if the back end could not give them."""
        answer = self.ask(GET_CONFIG, struct.pack("=III", offset, length, 0) + bytes(length))
        return answer[12:]

    def get_inflight(self, num_queues: int, queue_size: int) -> tuple[bytes, int]:
        """Have the back end make memory for its notes on requests in flight: the description of it
        that SET_INFLIGHT_FD takes, and its file descriptor, which is the caller's."""
        asked = struct.pack("=QQHH4x", 0, 0, num_queues, queue_size)
        self.send(GET_INFLIGHT_FD, asked)
        head, fds, _, _ = socket.recv_fds(self.connection, 12, 1)
        if not head:
            raise Gone
        assert struct.unpack("=III", head) == (GET_INFLIGHT_FD, VERSION | REPLY, len(asked))
        described = self._exactly(len(asked))
        return described, fds[0]

    def take_over(self, before: VhostUserDriver) -> None:
        """Use the rings of another front end, whose back end has died: lend the memory, tell of
        all that is there and start the rings where they ended."""
        self.lend()
        self.arena = before.arena
        for index, queue in enumerate(before.queues):
            self.queues.append(queue)
            for eventfds in (self.kicks, self.calls, self.errors):
                eventfds.append(EventFd())
            assert isinstance(queue, MockSplitDriver)
            self.set_up(index, base=queue.used_idx)
            self.kick(index)

    # --- using it --------------------------------------------------------------------------------

    def kick(self, index: int = 0) -> None:
        """Notify the back end that ring `index` has new buffers."""
        self.kicks[index].signal()

    def _wait_for_buffer(self, index: int) -> None:
        has_used = self.queues[index].has_used
        self.wait(has_used, f"queue {index} to return a buffer")

    def wait_called(self, index: int = 0) -> None:
        """Wait until the back end has signalled that it used buffers of ring `index`."""
        self.wait(lambda: self.calls[index].drain() > 0, f"a call of queue {index}")

    def wait_error(self, index: int = 0) -> None:
        """Wait until the back end has signalled that ring `index` has failed."""
        self.wait(lambda: self.errors[index].drain() > 0, f"an error of queue {index}")

    def wait_gone(self) -> None:
        """Wait until the back end has closed the connection."""
        while True:
            try:
                if not self.connection.recv(4096):
                    return
            except ConnectionResetError:
                return

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition` holds. Raises DriverTimeout."""
        deadline = time.monotonic() + SAFETY_TIMEOUT
        while not condition():
            if time.monotonic() > deadline:
                rings = "\n".join(queue.dump() for queue in self.queues)
                raise DriverTimeout(f"waited for {what}\n{rings}")
            time.sleep(0.0002)


def connect(path: str | os.PathLike[str]) -> socket.socket:
    """A connection to the back end at `path`, once it listens. Raises DriverTimeout."""
    deadline = time.monotonic() + SAFETY_TIMEOUT
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(os.fspath(path))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
        if time.monotonic() > deadline:
            raise DriverTimeout(f"nobody listens at {path}")
        time.sleep(0.01)
