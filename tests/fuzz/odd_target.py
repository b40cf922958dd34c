"""Devices that are set up in unusual ways: disks with limits, that stop at failures, or whose reads
have to wait; a card behind a stream of frames; and a device of a user's that fails."""

from __future__ import annotations

import errno
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import net_rig
from fuzz import net_target
from fuzz.request import Request, pieces

from pyvmm.errors import DriverError, HostError
from pyvmm.host import tap
from pyvmm.host.files import open_image
from pyvmm.host.saved import Saved
from pyvmm.testing import Buffer, MmioDriver
from pyvmm.testing.blk_driver import IOERR, OK, BlockDriver, header
from pyvmm.virtio.blk.backend import FileBackend
from pyvmm.virtio.blk.device import BlockDevice
from pyvmm.virtio.device import Activation, VirtioDevice
from pyvmm.virtio.net import tap as tap_module
from pyvmm.virtio.net.device import NetDevice
from pyvmm.virtio.net.limits import Limits
from pyvmm.virtio.net.stream import LARGEST_THROUGH_PORT, NO_LENGTH, StreamBackend
from pyvmm.virtio.net.tap import TapBackend
from pyvmm.virtio.queue.chain import DescriptorChain
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.rate_limit import RateLimiter, TokenBucket, limited
from pyvmm.virtio.worker import QueueDevice, Rest, Serve

SECTORS = 1 << 15
FOREVER = 1 << 60


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1

    def __call__(self) -> int:
        return self.now


class Clocked(RateLimiter):
    """Limits by such a clock."""

    def __init__(self, rng: Random, clock: Clock) -> None:
        size, count = (TokenBucket(rate, rng.choice((0, 1, rate))) for rate in (1 << 16, 100))
        super().__init__(*rng.choice(((size, count), (size, None), (None, count))))
        self._clock = clock

    def around(self, serve: Serve, size_of: Callable[[DescriptorChain], int]) -> Serve:
        return limited(serve, self, size_of, self._clock)


# --- disks ---------------------------------------------------------------------------------------


class Slow(FileBackend):
    """A disk whose reads wait for the storage, that fails, and during whose requests somebody wants
    the queue to rest; when it is told to."""

    fails = 0.0
    waits = 0.0
    rests = 0.0
    device: OddDisk
    rng: Random

    def _meet(self) -> None:
        if self.rng.random() < self.waits:
            self.misses += 1
        if self.rng.random() < self.rests:
            for queue in self.device.queues_in_use:
                queue.end_serving()
        if self.rng.random() < self.fails:
            raise self.rng.choice((HostError(errno.EIO, "a fault"), OSError(errno.ENOSPC, "full")))

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        self._meet()
        super().readv(views, size, offset)

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        self._meet()
        super().writev(views, size, offset)

    def flush(self) -> None:
        self._meet()
        super().flush()

    def discard(self, offset: int, size: int) -> None:
        self._meet()
        super().discard(offset, size)

    def write_zeroes(self, offset: int, size: int, may_unmap: bool) -> None:
        self._meet()
        super().write_zeroes(offset, size, may_unmap)


class OddDisk(BlockDevice):
    """A device that knows its disk."""

    slow: Slow
    clock: Clock


@contextmanager
def make_disk(rng: Random) -> Iterator[VirtioDevice]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        image = Path(folder) / "disk"
        with open(image, "wb") as file:
            file.truncate(SECTORS * 512)
        slow = Slow(open_image(str(image), rng.random() < 0.1))
        disk = OddDisk(
            slow,
            name="odd",
            serial=rng.choice(("", "a serial number that is too long")),
            num_queues=rng.choice((1, 2)),
            block_size=rng.choice((0, 4096)),
            seg_max=rng.choice((0, 1)),
            stop=(lambda line: None) if rng.random() < 0.3 else None,
            trace=net_target.look_at if rng.random() < 0.3 else None,
            log=lambda line: None,
        )
        disk.slow, disk.clock = slow, Clock()
        slow.device, slow.rng = disk, Random(rng.getrandbits(32))
        slow.waits = rng.choice((0.0, 0.5))
        if rng.random() < 0.5:
            disk.limits = Clocked(rng, disk.clock)
        disk.poll_ns = rng.choice((0, 0, 200_000))
        try:
            yield disk
        finally:
            slow.close()


