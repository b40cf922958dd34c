"""The virtio balloon device: memory that the guest does not need goes back to the host.

Virtio 1.3, 5.5 Traditional Memory Balloon Device. Pages are given back by punching holes into the
file that guest memory is; a page that the guest uses again is a fresh one, all zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Condition
from typing import Any

from pyvmm.errors import ConfigError, DriverError, HostError
from pyvmm.host.log import RateLimited, Sink
from pyvmm.host.poller import Poller
from pyvmm.host.saved import Saved
from pyvmm.memory import GuestMemory
from pyvmm.virtio.balloon.pages import (
    PAGE,
    in_ram,
    ranges_of,
    read_page_numbers,
    whole_pages,
)
from pyvmm.virtio.balloon.uapi import (
    ACTUAL_OFFSET,
    CONFIG,
    DEFLATE,
    FEATURE_NAMES,
    FREE_PAGE,
    INFLATE,
    POISON_VAL_OFFSET,
    REPORTING,
    STAT,
    STAT_NAMES,
    STATS,
    VIRTIO_BALLOON_CMD_ID_STOP,
    VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
    VIRTIO_BALLOON_F_FREE_PAGE_HINT,
    VIRTIO_BALLOON_F_PAGE_POISON,
    VIRTIO_BALLOON_F_REPORTING,
    VIRTIO_BALLOON_F_STATS_VQ,
)
from pyvmm.virtio.constants import VIRTIO_ID_BALLOON
from pyvmm.virtio.device import Activation, VirtioDevice
from pyvmm.virtio.features import RING_FEATURES, has, mask
from pyvmm.virtio.queue.chain import DescriptorChain, Part
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.worker import DeviceWorker

_QUEUE_SIZE = 128
_MAX_STATS = 64  # entries looked at; there are ten kinds
# Given back at a time, so that a queue can stop in between: freeing 1 GiB may take seconds.
_PIECE = 32 << 20


class BalloonDevice(VirtioDevice):
    """A balloon that wants `target` bytes of the guest's memory.

    With `reporting` the driver also tells of pages that are free just now. Both may be lost.
    """

    device_type = VIRTIO_ID_BALLOON
    feature_names = FEATURE_NAMES

    def __init__(
        self,
        *,
        target: int = 0,
        reporting: bool = False,
        deflate_on_oom: bool = False,
        name: str = "balloon",
        log: Sink | None = None,
    ) -> None:
        """`log` gets a line for what the guest did wrong, limited in rate unless given."""
        self.name = name
        self.log = RateLimited(prefix=f"{name}: ", device=name) if log is None else log
        # Hinting is offered for the sake of its queue: Linux numbers queues without the ones that
        # are not there, the specification numbers them all. With each there, both count alike.
        self.features = RING_FEATURES | mask(
            VIRTIO_BALLOON_F_STATS_VQ,
            *((VIRTIO_BALLOON_F_DEFLATE_ON_OOM,) if deflate_on_oom else ()),
            *(
                (
                    VIRTIO_BALLOON_F_FREE_PAGE_HINT,
                    VIRTIO_BALLOON_F_PAGE_POISON,
                    VIRTIO_BALLOON_F_REPORTING,
                )
                if reporting
                else ()
            ),
        )
        self.queue_sizes = (_QUEUE_SIZE,) * (5 if reporting else 3)
        self._num_pages = target // PAGE
        self._actual = 0
        self._poison = 0
        self._active: _Active | None = None
        self.given_back = 0  # bytes, since the start
        self.taken_back = 0  # bytes that the driver said it takes out of the balloon
        self._statistics: dict[str, int] = {}
        self._reports = 0  # how often the driver has sent statistics
        self._reported = Condition()

    # --- for whoever sets the target -------------------------------------------------------------

    @property
    def target(self) -> int:
        """The number of bytes that the balloon wants."""
        return self._num_pages * PAGE

    @property
    def actual(self) -> int:
        """The number of bytes in it, as the driver says."""
        return self._actual * PAGE

    def set_target(self, target: int, memory: int) -> None:
        """Want `target` bytes of the guest's `memory` bytes. Any thread may call it.

        Raises ConfigError for more than there are.
        """
        if not 0 <= target <= memory:
            raise ConfigError(
                f"a balloon of {target} bytes in a guest with {memory}", cure="ask for less"
            )
        self._num_pages = target // PAGE
        active = self._active
        if active is not None:
            active.worker.wake()

    def statistics(self, patience: float = 2.0) -> Mapping[str, int]:
        """The guest's kernel's statistics of its memory, by name, in bytes and events: fresh, or
        after `patience` seconds what it said before; nothing if it never has. Any thread may call
        it."""
        active = self._active
        with self._reported:
            if active is not None:
                seen = self._reports
                active.ask_for_statistics()
                self._reported.wait_for(lambda: self._reports != seen, patience)
            return dict(self._statistics)

    def stats(self) -> Mapping[str, object]:
        return {
            "target": self.target,
            "actual": self.actual,
            "given_back": self.given_back,
            "taken_back": self.taken_back,
        }

    # --- for the transport -----------------------------------------------------------------------

    def read_config(self, offset: int, length: int) -> bytes:
        """struct virtio_balloon_config, zero past its end (5.5.4, 2.5)."""
        encoded = CONFIG.pack(
            self._num_pages, self._actual, VIRTIO_BALLOON_CMD_ID_STOP, self._poison
        )
        return encoded[offset : offset + length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes `actual` and `poison_val`, in pieces perhaps; the rest is ours."""
        self._actual = _replaced(self._actual, offset - ACTUAL_OFFSET, data)
        self._poison = _replaced(self._poison, offset - POISON_VAL_OFFSET, data)

    def activate(self, activation: Activation) -> None:
        """Start the thread. Raises HostError."""
        active = _Active(self, activation)
        self._active = active
        try:
            active.worker.start()
        except BaseException:
            self._active = None
            raise

    def reset(self) -> None:
        """Stop the thread. The guest has all its memory again, as the pages come when used."""
        active, self._active = self._active, None
        if active is not None:
            active.worker.request_stop()
            active.worker.join()
        self._actual = self._poison = 0

    def save(self) -> dict[str, Any]:
        """See VirtioDevice: what the balloon wants, and what the driver says is in it."""
        return {"num_pages": self._num_pages, "actual": self._actual, "poison": self._poison}

    def restore(self, saved: Saved) -> None:
        """See VirtioDevice."""
        names = ("num_pages", "actual", "poison")
        self._num_pages, self._actual, self._poison = (saved.bits(name, 32) for name in names)

    def reset_queue(self, index: int) -> None:
        """See VirtioDevice."""
        active = self._active
        if active is not None:
            active.worker.drop_queue(index, lambda: active.forget(index))

    def start_queue(self, queue: Queue) -> None:
        """See VirtioDevice."""
        assert self._active is not None, "only a live device starts queues"
        self._active.worker.take_queue(queue)

    # --- for the thread of an activation ---------------------------------------------------------

    @property
    def poison(self) -> int:
        """The value that the driver fills free pages with, if it does."""
        return self._poison

    @property
    def num_pages(self) -> int:
        return self._num_pages

    def take_statistics(self, found: Mapping[str, int]) -> None:
        """The driver has sent these."""
        with self._reported:
            self._statistics = dict(found)
            self._reports += 1
            self._reported.notify_all()


