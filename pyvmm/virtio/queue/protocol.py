"""A virtqueue as a device sees it, whatever its layout in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol

from pyvmm.host.syscalls import EventFd
from pyvmm.virtio.queue.chain import DescriptorChain, Usual
from pyvmm.virtio.queue.state import QueueState


class Journal(Protocol):
    """A record of what a queue has in flight, for whoever goes on when its process was killed at
    any moment. Called with the queue's lock held; heads as the driver knows them."""

    def taken(self, head: int) -> None:
        """A chain was taken."""

    def given_back(self, head: int) -> None:
        """It is in the ring again, as if it had not been taken."""

    def publishing(self, heads: Sequence[int]) -> None:
        """These are about to be shown to the driver as used; some may never have been `taken`."""

    def published(self, heads: Sequence[int], position: int) -> None:
        """They have been shown: the next one will be returned at `position`."""


class QueueLock(Protocol):
    """A threading.Lock, or what works like one."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...

    def release(self) -> None: ...

    def __enter__(self) -> bool: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...


class Queue(Protocol):
    """The device's end of one virtqueue.

    `lock` is held by whoever works on the ring, or on guest memory for it, for one batch at a time:
    who takes it from outside pauses the queue. `ready` is False once the driver stopped the queue,
    the device failed or was reset: no ring access after that. `halt` asks an iteration to end after
    the chain at hand; the ring stays in use. It is only read: it is true from `end_serving` to
    `begin_serving`, and while somebody waits in `claim`. `kick` becomes readable when the driver
    notifies the device. `stats` is what was counted of it.
    """

    index: int
    size: int
    kick: EventFd
    lock: QueueLock
    ready: bool
    halt: bool
    stats: QueueStats

    def begin_serving(self) -> None:
        """Somebody serves the queue from now on."""

    def end_serving(self) -> None:
        """Ask the worker that serves the queue to end after the chain at hand."""

    def claim(self, timeout: float = -1) -> bool:
        """Take `lock`, for which the batch in progress ends after the chain at hand; whether it
        could be had within `timeout` seconds (a negative number: however long it takes). Signal
        `kick` after the release: a batch that ended early has left chains in the ring."""

    def pop(self) -> DescriptorChain | None:
        """The next available chain, or None. Raises DriverError for a broken ring or chain."""

    def __iter__(self) -> Iterator[DescriptorChain]:
        """The available chains in order, at most `size` of them, until there are no more."""

    def peek_usual(self, first: int, last: int, most: int) -> tuple[list[Usual], bool]:
        """The next available chains as far as they are of the usual form, without taking them:
        `first` bytes to read, data in one piece, `last` bytes to write, in a descriptor each, all
        of it in RAM. The data of all is about `most` bytes, if that is not one chain's.

        Also whether a chain of another form (or a broken one) comes next, which is for `pop`.
        Raises DriverError for a broken ring. What is given may be used until the next call; it was
        read once, and the driver has no way to change it.
        """

    def use_peeked(self, written: Sequence[int]) -> None:
        """Take and return the first chains that `peek_usual` gave, as many as `written` has
        entries, each with so many bytes written; like a `pop` and an `add_used` for each."""

    def step_back(self, chain: DescriptorChain | None = None) -> None:
        """Undo the last `pop`: the same chain is available again. With `chain`, which must be the
        youngest one in flight, several can be undone, the youngest first. Raises ValueError."""

    def add_used(self, chain: DescriptorChain, written: int) -> None:
        """Return `chain` with `written` bytes written from its first writable byte on. The driver
        sees it at the next `publish_used`. Raises ValueError if it is not in flight."""

    def pop_buffers(
        self, views: list[memoryview], wanted: int, most: int, least: int = 1
    ) -> list[int]:
        """Take chains of just one buffer to write, of `least` bytes or more, until they have
        `wanted` bytes or are `most`: their heads. Views of them are appended to `views`. It ends
        before a chain of another kind, and takes none where a layout has no quick way: `pop` takes
        any. Raises DriverError for a broken ring."""

    def add_used_buffers(self, heads: list[int], last_written: int) -> None:
        """Return what `pop_buffers` took, all of them full but the last, which has `last_written`
        bytes. Raises ValueError if one is not in flight."""

    def publish_used(self) -> bool:
        """Make all added used elements visible; whether the driver wants a notification now."""

    def disable_notification(self) -> None:
        """Tell the driver that kicks are not needed for now."""

    def is_drained(self) -> bool:
        """True if the driver has nothing in the ring that was not returned. Raises DriverError."""

    def poll(self, until: int, patience: int) -> bool:
        """Look for new buffers, without asking for a kick, until the clock (perf_counter_ns) says
        `until` or `halt` is set; whether there are any. Other threads get their turn meanwhile; one
        that took more than about `patience` nanoseconds ends it. `lock` need not be held."""

    def enable_notification(self) -> bool:
        """Ask for kicks again; True if more became available meanwhile, so that it must be
        processed before waiting. Chains left in the ring on purpose count once only."""

    def remap(self) -> None:
        """The memory has other regions now: find the rings in it again, with `lock` held. Raises
        GuestMemoryError if they are no longer RAM; the queue cannot be used then."""

    def state(self) -> QueueState:
        """The queue as plain data; the device must be at rest, and used chains published."""

    def rewound(self) -> QueueState:
        """The queue as plain data, as if the chains that were taken and not yet returned had not
        been taken: whoever goes on there does their work anew. The device is at rest, and used
        chains are published. Raises DriverError if chains taken later were returned already."""

    def served_to(self, position: int) -> None:
        """Another has served the ring while none of its chains was in flight here: all in front of
        `position`, which is as in QueueState, are used. Raises DriverError for a broken ring."""

    def chain_in_flight(self, head: int) -> DescriptorChain:
        """The chain with this head that is in flight, for a device that goes on after its state
        was saved. Raises ValueError if it is not in flight."""


class QueueStats:
    """`requests` are chains given back to the driver, `interrupts` the notifications that it got.

    `latency[n]` counts those that took from 2^(n-1) up to, not including, 2^n nanoseconds: from
    when the device's thread turned to a batch until it was given back, the same for all in it.
    `nanoseconds` is what all took together.

    They change once for each batch, which costs a request nearly nothing: plain integers that one
    thread adds to at a time (whoever holds the queue's lock, or the device's for `interrupts`) and
    any thread reads. They live as long as the device, through all its resets.
    """

    __slots__ = ("interrupts", "latency", "nanoseconds", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.interrupts = 0
        self.nanoseconds = 0
        self.latency = [0] * 64  # every number of nanoseconds that there is has its place