_HIGH = Buffer(0x40_0000, 0x1_0000), Buffer(0x5_0000, 0xA_0000)


def request_of_disk(rng: Random) -> Request:
    kind = rng.choice((0, 0, 0, 0, 1, 1, 4, 8, 11, 13, rng.getrandbits(32)))
    sector = rng.choice((0, 0, 8, 8, 16, SECTORS - 8, rng.randrange(SECTORS)))
    size = 512 * rng.choice((0, 1, 8, 8, 8))
    if kind == 0 and rng.random() < 0.15:  # more than a piece, into the same memory
        return Request(0, [header(0, sector)], [*[rng.choice(_HIGH)] * rng.randint(1, 12), 1])
    if kind in (11, 13):
        count = rng.choice((1, 8, 1 << 17, SECTORS, rng.getrandbits(32)))
        data = struct.pack("<QLL", sector, count, rng.choice((0, 1)))
        data *= rng.choice((1, 1, 2, 33))
    else:
        data = bytes(size) if kind == 1 else b""
    room = size if kind == 0 else 20 if kind == 8 else 0
    writable = [len(part) for part in pieces(rng, bytes(room + 1))]
    return Request(0, pieces(rng, header(kind, sector) + data), list(writable))


def stir_disk(device: VirtioDevice, rng: Random) -> None:
    """The storage fails and lets wait, time passes, the user looks and resizes."""
    assert isinstance(device, OddDisk)
    slow = device.slow
    slow.fails, slow.rests = rng.choice((0.0, 0.0, 0.3)), rng.choice((0.0, 0.0, 0.4))
    device.clock.now += rng.choice((0, 10**6, 10**9, 10**12))
    if rng.random() < 0.7:
        for queue in device.queues_in_use:
            queue.begin_serving()
            queue.kick.signal()
    kind = rng.randrange(8)
    if kind == 0 and not slow.read_only:
        with suppress(HostError):
            device.resize(512 * rng.choice((1, 9, SECTORS, 2 * SECTORS)))
        slow.rests = 0.0
        device.resize(512 * SECTORS)
    elif kind == 1:
        slow.fails = slow.rests = 0.0
        assert len(device.peek(rng.randrange(1 << 25), 100)) <= 100
        device.stats()
        device.read_config(rng.randrange(80), rng.randrange(9))
    elif kind == 2:
        device.write_config(32, rng.choice((b"\0", b"\1", b"\2")))


def check_disk(device: VirtioDevice, driver: MmioDriver) -> None:
    assert isinstance(device, OddDisk)
    device.slow.fails = device.slow.rests = 0.0
    device.clock.now += FOREVER
    for queue in device.queues_in_use:
        queue.begin_serving()
    disk = BlockDriver(driver, 0)
    assert disk.read(0, 512).status == OK
    assert device.fail_requests()  # it is taken away
    assert disk.read(0, 512).status == IOERR


# --- a card behind a stream ----------------------------------------------------------------------


class StreamCard(NetDevice):
    """A card that knows the other end of its stream."""

    end: socket.socket
    clock: Clock


@contextmanager
def make_stream(rng: Random) -> Iterator[VirtioDevice]:
    ours, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    end.setblocking(False)
    if rng.random() < 0.5:  # it is full soon
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    clock = Clock()
    ways = [Limits(Clocked(rng, clock), clock) if rng.random() < 0.3 else None for _ in range(2)]
    largest = rng.choice((65535, LARGEST_THROUGH_PORT))
    backend = StreamBackend(ours.detach(), net_rig.MTU, largest)
    card = StreamCard(
        backend,
        name="fuzzed",
        mac=net_rig.MAC,
        log=lambda line: None,
        trace=net_target.look_at if rng.random() < 0.3 else None,
        receive_limits=ways[0],
        send_limits=ways[1],
    )
    card.end, card.clock = end, clock
    try:
        yield card
    finally:
        end.close()
        backend.close()


