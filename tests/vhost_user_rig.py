"""A device behind our vhost-user back end, in a thread, and a front end that drives it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pyvmm.errors import PyvmmError
from pyvmm.memory import GuestMemory
from pyvmm.testing.vhost_user_driver import VhostUserDriver
from pyvmm.transport.vhost_user import serve_connection
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.worker import QueueDevice

MIB = 1 << 20
HOLE_END = 4 * MIB


class UnsealedMemory(GuestMemory):
    """Memory as most front ends lend it: of a file that may be cut short later."""

    _fixed = False


class Echo(QueueDevice):
    """Answers each chain with the bytes that it reads, and keeps a byte of configuration."""

    device_type = 42
    features = 1 << 28 | 1 << 29  # INDIRECT_DESC, EVENT_IDX

    def __init__(self, queue_sizes: tuple[int, ...] = (64, 64), *, packed: bool = False) -> None:
        self.name = "echo"
        self.features = Echo.features | (1 << 34 if packed else 0)
        self.queue_sizes = queue_sizes
        self.space = bytearray(b"configuration")

    def read_config(self, offset: int, length: int) -> bytes:
        return bytes(self.space[offset : offset + length]).ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        self.space[offset : offset + len(data)] = data

    def serve(self, queue: Queue) -> None:
        for chain in queue:
            writer = chain.writer()
            writer.write(chain.reader().read(chain.readable_size)[: writer.available])
            queue.add_used(chain, writer.written)


@dataclass
class Rig:
    """`driver` has connected and said nothing yet; `error` is what ended the back end."""

    device: VirtioDevice
    driver: VhostUserDriver
    memory: GuestMemory
    thread: threading.Thread
    lines: list[str] = field(default_factory=list)
    error: PyvmmError | None = None

    def ended(self) -> PyvmmError | None:
        """Wait until the back end has ended; what ended it, or None if the front end left."""
        self.thread.join(60)
        assert not self.thread.is_alive(), "the back end hangs"
        return self.error

    def echoes(self, index: int = 0, data: bytes = b"is anybody there?") -> bool:
        return self.driver.request(index, [data], [len(data)]) == (len(data), data)


@contextmanager
def connected(device: VirtioDevice) -> Iterator[Rig]:
    """A back end in a thread with a front end at its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    memory = GuestMemory([(0, MIB), (HOLE_END, 0x10000)])

    def serve() -> None:
        try:
            with ours:
                serve_connection(device, ours, log=rig.lines.append)
        except PyvmmError as error:
            rig.error = error

    thread = threading.Thread(target=serve)
    rig = Rig(device, VhostUserDriver(theirs, memory), memory, thread)
    thread.start()
    try:
        yield rig
    finally:
        rig.driver.close()
        thread.join(60)
        memory.close()
        assert not thread.is_alive(), "the back end hangs"
        # A fixture's value outlives it, and its mapping holds a file descriptor.
        vars(rig.driver).clear()
        vars(rig).clear()


@contextmanager
def started(device: VirtioDevice | None = None, sizes: Sequence[int] = (64,)) -> Iterator[Rig]:
    """The same with the device's rings running."""
    with connected(Echo() if device is None else device) as rig:
        rig.driver.start(sizes=sizes)
        yield rig
