"""The devices that are fuzzed: how to make one, what a lawful driver asks of it, whether it lives.

A target is a context manager that makes a device, and two functions of its driver. A new device
joins by a row in TARGETS.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import NamedTuple
from unittest import mock

import pmem_rig
from fuzz import balloon_target, console_target, net_target, odd_target, vhost_target
from fuzz.request import Request, pieces

from pyvmm.errors import HostError
from pyvmm.host.files import open_image
from pyvmm.host.named_listener import NamedListener
from pyvmm.testing import Buffer, MmioDriver
from pyvmm.testing.blk_driver import OK, BlockDriver, header
from pyvmm.testing.vsock_driver import REQUEST, RESPONSE, RST, Packet, VsockDriver
from pyvmm.virtio.blk.backend import Backend, FileBackend
from pyvmm.virtio.blk.device import BlockDevice
from pyvmm.virtio.blk.overlay_file import open_overlay
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.pmem.device import PmemDevice
from pyvmm.virtio.rng.device import EntropyDevice
from pyvmm.virtio.vsock import switch
from pyvmm.virtio.vsock.device import VsockDevice

DISK_SECTORS = 128


class Target(NamedTuple):
    """`request` makes up a lawful request; `check` has the device serve a good one, and raises
    AssertionError if it does not. `stir` is what the host does meanwhile. `prompt` are
    the queues whose chains all come back at once; a device with no others may be used with
    VIRTIO_F_IN_ORDER. One that `may_fail` has defects of its own, but none after `settle`.
    One that `offloads` has its rings, split ones, in others' hands.
    `begin` is what a driver asks for first, so that there is something to go wrong later."""

    make: Callable[[Random], AbstractContextManager[VirtioDevice]]
    request: Callable[[Random], Request]
    check: Callable[[VirtioDevice, MmioDriver], None]
    prompt: tuple[int, ...] = ()
    stir: Callable[[VirtioDevice, Random], None] = lambda device, rng: None
    may_fail: bool = False
    offloads: bool = False
    begin: Callable[[Random], list[Request]] = lambda rng: []
    settle: Callable[[VirtioDevice], None] = lambda device: None


# --- virtio-blk ----------------------------------------------------------------------------------


@contextmanager
def _disk(rng: Random) -> Iterator[VirtioDevice]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        image = Path(folder) / "disk"
        image.write_bytes(bytes(DISK_SECTORS * 512))
        backend = FileBackend(open_image(str(image), False))
        try:
            yield BlockDevice(backend, name="fuzzed", num_queues=2, log=lambda line: None)
        finally:
            backend.close()
            assert image.stat().st_size == DISK_SECTORS * 512, "the disk has grown"


class Faulty(FileBackend):
    """A disk that fails while it is told to."""

    fails = False

    def _fail(self) -> None:
        if self.fails:
            raise HostError(errno.EIO, "a fault")

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        self._fail()
        super().readv(views, size, offset)

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        self._fail()
        super().writev(views, size, offset)

    def flush(self) -> None:
        self._fail()
        super().flush()

    def discard(self, offset: int, size: int) -> None:
        self._fail()
        super().discard(offset, size)

    def write_zeroes(self, offset: int, size: int, may_unmap: bool) -> None:
        self._fail()
        super().write_zeroes(offset, size, may_unmap)


class FaultyDisk(BlockDevice):
    """A device that knows its disk."""

    faulty: Faulty


@contextmanager
def _faults(rng: Random) -> Iterator[VirtioDevice]:
    """Of sectors of 4 KiB, and traced."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        image = Path(folder) / "disk"
        image.write_bytes(bytes(DISK_SECTORS * 512))
        backend = Faulty(open_image(str(image), False))
        try:
            disk = FaultyDisk(
                backend,
                name="fuzzed",
                num_queues=2,
                block_size=4096,
                trace=net_target.look_at,
                log=lambda line: None,
            )
            disk.faulty = backend
            yield disk
        finally:
            backend.close()


def _faults_stir(device: VirtioDevice, rng: Random) -> None:
    assert isinstance(device, FaultyDisk)
    device.faulty.fails = rng.random() < 0.4


def _faults_check(device: VirtioDevice, driver: MmioDriver) -> None:
    assert isinstance(device, FaultyDisk)
    device.faulty.fails = False
    for queue in (0, 1):
        disk = BlockDriver(driver, queue)
        data = b"alive%d\n" % queue * 585 + b"\0"
        assert disk.write(8 * queue, data).status == OK
        assert disk.read(8 * queue, 4096).data == data


_BASE = bytes(range(256)) * 2 * DISK_SECTORS