def _framed(frame: bytes, length: int | None = None) -> bytes:
    return struct.pack(">L", len(frame) if length is None else length) + frame


def stir_stream(device: VirtioDevice, rng: Random) -> None:
    """The other end sends frames, some in pieces or with a wrong length, takes some, or leaves."""
    assert isinstance(device, StreamCard)
    device.clock.now += rng.choice((0, 10**6, 10**9))
    if not rng.randrange(10):
        device.set_link(rng.random() < 0.7)
    kind = rng.randrange(100)
    with suppress(OSError):
        if kind < 60:
            frame = net_rig.frame(rng.choice(net_target.SIZES[2:9]))
            data = b"".join(_framed(frame) for _ in range(rng.choice((1, 1, 3, 40))))
            device.end.send(data[: rng.randint(0, len(data))] if kind < 20 else data)
        elif kind < 65:
            device.end.send(_framed(bytes(rng.randrange(70)), rng.choice((0, 1, 13, 70_000))))
            device.end.send(bytes(70_000))
        elif kind < 67:
            device.end.send(_framed(b"", rng.choice((NO_LENGTH, NO_LENGTH + 1, 0xFFFF_FFFF))))
        elif kind < 69:
            device.end.close()
        for _ in range(rng.choice((0, 0, 1, 100))):
            if not device.end.recv(1 << 17):
                break


def check_stream(device: VirtioDevice, driver: MmioDriver) -> None:
    """The driver gets all back that it sends, and what the other end has sent if it is there."""
    assert isinstance(device, StreamCard)
    device.clock.now += FOREVER
    frame = [net_rig.header() + net_rig.frame(fill=0x11)]
    driver.submit(net_target.TX, frame, [])
    for _ in range(1000):  # what was kept is longer than what a small stream takes
        with suppress(OSError):
            while device.end.recv(1 << 17):
                pass
        driver.kick(net_target.TX)
        if driver.queues[net_target.TX].pop_used() is not None:
            break
    else:
        raise AssertionError("a frame is neither sent nor dropped")
    driver.request(net_target.CONTROL, [b"\0\0\1"], [1])


# --- a card on a tap ------------------------------------------------------------------------------


class Taps(TapBackend):
    """A tap, the kernel's part of which is socket pairs. It may be removed."""

    rng: Random

    def __init__(self, rng: Random) -> None:
        self.rng, self.gone = rng, False
        pairs = [
            socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for _ in range(rng.choice((1, net_target.PAIRS)))
        ]
        self.ends = [end for _, end in pairs]
        for ours, end in pairs:
            ours.setblocking(False)
            end.setblocking(False)
        with mock.patch.object(tap, "has_udp_segmentation", lambda fd: rng.random() < 0.5):
            super().__init__([ours.detach() for ours, _ in pairs], net_rig.MTU)

    def _ask(self, *_: object) -> None:
        if self.gone:
            raise HostError(errno.EBADFD, "the tap")

    def set_offloads(self, features: int) -> None:
        with mock.patch.object(tap, "set_offload", self._ask):
            super().set_offloads(features)

    def set_active(self, pairs: int) -> None:
        with mock.patch.object(tap, "attach_queue", lambda fd, on: None):
            super().set_active(pairs)

    def close(self) -> None:
        super().close()
        for end in self.ends:
            end.close()


class TapCard(NetDevice):
    """A card that knows its tap."""

    cable: Taps


@contextmanager
def make_tap(rng: Random) -> Iterator[VirtioDevice]:
    cable = Taps(Random(rng.getrandbits(32)))
    card = TapCard(cable, name="fuzzed", mac=net_rig.MAC, log=lambda line: None)
    card.cable = cable
    try:
        with mock.patch.multiple(
            tap_module,
            _readv=_some_fail(rng, os.readv, cable),
            _writev=_some_fail(rng, os.writev, cable),
        ):
            yield card
    finally:
        cable.close()