class _Active:
    """All that lives from DRIVER_OK to the reset."""

    def __init__(self, device: BalloonDevice, activation: Activation) -> None:
        """Raises HostError."""
        self._device = device
        self._memory: GuestMemory = activation.memory
        self._interrupt = activation.interrupt
        # A page that was filled with a value must be read as that, and ours come back as zero.
        self._poisoned = has(activation.features, VIRTIO_BALLOON_F_PAGE_POISON)
        self._num_pages = device.num_pages
        self._kept: DescriptorChain | None = None  # the statistics' buffer, used to ask for more
        self._asked = False
        poller = Poller()
        try:
            self.worker = DeviceWorker(device.name, activation, poller, self.work, self._end)
        except BaseException:
            poller.close()
            raise
        self._queues = self.worker.queues

    def forget(self, index: int) -> None:
        """Queue `index` is reset: nothing that was taken from it goes back."""
        if index == STATS:
            self._kept = None

    def ask_for_statistics(self) -> None:
        """Any thread may ask."""
        self._asked = True
        self.worker.wake()

    def work(self) -> None:
        """Everything that can be done now."""
        served = (
            (INFLATE, self._inflate),
            (DEFLATE, self._deflate),
            (STATS, self._take_statistics),
            (FREE_PAGE, self._acknowledge),
            (REPORTING, self._take_report),
        )
        again = True
        while again and self.worker.may_go_on:
            again = False
            if self._num_pages != self._device.num_pages:
                self._num_pages = self._device.num_pages
                self._interrupt.signal_config_change()
            for index, serve in served:
                self.worker.batch(self._queues.get(index), serve)
                again |= self.worker.ask_for_kicks(self._queues.get(index))

    def _end(self) -> None:
        # Kept on purpose, so given back on purpose: a queue that is saved has nothing in flight.
        self.worker.batch(self._queues.get(STATS), self._return_kept)

    # --- 5.5.6 Device Operation ------------------------------------------------------------------

    def _inflate(self, queue: Queue) -> None:
        for chain in queue:
            wanted: list[Part] = []
            try:
                wanted = list(ranges_of(read_page_numbers(chain)))
            except DriverError as error:
                self._device.log(f"pages of the balloon are not taken: {error}")
            if not self._take(queue, chain, wanted):
                return

    def _deflate(self, queue: Queue) -> None:
        """A page comes back when it is touched: nothing is to be done but to count."""
        for chain in queue:
            self._device.taken_back += chain.readable_size // 4 * PAGE
            queue.add_used(chain, 0)

    def _acknowledge(self, queue: Queue) -> None:
        """Free page hints are never asked for."""
        for chain in queue:
            queue.add_used(chain, 0)

    def _take_report(self, queue: Queue) -> None:
        """5.5.6.5 Free Page Reporting."""
        for chain in queue:
            wanted: list[Part] = []
            if not self._poisoned or self._device.poison == 0:
                wanted = [whole_pages(addr, size) for addr, size in chain.writable]
            if not self._take(queue, chain, wanted):
                return

    def _take(self, queue: Queue, chain: DescriptorChain, wanted: list[Part]) -> bool:
        """Give what `chain` has to the host and return it. False if the queue is to stop meanwhile:
        it is available again then, to be done anew; its pages are not the driver's before."""
        if self._give_back(queue, wanted):
            queue.add_used(chain, 0)
            return True
        queue.step_back(chain)
        return False

    def _give_back(self, queue: Queue, wanted: list[Part]) -> bool:
        """True if all of it could be seen to before the queue is to stop."""
        given = 0
        for addr, size in in_ram(self._memory, wanted):
            for offset in range(0, size, _PIECE):
                if given and not self._may_go_on(queue):
                    return False
                piece = min(_PIECE, size - offset)
                try:
                    self._memory.discard(addr + offset, piece)
                except HostError as error:
                    self._device.log(f"the host does not take memory back: {error}")
                    return True
                given += piece
        self._device.given_back += given
        outside = sum(size for _, size in wanted) - given
        if outside:
            self._device.log(f"{outside >> 10} KiB that the driver gave back are not RAM")
        return True

    def _may_go_on(self, queue: Queue) -> bool:
        return self.worker.may_go_on and not queue.halt

    # --- 5.5.6.1 Memory Statistics ---------------------------------------------------------------

    def _take_statistics(self, queue: Queue) -> None:
        for chain in queue:
            self._return_kept(queue)  # a lawful driver has one buffer, which we have returned
            self._kept = chain
            try:
                self._device.take_statistics(_parse_statistics(chain))
            except DriverError as error:
                self._device.log(f"statistics that cannot be read: {error}")
        if self._asked and self._kept is not None:
            self._asked = False
            self._return_kept(queue)

    def _return_kept(self, queue: Queue) -> None:
        if self._kept is not None:
            queue.add_used(self._kept, 0)
            self._kept = None


def _parse_statistics(chain: DescriptorChain) -> dict[str, int]:
    reader = chain.reader()
    count = min(reader.available // STAT.size, _MAX_STATS)
    entries = STAT.iter_unpack(reader.read(count * STAT.size))
    return {STAT_NAMES[tag]: value for tag, value in entries if tag in STAT_NAMES}


def _replaced(value: int, offset: int, data: bytes) -> int:
    """A le32 `value` after `data` was written at `offset` from its first byte."""
    field = bytearray(value.to_bytes(4, "little"))
    for index, byte in enumerate(data, offset):
        if 0 <= index < len(field):
            field[index] = byte
    return int.from_bytes(field, "little")