@contextmanager
def _overlay(rng: Random) -> Iterator[VirtioDevice]:
    """Changes kept beside an image, which stays as it is whatever the driver does."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, ExitStack() as closing:
        image, changes = Path(folder) / "disk", f"{folder}/changes"
        image.write_bytes(_BASE)
        base = FileBackend(open_image(str(image), read_only=True))
        closing.callback(base.close)
        with _opened_overlay(base, changes) as backend:
            yield BlockDevice(backend, name="fuzzed", num_queues=2, log=lambda line: None)
        assert image.read_bytes() == _BASE, "the base of an overlay has changed"
        with _opened_overlay(base, changes):
            pass  # what was written can be opened again


@contextmanager
def _opened_overlay(base: Backend, changes: str) -> Iterator[Backend]:
    backend = open_overlay(base, changes)
    try:
        yield backend
    finally:
        backend.close()


def _overlay_stir(device: VirtioDevice, rng: Random) -> None:
    """The disk gets another size, and the one that it had."""
    assert isinstance(device, BlockDevice)
    if not rng.randrange(8):
        device.resize(512 * rng.choice((1, 9, DISK_SECTORS, 2 * DISK_SECTORS)))
        device.resize(512 * DISK_SECTORS)


def _disk_request(rng: Random) -> Request:
    # IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, and types that there are not
    kind = rng.choice((0, 0, 0, 1, 1, 1, 4, 8, 11, 13, 14, rng.getrandbits(32)))
    sector = rng.choice((0, 8, DISK_SECTORS - 1, DISK_SECTORS, rng.getrandbits(64)))
    size = 512 * rng.choice((0, 1, 1, 2, 8))
    if kind in (11, 13):
        data = struct.pack("<QLL", sector, size // 512, rng.choice((0, 0, 1, 0xFFFF_FFFF)))
    else:
        data = bytes(size) if kind == 1 else b""
    room = size if kind == 0 else 20 if kind == 8 else 0
    writable = [len(part) for part in pieces(rng, bytes(room + 1))]
    return Request(rng.randint(0, 1), pieces(rng, header(kind, sector) + data), writable)


def _disk_check(device: VirtioDevice, driver: MmioDriver) -> None:
    for queue in (0, 1):
        disk = BlockDriver(driver, queue)
        data = b"alive%d\n" % queue * 73 + b"\0"
        assert disk.write(queue, data).status == OK
        assert disk.read(queue, 512).data == data


# --- virtio-rng ----------------------------------------------------------------------------------


@contextmanager
def _rng(rng: Random) -> Iterator[VirtioDevice]:
    yield EntropyDevice()


def _rng_request(rng: Random) -> Request:
    size = rng.choice((0, 1, 64, 4096, 1 << 17))
    return Request(0, [], [len(part) for part in pieces(rng, bytes(size))])


def _rng_check(device: VirtioDevice, driver: MmioDriver) -> None:
    written, data = driver.request(0, [], [64])
    assert written == 64 and any(data)


# --- virtio-vsock --------------------------------------------------------------------------------

GUEST_CID = 3
LISTENING_PORT = 52
FIRST_OF_THE_HOST = 1 << 30  # ports that callers get, one after the other
MOST_ENDS = 8
COMMANDS = (
    *(b"CONNECT 1000\n", b"CONNECT 1001\r\nand more", b"CONNECT 4294967295\n", b"CONN"),
    *(b"CONNECT 4294967296\n", b"CONNECT x\n", b"HELO\n", bytes(100)),
)


class Vsock(VsockDevice):
    """A device that knows the host's programs."""

    program: socket.socket  # listens for the guest
    path: str
    ends: list[socket.socket]


@contextmanager
def _vsock(rng: Random) -> Iterator[VirtioDevice]:
    """With programs of the host that accept nothing unless they are stirred: connections stay, and
    fill up."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = f"{folder}/v"
        with NamedListener(path) as listener, socket.socket(socket.AF_UNIX) as program:
            program.bind(f"{path}_{LISTENING_PORT}")
            program.listen(4)
            program.setblocking(False)
            trace = net_target.look_at if rng.random() < 0.2 else None
            device = Vsock(GUEST_CID, listener.socket, path, log=lambda line: None, trace=trace)
            device.program, device.path, device.ends = program, path, []
            # So many streams that there are never too many, or nearly none; and answers that are
            # late, or are not.
            most, seconds = rng.choice(((512, 10.0), (512, 10.0), (2, 10.0), (512, 0.0)))
            try:
                with mock.patch.multiple(switch, MAX_STREAMS=most, ANSWER_SECONDS=seconds):
                    yield device
            finally:
                for end in device.ends:
                    end.close()


def _call(device: Vsock, rng: Random) -> None:
    """The monitor itself calls the guest."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    try:
        device.call(ours, rng.choice((1000, 1001)))
        device.ends.append(theirs)
    except HostError:  # there is no driver
        ours.close()
        theirs.close()
    if not rng.randrange(4):
        device.interrupt_streams()


