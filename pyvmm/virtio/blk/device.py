"""The virtio block device: requests from the queues, carried out by a backend.

Virtio 1.3, 5.2 Block Device. A request is carried out whole by the queue's own thread, so requests
of one queue complete in the order in which they came.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from threading import Lock
from typing import Any, NamedTuple

from pyvmm.errors import DriverError, HostError
from pyvmm.host.log import RateLimited
from pyvmm.host.saved import Saved
from pyvmm.virtio.blk.backend import Backend, cut_all, scatter
from pyvmm.virtio.blk.config import (
    BLK_SIZE_OFFSET,
    MAX_DISCARD_SECTORS,
    MAX_RANGE_SEGMENTS,
    MAX_WRITE_ZEROES_SECTORS,
    WRITEBACK_OFFSET,
    BlockConfig,
    read_zero_filled,
    topology,
)
from pyvmm.virtio.blk.fast_path import serve_usual
from pyvmm.virtio.blk.request import HEADER, NO_HEADER, SECTOR, RangesRequest, Request, parse
from pyvmm.virtio.blk.uapi import (
    FEATURE_NAMES,
    STATUS_NAMES,
    TYPE_NAMES,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
)
from pyvmm.virtio.constants import VIRTIO_ID_BLOCK
from pyvmm.virtio.device import Activation
from pyvmm.virtio.features import RING_FEATURES, has, mask
from pyvmm.virtio.queue.chain import DescriptorChain
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.worker import QueueDevice

# After this many bytes the driver gets to see what is done, even if more requests wait: with large
# ones a whole queue of them would keep the first from the guest for many milliseconds. More
# than 1 MiB, which Linux sends in two pieces: both are worth one interrupt.
BATCH_BYTES = 2 << 20
# A request may be as long as a chain, 4 GiB. The backend gets it in pieces: whatever it keeps of
# one is bounded, and the queue can stop between two of them (decision 0321).
PIECE_BYTES = 4 << 20
_PIECE_SECTORS = PIECE_BYTES // SECTOR
# Of a DISCARD or WRITE_ZEROES, which hold no memory, but may take their time.
RANGE_PIECE_BYTES = 32 << 20
# After a read that had to wait for the storage, the reads of so many batches are announced to it.
_LOOK_AHEAD = 32
# So much is looked at ahead of its turn where requests are not the usual ones: chains, descriptors.
_MOST_CHAINS, _MOST_PARTS = 128, 4096
_PATIENCE = 5.0  # seconds that requests may take which a smaller disk has to wait for
_MERGED = (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT)
Run = list[tuple[DescriptorChain, Request]]


class BlockEvent(NamedTuple):
    """One request as `--trace` shows it; `sector` in units of 512 bytes, `size` in bytes."""

    disk: str
    type: int
    sector: int
    size: int
    status: int
    reason: str

    def __str__(self) -> str:
        answer = STATUS_NAMES.get(self.status, "no answer")
        why = f" ({self.reason})" if self.reason else ""
        place = f"sector {self.sector} + {self.size} bytes"
        return f"{self.disk}: {_type_name(self.type)} {place}: {answer}{why}"


def _type_name(type: int) -> str:
    if type == NO_HEADER:
        return "a request without a header"
    return TYPE_NAMES.get(type, f"request type {type}")


def _ignore(line: str) -> None:
    pass


class _Halted(Exception):
    """The queue is to stop: what is left of the request has to wait until it goes on."""


class _Frozen(Exception):
    """The host failed and the user wants the VM stopped there: the request stays unanswered."""


class BlockDevice(QueueDevice):
    """A disk. `name` stands in messages; the guest reads `serial`, or else `name`, as its id."""

    device_type = VIRTIO_ID_BLOCK
    feature_names = FEATURE_NAMES

    def __init__(
        self,
        backend: Backend,
        *,
        name: str,
        serial: str = "",
        queue_size: int = 256,
        num_queues: int = 1,
        block_size: int = 0,
        seg_max: int = 0,
        stop: Callable[[str], None] | None = None,
        ring_features: int = RING_FEATURES,
        trace: Callable[[object], None] | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """Put a device in front of `backend`, which it does not close.

        `block_size` is what the guest takes for the logical block, in bytes, if not the backend's
        own. `seg_max` is how many pieces a request's data may have, if not as many as a chain in a
        queue of `queue_size` has room for. `stop` is told in one line of the first failure of the
        host; that request is never answered and nothing more is served. Without it a failure is
        IOERR for the guest. `trace` gets a `BlockEvent` for each request; `log` one line for each
        that failed, and is limited in rate unless given.
        `ring_features` are the bits of the rings that it offers. VIRTIO_F_IN_ORDER may be one of
        them, as each queue's thread carries out one request after the other.
        """
        self.name = name
        self.queue_sizes = (queue_size,) * num_queues
        self.features = ring_features | mask(
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_CONFIG_WCE,
            *((VIRTIO_BLK_F_RO,) if backend.read_only else (VIRTIO_BLK_F_WRITE_ZEROES,)),
            *((VIRTIO_BLK_F_DISCARD,) if _discards(backend) else ()),
            *((VIRTIO_BLK_F_MQ,) if num_queues > 1 else ()),
        )
        seg_max = seg_max or max(1, queue_size - 2)  # a chain holds header and status as well
        self._config = _config_of(backend, seg_max, num_queues, block_size).encode()
        self._id = (serial or name).encode()[:VIRTIO_BLK_ID_BYTES].ljust(VIRTIO_BLK_ID_BYTES, b"\0")
        self._backend = backend
        self._misses = backend.misses
        self._look_ahead = 0  # for so many batches
        self._capacity = backend.size_sectors
        self._config_lock = Lock()  # a leaf: for a change of one field among others
        self._accepted = 0
        self._write_through = False
        # Added to by every queue's thread, without a lock: no other thread comes in between there.
        self._bytes_to_guest = self._bytes_from_guest = self._flushes = self._errors = 0
        self._stop = stop
        self._trace = trace
        prefix = f"disk {name}: "
        self._log = log or RateLimited(prefix=prefix, device=name)
        self._host_log = log or RateLimited(prefix=prefix, device=name, error="io")

    @property
    def backend(self) -> Backend:
        """Its storage."""
        return self._backend

    @property
    def size(self) -> int:
        """The capacity in bytes."""
        return self._capacity * SECTOR

    @property
    def block_size(self) -> int:
        """The logical block that the driver is told of, in bytes."""
        return int.from_bytes(self._config[BLK_SIZE_OFFSET : BLK_SIZE_OFFSET + 4], "little")

    def peek(self, offset: int, size: int) -> bytes:
        """The bytes at `offset`, read beside the guest; fewer bytes than `size` past the end.

        Raises HostError, or what a class of the user's raises."""
        start = offset // SECTOR * SECTOR
        end = min(-(-(offset + size) // SECTOR) * SECTOR, self.size)
        if end <= start:
            return b""
        data = bytearray(end - start)
        self._backend.readv([memoryview(data)], len(data), start)
        return bytes(data[offset - start :][:size])

    def stats(self) -> Mapping[str, object]:
        """Bytes of data carried, flushes, and requests that were not answered OK."""
        return {
            "bytes_to_guest": self._bytes_to_guest,
            "bytes_from_guest": self._bytes_from_guest,
            "flushes": self._flushes,
            "errors": self._errors,
        }

    def read_config(self, offset: int, length: int) -> bytes:
        """struct virtio_blk_config, zero past its end (5.2.4, 2.5)."""
        return read_zero_filled(self._config, offset, length)

    def accept_features(self, features: int) -> None:
        """Begin with a writeback cache, if the driver can flush one (5.2.5.2 Device Requirements:
        Device Initialization). One that cannot takes a completed write for durable (5.2.6.2)."""
        self._accepted = features
        self._set_writeback(has(features, VIRTIO_BLK_F_FLUSH))

    def write_config(self, offset: int, data: bytes) -> None:
        """`writeback` alone may be written, and by drivers alone that accepted CONFIG_WCE."""
        known = offset == WRITEBACK_OFFSET and data in (b"\0", b"\1")
        if known and has(self._accepted, VIRTIO_BLK_F_CONFIG_WCE):
            self._set_writeback(data == b"\1")

    def _set_writeback(self, on: bool) -> None:
        self._write_through = not on
        self._set_config(WRITEBACK_OFFSET, bytes([on]))

    def _set_config(self, at: int, data: bytes) -> None:
        with self._config_lock:
            config = self._config
            self._config = config[:at] + data + config[at + len(data) :]

    @property
    def can_resize(self) -> bool:
        """True if `resize` may work."""
        return self._backend.can_resize

    def storage_for(self, size: int) -> int:
        """The bytes of storage that `size` bytes of disk take. Raises HostError if it cannot have
        that size."""
        return self._backend.storage_for(size)

    def resize(self, size: int | None, change: Callable[[], None] | None = None) -> int:
        """Give the disk `size` bytes, or (None) those that its storage has by now, and tell the
        driver: a configuration change notification (5.2.4, `capacity`). The new size in bytes.

        `change` is called first where the storage is somebody else's to resize. A disk that shrinks
        is smaller first and has less storage then, so that no request still on its way makes the
        file grow again. Not for two threads at once, nor with a queue's lock held. Raises
        HostError, or what `change` raises, and then the size is what the storage has.
        """
        try:
            if size is not None and size < self.size:
                self._set_capacity(size // SECTOR)
                self._let_requests_end()
            if change is not None:
                change()
            self._backend.resize(size)
        finally:
            self._set_capacity(self._backend.size_sectors)
            self.signal_config_change()
        return self.size

    def _set_capacity(self, sectors: int) -> None:
        self._capacity = sectors
        self._set_config(0, sectors.to_bytes(8, "little"))  # virtio_blk_config.capacity

    def _let_requests_end(self) -> None:
        for queue in self.queues_in_use:
            if not queue.claim(_PATIENCE):
                raise HostError(errno.EBUSY, f"requests of {self.name} that do not end")
            queue.lock.release()
            queue.kick.signal()

    def activate(self, activation: Activation) -> None:
        if activation.features != self._accepted:  # a device that is restored, say
            self.accept_features(activation.features)
        super().activate(activation)

    def reset(self) -> None:
        super().reset()
        self.accept_features(0)

    def fail_requests(self) -> bool:
        """See VirtioDevice. No sector is left, without a limit or a word about it; what the storage
        is in the middle of ends as usual."""
        self._stop = None
        self._log = self._host_log = _ignore
        self._capacity = 0
        if self.limits is not None:
            self.limits.lift()
        workers = self._workers
        for worker in workers.values():
            worker.wake()
        return bool(workers)

    def save(self) -> dict[str, Any]:
        """See VirtioDevice: the size that the driver knows, and its choice of the cache."""
        return {"capacity": self._capacity, "write_through": self._write_through}

    def restore(self, saved: Saved) -> None:
        """See VirtioDevice. Raises ConfigError also for a disk of another size."""
        capacity = saved.bits("capacity", 64)
        if capacity != self._capacity:
            raise saved.wrong(f"the disk had {capacity} sectors, and has {self._capacity}")
        self._set_writeback(not saved.flag("write_through"))

    def size_of(self, chain: DescriptorChain) -> int:
        """The data, without header and status; a limit counts it."""
        return max(0, chain.readable_size - HEADER.size, chain.writable_size - 1)

    def serve(self, queue: Queue) -> None:
        """Carry out the available requests, about BATCH_BYTES at the most.

        Reads of sectors that follow one another are carried out at once, and so are writes.
        """
        misses, expect = self._backend.misses, None
        if misses != self._misses or self._look_ahead > 0:
            self._look_ahead = self._look_ahead - 1 if misses == self._misses else _LOOK_AHEAD
            self._misses = misses
            expect = self._expect
        try:
            if self._trace is None and not serve_usual(
                queue, BATCH_BYTES, self._carry_out_run, expect
            ):
                return
            if expect is not None:
                self._expect_batch(queue)
            self._serve_batch(queue)
        except _Frozen:
            queue.end_serving()  # The worker waits for its stop from here on.

    def _expect(self, sector: int, end: int) -> None:
        """Of a read in several pieces the first is announced: the queue can stop behind it."""
        if end <= self._capacity:
            end = min(end, sector + _PIECE_SECTORS)
            self._backend.expect((end - sector) * SECTOR, sector * SECTOR)

    def _expect_batch(self, queue: Queue) -> None:
        """Announce the reads that `_serve_batch` is going to do, if they are several."""
        budget, parts = BATCH_BYTES, _MOST_PARTS
        taken: list[DescriptorChain] = []
        reads: list[tuple[int, int]] = []
        try:
            for chain in islice(queue, _MOST_CHAINS):
                taken.append(chain)
                parts -= len(chain.readable) + len(chain.writable)
                request = parse(chain)
                if request is not None:
                    end = request.sector + request.size // SECTOR
                    if (
                        request.type == VIRTIO_BLK_T_IN
                        and not request.refusal
                        and end <= self._capacity
                    ):
                        reads.append((request.sector, end))
                    budget -= request.size
                if budget <= 0 or parts <= 0:
                    break
        except DriverError:
            pass  # which is found again when it is its turn
        finally:
            for chain in reversed(taken):
                queue.step_back(chain)
        if len(reads) > 1:
            for sector, end in reads:
                self._expect(sector, end)

    def _serve_batch(self, queue: Queue) -> None:
        budget = BATCH_BYTES
        run: Run = []
        run_type, run_end = NO_HEADER, 0
        try:
            for chain in queue:
                request = parse(chain)
                if request is None:
                    self._finish(queue, run)
                    self._note_unanswerable(chain)
                    queue.add_used(chain, 0)
                    continue
                size = request.size
                if request.sector != run_end or request.type != run_type or request.refusal:
                    if run:
                        self._carry_out_all(queue, run)
                        if queue.halt:  # asked to stop meanwhile: this one was not begun
                            queue.step_back(chain)
                            return
                    merged = request.type in _MERGED and not request.refusal
                    run_type = request.type if merged else NO_HEADER
                    run_end = request.sector
                run_end += size // SECTOR
                run.append((chain, request))
                budget -= size
                if budget <= 0:
                    return
        finally:
            # Also when the ring turns out to be broken: these were taken before that.
            self._finish(queue, run)

    def _finish(self, queue: Queue, run: Run) -> None:
        """Carry out and return the requests of `run`; those that the queue's stop leaves undone are
        available again. `run` is empty then."""
        self._carry_out_all(queue, run)
        while run:
            queue.step_back(run.pop()[0])

    def _carry_out_all(self, queue: Queue, run: Run) -> None:
        """Carry out and return the requests of `run`; it keeps those that the queue's stop leaves
        undone, the first of them perhaps done in part: they may be done again.

        Two or more are reads, or writes, that follow one another on the disk.
        """
        todo = run[:]
        run.clear()
        if len(todo) > 1 and self._carry_out_at_once([request for _, request in todo]):
            for chain, request in todo:
                # A read or a write that succeeded: all that is writable was written.
                request.status[0] = VIRTIO_BLK_S_OK
                queue.add_used(chain, request.room + 1)
            return
        for index, (chain, request) in enumerate(todo):
            try:
                status = self._carry_out(request, queue)
            except _Halted:
                run += todo[index:]
                return
            queue.add_used(chain, request.answer(status))

    def _carry_out_at_once(self, requests: list[Request]) -> bool:
        """True if that could be done; if not, each has to be carried out for itself, to see which
        one it is that fails."""
        if self._trace is not None:
            return False
        first, last = requests[0], requests[-1]
        views: list[memoryview] = []
        for request in requests:
            views += request.data
        return self._carry_out_run(
            first.type, first.sector, last.sector + last.size // SECTOR, views
        )

    def _carry_out_run(self, type: int, sector: int, end: int, views: list[memoryview]) -> bool:
        """Read or write the sectors up to `end`; whether that could be done. If not, it is
        harmless to do a part of it again. The general way does what needs more than one piece."""
        backend = self._backend
        if end > self._capacity or end - sector > _PIECE_SECTORS:
            return False
        size = (end - sector) * SECTOR
        try:
            if type == VIRTIO_BLK_T_IN:
                backend.readv(views, size, sector * SECTOR)
                self._bytes_to_guest += size
                return True
            if backend.read_only:
                return False
            backend.writev(views, size, sector * SECTOR)
            if self._write_through:
                backend.flush()
        except (HostError, OSError):
            return False
        self._bytes_from_guest += size
        return True

    def _carry_out(self, request: Request, queue: Queue) -> int:
        """The status to answer. Raises _Halted between two pieces of it if `queue` is to stop."""
        status = request.refusal
        log: Callable[[str], None] = self._log
        if status == VIRTIO_BLK_S_OK:
            type = request.type
            try:
                if type == VIRTIO_BLK_T_IN:
                    status = self._read(request, queue)
                elif type == VIRTIO_BLK_T_OUT:
                    status = self._write(request, queue)
                elif type == VIRTIO_BLK_T_FLUSH:
                    self._backend.flush()
                    self._flushes += 1
                elif type == VIRTIO_BLK_T_GET_ID:
                    scatter(self._id, request.data)
                else:  # parse refuses all others
                    assert isinstance(request, RangesRequest)
                    status = self._change_ranges(request, queue)
            except (HostError, OSError) as error:  # the latter from a backend that a user wrote
                request.reason = " ".join(str(error).split())
                status = VIRTIO_BLK_S_IOERR
                if self._stop is not None:
                    self._freeze(request)
                log = self._host_log
        if status != VIRTIO_BLK_S_OK:
            self._note_failure(request, status, log)
        if self._trace is not None:
            self._trace(
                BlockEvent(
                    self.name, request.type, request.sector, request.size, status, request.reason
                )
            )
        return status

    def _read(self, request: Request, queue: Queue) -> int:
        sector, size = request.sector, request.size
        if sector + size // SECTOR > self._capacity:
            return self._past_the_end(request)
        if size:
            for views, count, offset in _pieces(request, queue):
                self._backend.readv(views, count, offset)
            self._bytes_to_guest += size
        return VIRTIO_BLK_S_OK

    def _write(self, request: Request, queue: Queue) -> int:
        backend, sector, size = self._backend, request.sector, request.size
        # Whether or not the driver accepted F_RO (5.2.6.2).
        if backend.read_only:
            request.reason = "a write to a read-only disk"
            return VIRTIO_BLK_S_IOERR
        if sector + size // SECTOR > self._capacity:
            return self._past_the_end(request)
        if size:
            for views, count, offset in _pieces(request, queue):
                backend.writev(views, count, offset)
            self._bytes_from_guest += size
            if self._write_through:
                backend.flush()
        return VIRTIO_BLK_S_OK

    def _change_ranges(self, request: RangesRequest, queue: Queue) -> int:
        discard = request.type == VIRTIO_BLK_T_DISCARD
        feature = VIRTIO_BLK_F_DISCARD if discard else VIRTIO_BLK_F_WRITE_ZEROES
        if not has(self._accepted, feature):
            request.reason = f"{FEATURE_NAMES[feature]} was not negotiated"
            return VIRTIO_BLK_S_UNSUPP
        limit = MAX_DISCARD_SECTORS if discard else MAX_WRITE_ZEROES_SECTORS
        for sector, count, _ in request.segments:
            if sector + count > self._capacity:
                return self._past_the_end(request)
            if count > limit:
                request.reason = f"{count} sectors in a segment, over {limit}"
                return VIRTIO_BLK_S_IOERR
        backend, limits = self._backend, self.limits
        for index, (offset, size, unmap) in enumerate(_range_pieces(request, queue)):
            if limits is not None:
                # The chain, one operation, is counted already. A discard writes no data.
                limits.charge(0 if discard else size, min(index, 1))
            if discard:
                backend.discard(offset, size)
            else:
                backend.write_zeroes(offset, size, unmap)
        if self._write_through and not discard:
            backend.flush()
        return VIRTIO_BLK_S_OK

    def _freeze(self, request: Request) -> None:
        assert self._stop is not None
        self._stop(f"disk {self.name}: {request.reason}")
        raise _Frozen

    def _past_the_end(self, request: Request) -> int:
        request.reason = f"past the end of the disk, which has {self._capacity} sectors"
        return VIRTIO_BLK_S_IOERR

    def _note_failure(self, request: Request, status: int, log: Callable[[str], None]) -> None:
        self._errors += 1
        what, answer = _type_name(request.type), STATUS_NAMES[status]
        log(f"{what} at sector {request.sector} answered {answer}: {request.reason}")

    def _note_unanswerable(self, chain: DescriptorChain) -> None:
        reason = f"no status byte in RAM: {chain!r}"
        self._log(f"a request cannot be answered, {reason}")
        if self._trace is not None:
            self._trace(BlockEvent(self.name, NO_HEADER, 0, 0, -1, reason))


def _pieces(request: Request, queue: Queue) -> Iterator[tuple[list[memoryview], int, int]]:
    """The views, size and offset in bytes of each part of a read or write, PIECE_BYTES at most.

    Raises _Halted in front of one if `queue` is to stop; never in front of the first.
    """
    size, offset = request.size, request.sector * SECTOR
    if size <= PIECE_BYTES:
        yield request.data, size, offset
        return
    first = offset
    for views, count in cut_all(request.data, PIECE_BYTES):
        if queue.halt and offset != first:
            raise _Halted
        yield views, count, offset
        offset += count


def _range_pieces(request: RangesRequest, queue: Queue) -> Iterator[tuple[int, int, bool]]:
    """The offset and size in bytes of what is to be discarded or zeroed, and whether storage may be
    freed: parts of RANGE_PIECE_BYTES at most, which end at multiples of it, so that no page and no
    cluster is cut in two. Raises _Halted as `_pieces` does.
    """
    first = True
    for sector, sectors, unmap in request.segments:
        offset, end = sector * SECTOR, (sector + sectors) * SECTOR
        while offset < end:
            if queue.halt and not first:
                raise _Halted
            first = False
            stop = min(end, (offset // RANGE_PIECE_BYTES + 1) * RANGE_PIECE_BYTES)
            yield offset, stop - offset, unmap
            offset = stop


def _discards(backend: Backend) -> bool:
    return backend.can_discard and not backend.read_only


def _config_of(backend: Backend, seg_max: int, num_queues: int, block_size: int) -> BlockConfig:
    """struct virtio_blk_config: zero where the feature is not offered (5.2.4)."""
    sizes = backend.block_sizes
    if block_size:
        sizes = sizes.with_logical(block_size)
    discards, zeroes = _discards(backend), not backend.read_only
    return BlockConfig(
        capacity=backend.size_sectors,
        seg_max=seg_max,
        num_queues=num_queues if num_queues > 1 else 0,
        max_discard_sectors=MAX_DISCARD_SECTORS if discards else 0,
        max_discard_seg=MAX_RANGE_SEGMENTS if discards else 0,
        discard_sector_alignment=sizes.physical // SECTOR if discards else 0,
        max_write_zeroes_sectors=MAX_WRITE_ZEROES_SECTORS if zeroes else 0,
        max_write_zeroes_seg=MAX_RANGE_SEGMENTS if zeroes else 0,
        write_zeroes_may_unmap=int(discards),
        **topology(sizes),
    )
