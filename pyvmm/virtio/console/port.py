"""One port of a console device: what is on its way, and what the guest is still to be told of it.

What is to be told is a set of kinds of messages, made when they are sent; so a guest that asks
again and again, or takes no answers, makes nothing grow.
"""

from __future__ import annotations

from typing import Any

from pyvmm.errors import DriverError
from pyvmm.host.saved import Saved
from pyvmm.virtio.console.ends import End
from pyvmm.virtio.console.uapi import (
    CONTROL,
    RESIZE,
    VIRTIO_CONSOLE_CONSOLE_PORT,
    VIRTIO_CONSOLE_PORT_ADD,
    VIRTIO_CONSOLE_PORT_NAME,
    VIRTIO_CONSOLE_PORT_OPEN,
    VIRTIO_CONSOLE_PORT_READY,
    VIRTIO_CONSOLE_RESIZE,
)
from pyvmm.virtio.queue.chain import DescriptorChain
from pyvmm.virtio.queue.protocol import Queue

# In this order a driver has to hear them.
_ORDER = (
    VIRTIO_CONSOLE_PORT_ADD,
    VIRTIO_CONSOLE_CONSOLE_PORT,
    VIRTIO_CONSOLE_PORT_NAME,
    VIRTIO_CONSOLE_RESIZE,
    VIRTIO_CONSOLE_PORT_OPEN,
)
# After so much other ports get their turn: a buffer may be as long as all memory, and longer.
_BATCH_BYTES = 256 << 10
_FORMER = -1  # the number of a connection that was saved with the driver, and has ended
_MULTIPORT = "5.3.6.2 Multiport Device Operation"