def _vsock_stir(device: VirtioDevice, rng: Random) -> None:
    """Programs accept, call, talk, listen, and leave."""
    assert isinstance(device, Vsock)
    kind = rng.randrange(10)
    with suppress(OSError):
        if kind == 0 or (kind > 1 and not device.ends):
            device.ends.append(device.program.accept()[0])
        elif kind == 1 and len(device.ends) < MOST_ENDS:
            caller = socket.socket(socket.AF_UNIX)
            device.ends.append(caller)
            caller.setblocking(False)
            caller.connect(device.path)
            caller.send(rng.choice(COMMANDS))
        elif device.ends:
            end = rng.choice(device.ends)
            end.setblocking(False)
            if kind < 4:
                end.send(rng.randbytes(rng.choice((1, 300, 8192, 1 << 16))))
            elif kind < 6:
                end.recv(1 << 17)
            elif kind == 6:
                end.shutdown(rng.choice((socket.SHUT_RD, socket.SHUT_WR)))
            elif kind == 7:
                device.ends.remove(end)
                end.close()
            elif kind == 8 and rng.random() < 0.3 and device._active is not None:
                for stream in device._active._switch._streams.values():  # they are full soon
                    stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            elif kind == 8 and len(device.ends) < MOST_ENDS:
                _call(device, rng)


_VSOCK_BUFFERS: tuple[list[int | Buffer], ...] = (
    *([44, 4096],) * 4,
    *([44], [44, 1], [20, 24, 4096], [44, 64, 4000], [4140], [43]),
)


def _vsock_begin(rng: Random) -> list[Request]:
    """Buffers, and a stream with credit."""
    wanted = Packet(
        REQUEST, src_port=1000, dst_port=LISTENING_PORT, buf_alloc=rng.choice((0, 5000, 1 << 18))
    )
    buffers = [Request(0, [], rng.choice(_VSOCK_BUFFERS)) for _ in range(rng.randrange(9))]
    return [*buffers, Request(1, [wanted.pack_header(GUEST_CID)], []), Request(2, [], [8])]


def _vsock_request(rng: Random) -> Request:
    kind = rng.randrange(9)
    if kind < 3:
        return Request(0, [], rng.choice(_VSOCK_BUFFERS))
    if kind == 3:
        return Request(2, [], [8])
    if kind == 8:  # an answer to a caller
        packet = Packet(
            RESPONSE,
            src_port=rng.choice((1000, 1001)),
            dst_port=FIRST_OF_THE_HOST + rng.randrange(3),
            buf_alloc=1 << 18,
        )
        return Request(1, [packet.pack_header(GUEST_CID)], [])
    data = bytes(rng.choice((0, 0, 1, 100, 4096)))
    if kind > 5:  # of one connection: REQUEST, RW, SHUTDOWN, CREDIT_REQUEST
        op = rng.choice((1, 1, 5, 5, 5, 5, 4, 7))
        packet = Packet(
            op, src_port=1000, dst_port=LISTENING_PORT, data=data if op == 5 else b"",
            flags=rng.randrange(4) if op == 4 else 0, buf_alloc=1 << 18,
        )  # fmt: skip
        return Request(1, pieces(rng, packet.pack_header(GUEST_CID) + packet.data), [])
    packet = Packet(
        rng.choice((*range(0, 9), 0xFFFF)),
        src_port=rng.choice((1000, 1000, 1001)),
        dst_port=rng.choice(
            (LISTENING_PORT, LISTENING_PORT, 53, FIRST_OF_THE_HOST, FIRST_OF_THE_HOST + 1)
        ),
        data=data,
        flags=rng.randrange(4),
        buf_alloc=rng.choice((1 << 18, 0, 0xFFFF_FFFF)),
        fwd_cnt=rng.choice((0, 0, 100, 0xFFFF_FFFF)),
        len=rng.choice((None, None, None, 1 << 16)),
    )
    return Request(1, pieces(rng, packet.pack_header(GUEST_CID) + data), [])