def _some_fail(rng: Random, real: Callable[..., int], cable: Taps) -> Callable[..., int]:
    """What the kernel cannot make a header of, and a tap that is gone."""
    chance = Random(rng.getrandbits(32))

    def call(fd: int, views: list[memoryview]) -> int:
        if cable.gone:
            raise OSError(errno.EBADFD, "gone")
        if chance.random() < 0.05:
            raise OSError(chance.choice((errno.EINVAL, errno.ENOMEM)), "a fault")
        return real(fd, views)

    return call


def stir_tap(device: VirtioDevice, rng: Random) -> None:
    assert isinstance(device, TapCard)
    device.cable.gone |= not rng.randrange(60)
    net_target.send_and_take(device, device.cable.ends, rng)


def check_tap(device: VirtioDevice, driver: MmioDriver) -> None:
    """The driver gets all back that it sends."""
    driver.request(net_target.TX, [net_rig.header() + net_rig.frame(fill=0x11)], [])


# --- a device of a user's ------------------------------------------------------------------------


class Failing(QueueDevice):
    """Fills buffers, and fails where it is told to."""

    name, device_type, queue_sizes = "user", 4, (16, 16)
    fails: Exception | None = None
    rest: Rest | None = None
    rng: Random

    def serve(self, queue: Queue) -> Rest | None:
        for chain in queue:
            if self.fails is not None and self.rng.random() < 0.5:
                raise self.fails
            writer = chain.writer()
            writer.write(bytes(writer.available))
            queue.add_used(chain, writer.written)
        return self.rest

    def _fail(self) -> None:
        if self.fails is not None and self.rng.random() < 0.2:
            raise self.fails

    def read_config(self, offset: int, length: int) -> bytes:
        self._fail()
        return bytes(length + self.rng.choice((0, 0, -1, 1)))

    def write_config(self, offset: int, data: bytes) -> None:
        self._fail()

    def accept_features(self, features: int) -> None:
        self._fail()

    def activate(self, activation: Activation) -> None:
        self._fail()
        super().activate(activation)

    def start_queue(self, queue: Queue) -> None:
        self._fail()
        super().start_queue(queue)

    def reset_queue(self, index: int) -> None:
        super().reset_queue(index)
        self._fail()

    def reset(self) -> None:
        super().reset()
        self._fail()

    def save(self) -> dict[str, Any]:
        return {}

    def restore(self, saved: Saved) -> None:
        self._fail()


@contextmanager
def make_failing(rng: Random) -> Iterator[VirtioDevice]:
    device = Failing()
    device.rng = Random(rng.getrandbits(32))
    yield device


def request_of_failing(rng: Random) -> Request:
    return Request(rng.randint(0, 1), [], [len(part) for part in pieces(rng, bytes(64))])


def _none() -> None:
    return None


_FAILURES: tuple[Callable[[], Exception], ...] = (
    lambda: ValueError("two\nlines"),
    lambda: DriverError("a rule", section="2.1"),
    lambda: HostError(errno.EIO, "a host"),
    lambda: OSError(errno.ENOSPC, "full"),
    ZeroDivisionError,
    MemoryError,
    lambda: RecursionError("deep"),
)


def settle_failing(device: VirtioDevice) -> None:
    assert isinstance(device, Failing)
    device.fails = device.rest = None


def stir_failing(device: VirtioDevice, rng: Random) -> None:
    assert isinstance(device, Failing)
    # Another one each time: an exception keeps what it came through.
    device.fails = rng.choice((_none, _none, *_FAILURES))()
    device.rest = rng.choice((None, Rest(kicks=False), Rest(seconds=1), Rest(sources=False)))


def check_failing(device: VirtioDevice, driver: MmioDriver) -> None:
    assert driver.request(0, [], [64]) == (64, bytes(64))