class Port:
    """Port `id` between two queues and `end`. With a `name` the guest finds it by that; one that
    `is_console` is a terminal of `size` (columns, rows), None if that is not known.

    `guest_is_open` says whether the guest has it open; `starved` that there is input and no buffer;
    `has_more_output` that `take_output` has stopped only to let others have their turn.
    """

    def __init__(self, id: int, end: End, *, name: str = "", is_console: bool = False) -> None:
        self.id = id
        self.end = end
        self.name = name
        self.is_console = is_console
        self.size: tuple[int, int] | None = None
        self.bytes_to_guest = self.bytes_from_guest = 0
        self.begin(multiport=False)

    def begin(self, *, multiport: bool) -> None:
        """A driver is there. Without MULTIPORT port 0 is open from the start."""
        self.guest_is_open = not multiport
        self.starved = False
        self._multiport = multiport
        self._owed: set[int] = set()
        self._added = self._ready = False
        self._told = 0  # the connection that the driver knows of
        self._leaving: DescriptorChain | None = None  # the chain whose bytes the end is taking
        self._rest: list[memoryview] = []
        self._budget = 0
        self._skip = 0  # bytes of the first buffer that the end had before
        self.has_more_output = False

    # --- saved and restored ----------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """The driver's announcements, those that it was told, and how much of the buffer that the
        end is taking it has: the rest of it is for whoever goes on."""
        left = sum(map(len, self._rest))
        taken = self._leaving.readable_size - left if self._leaving is not None else 0
        return {
            "guest_is_open": self.guest_is_open,
            "added": self._added,
            "ready": self._ready,
            "owed": sorted(self._owed),
            "told_open": bool(self._told),
            "taken": max(0, taken),
        }

    def restore(self, saved: Saved) -> None:
        """Restore what `save` gave, after `begin`. A client of before has gone: if the driver knows
        of one, it is told so. Raises ConfigError."""
        self.guest_is_open = saved.flag("guest_is_open")
        self._added, self._ready = saved.flag("added"), saved.flag("ready")
        self._owed = set(saved.integers("owed", len(_ORDER), max(_ORDER))) & set(_ORDER)
        if self._multiport and saved.flag("told_open"):
            self._told = self.end.connection if self.is_console else _FORMER
        self._skip = saved.bits("taken", 64)

    # --- messages --------------------------------------------------------------------------------

    def add(self) -> None:
        """The driver is ready: announce the port, once."""
        if not self._added:
            self._added = True
            self._owed.add(VIRTIO_CONSOLE_PORT_ADD)

    def hear(self, event: int, value: int) -> None:
        """A message of the driver's about this port. Raises DriverError for one out of turn."""
        if not self._added:
            raise DriverError(f"event {event} for a port that was not added", section=_MULTIPORT)
        if event == VIRTIO_CONSOLE_PORT_READY:
            if value != 1:
                raise DriverError(f"the driver failed to set up port {self.id}", section=_MULTIPORT)
            self._ready = True
            if self.name:
                self._owed.add(VIRTIO_CONSOLE_PORT_NAME)
            if self.is_console:
                self._owed.add(VIRTIO_CONSOLE_CONSOLE_PORT)
                self.resized()
            self._told = 0
        elif event == VIRTIO_CONSOLE_PORT_OPEN:
            self.guest_is_open = bool(value)
        else:
            raise DriverError(f"event {event} for port {self.id}", section=_MULTIPORT)

    def resized(self) -> None:
        """The terminal has another size."""
        if self._multiport and self._ready and self.size is not None:
            self._owed.add(VIRTIO_CONSOLE_RESIZE)

    @property
    def owes_message(self) -> bool:
        """True if the driver is to be told something."""
        return bool(self._owed) or (self._ready and self.end.connection != self._told)

    def next_message(self) -> bytes:
        """The event that the driver is told first; `told` if it was."""
        event = self._next_event()
        value, more = 0, b""
        if event == VIRTIO_CONSOLE_PORT_OPEN:
            value = int(not self._told)
        elif event == VIRTIO_CONSOLE_PORT_NAME:
            more = self.name.encode()
        elif event == VIRTIO_CONSOLE_RESIZE and self.size is not None:
            more = RESIZE.pack(*self.size)
        elif event == VIRTIO_CONSOLE_CONSOLE_PORT:
            value = 1
        return CONTROL.pack(self.id, event, value) + more

    def told(self) -> None:
        """`next_message` has gone out."""
        event = self._next_event()
        self._owed.discard(event)
        if event == VIRTIO_CONSOLE_PORT_OPEN:
            # Of another client the driver hears once it knows that the one before has gone.
            self._told = 0 if self._told else self.end.connection

    def _next_event(self) -> int:
        return next((e for e in _ORDER if e in self._owed), VIRTIO_CONSOLE_PORT_OPEN)

    # --- bytes -----------------------------------------------------------------------------------

    @property
    def is_leaving(self) -> bool:
        """True if a buffer of the guest's is not taken whole yet."""
        return self._leaving is not None

    @property
    def is_blocked(self) -> bool:
        """True if the end takes no more of a buffer now: the device is woken when it does."""
        return self._leaving is not None and not self.has_more_output

    @property
    def wants_to_give(self) -> bool:
        """True if there may be input for the guest, which can take it."""
        known = not self._multiport or self._told == self.end.connection
        return self.guest_is_open and known and self.end.has_input

    def take_output(self, queue: Queue) -> None:
        """Give the guest's bytes to the end, some of them. A buffer outside RAM is skipped."""
        self.has_more_output = False
        self._budget = _BATCH_BYTES
        for _ in range(queue.size):
            if self._leaving is None:
                self._leaving = queue.pop()
                if self._leaving is None:
                    return
                self._rest = _views(self._leaving)
                if self._skip:
                    self._rest, self._skip = _without(self._rest, self._skip), 0
            if not self._push():
                return
            queue.add_used(self._leaving, 0)
            self._leaving = None

    def drop_output(self, queue: Queue) -> None:
        """The device stops: what the end has not taken is lost, and its buffer returned."""
        if self._leaving is not None:
            queue.add_used(self._leaving, 0)
        self.forget_output()

    def forget_output(self) -> None:
        """The queue was reset: there is no buffer to be returned any more."""
        self._leaving = None
        self._rest = []
        self.has_more_output = False

    def _push(self) -> bool:
        while self._rest:
            if self._budget <= 0:
                self.has_more_output = True
                return False
            count = self.end.write(self._rest[0][: self._budget])
            self._budget -= count
            self.bytes_from_guest += count
            if not count:
                return False
            if count < len(self._rest[0]):
                self._rest[0] = self._rest[0][count:]
            else:
                del self._rest[0]
        return True

    def give_input(self, queue: Queue) -> None:
        """Fill receive buffers with what the end has."""
        self.starved = False
        for _ in range(queue.size):
            if not self.wants_to_give:
                return
            chain = queue.pop()
            if chain is None:
                self.starved = True
                return
            try:
                views = chain.writable_views()
            except DriverError:
                views = []
            if not views:
                queue.add_used(chain, 0)
                continue
            count = self.end.read_into(views)
            if not count:
                queue.step_back()
                return
            self.bytes_to_guest += count
            queue.add_used(chain, count)


def _without(views: list[memoryview], count: int) -> list[memoryview]:
    """`views` without their first `count` bytes."""
    rest = []
    for view in views:
        dropped = min(count, len(view))
        count -= dropped
        if dropped < len(view):
            rest.append(view[dropped:])
    return rest


def _views(chain: DescriptorChain) -> list[memoryview]:
    try:
        return chain.readable_views()
    except DriverError:
        return []