def _vsock_check(device: VirtioDevice, driver: MmioDriver) -> None:
    guest = VsockDriver(driver, GUEST_CID)
    guest.offer(2)  # each that is received is given back
    guest.send(Packet(REQUEST, src_port=7, dst_port=LISTENING_PORT + 1))
    for _ in range(4 * MOST_ENDS):  # those who call come first, and go
        answer = guest.receive()
        if answer.dst_port == 7:
            break
    assert (answer.op, answer.dst_port) == (RST, 7)  # nobody listens there


# --- virtio-pmem ---------------------------------------------------------------------------------


@contextmanager
def _pmem(rng: Random) -> Iterator[VirtioDevice]:
    storage = pmem_rig.Storage()
    with pmem_rig.pmem(storage, log=[]) as device:
        os.pwrite(device._fd, b"content", 4096)
        if rng.random() < 0.2:  # of this guest alone, and never stored
            device._private, device._sync = _Pages(), lambda fd: None  # type: ignore[assignment]
        device.fuzzed_storage = storage  # type: ignore[attr-defined]
        yield device


class _Pages:
    """Memory of one guest: holes, and what it has touched."""

    def touched(self) -> Iterator[memoryview | int]:
        yield 4096
        yield memoryview(bytes(range(256)) * 32)
        yield 4096


def _pmem_stir(device: VirtioDevice, rng: Random) -> None:
    """Somebody saves its contents; rarely the storage fails, after which no flush succeeds."""
    assert isinstance(device, PmemDevice)
    if rng.random() < 0.1:
        assert sum(len(piece) for _, piece in device.contents()) <= device.size
    if rng.random() < 0.02:
        device.fuzzed_storage.break_down()  # type: ignore[attr-defined]


def _pmem_request(rng: Random) -> Request:
    kind = struct.pack("<L", rng.choice((0, 0, 0, 1, rng.getrandbits(32))))
    readable = kind[: rng.choice((0, 2, 4, 4, 4))]
    room = bytes(rng.choice((0, 3, 4, 4, 4, 64)))
    return Request(0, pieces(rng, readable), [len(part) for part in pieces(rng, room)])


def _pmem_check(device: VirtioDevice, driver: MmioDriver) -> None:
    answers = [driver.request(0, [pmem_rig.FLUSH], [4]) for _ in range(2)]
    assert isinstance(device, PmemDevice)
    broken = device.fuzzed_storage.error and not device._private  # type: ignore[attr-defined]
    assert answers[1] == (4, pmem_rig.FAILED if broken else pmem_rig.DONE)


_NET = Target(
    net_target.make,
    net_target.request,
    net_target.check,
    stir=net_target.stir,
    begin=net_target.begin,
)
TARGETS = {
    "blk": Target(_disk, _disk_request, _disk_check, prompt=(0, 1)),
    "overlay": Target(_overlay, _disk_request, _disk_check, prompt=(0, 1), stir=_overlay_stir),
    "faults": Target(_faults, _disk_request, _faults_check, prompt=(0, 1), stir=_faults_stir),
    "net": _NET,
    "pairs": _NET._replace(make=net_target.make_pairs, request=net_target.request_of_pairs),
    "stream": _NET._replace(
        make=odd_target.make_stream, check=odd_target.check_stream, stir=odd_target.stir_stream
    ),
    "tap": _NET._replace(
        make=odd_target.make_tap, check=odd_target.check_tap, stir=odd_target.stir_tap
    ),
    "vhost": _NET._replace(
        make=vhost_target.make,
        check=vhost_target.check,
        stir=vhost_target.stir,
        begin=lambda rng: [],
        may_fail=True,
        settle=vhost_target.settle,
        offloads=True,
    ),
    "odd": Target(
        odd_target.make_disk,
        odd_target.request_of_disk,
        odd_target.check_disk,
        stir=odd_target.stir_disk,
    ),
    "user": Target(
        odd_target.make_failing,
        odd_target.request_of_failing,
        odd_target.check_failing,
        stir=odd_target.stir_failing,
        may_fail=True,
        settle=odd_target.settle_failing,
    ),
    "rng": Target(_rng, _rng_request, _rng_check, prompt=(0,)),
    "balloon": Target(
        balloon_target.make,
        balloon_target.request,
        balloon_target.check,
        stir=balloon_target.stir,
    ),
    "console": Target(
        console_target.make,
        console_target.request,
        console_target.check,
        stir=console_target.stir,
        begin=console_target.begin,
    ),
    "pmem": Target(_pmem, _pmem_request, _pmem_check, prompt=(0,), stir=_pmem_stir),
    "vsock": Target(_vsock, _vsock_request, _vsock_check, stir=_vsock_stir, begin=_vsock_begin),
}
