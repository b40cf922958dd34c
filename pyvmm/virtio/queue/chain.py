"""A descriptor chain taken from a virtqueue, and how a device reads and writes its buffers.

The chain's shape was checked when it was taken; whether its buffers lie in guest RAM is checked
when they are touched, so that a device can still answer a request of which one buffer is bad (say,
with an error in its status byte).
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from pyvmm.errors import DriverError
from pyvmm.memory import GuestMemory

Part = tuple[int, int]  # (guest-physical address, length in bytes), never empty
# A chain of three descriptors: views of the first, of the data, and of the last; how many bytes of
# data; whether the device reads the data rather than writes it.
Usual = tuple[memoryview, memoryview, memoryview, int, bool]

_FRAMING = "2.7.4 Message Framing"


MAX_VIEWS = 4096  # that are remembered: more than a driver's queue has parts


class Views(dict[Part, memoryview]):
    """Views of parts of guest RAM, each made when it is first asked for: `views[addr, length]`.

    Drivers use the same places again and again, and making a view costs four look-ups. Raises
    GuestMemoryError for a part that is not in RAM.
    """

    def __init__(self, memory: GuestMemory, *, writable: bool) -> None:
        self._memory = memory
        self._writable = writable

    def __missing__(self, part: Part) -> memoryview:
        view = self._memory.view(*part)
        if not self._writable:
            view = view.toreadonly()
        if len(self) >= MAX_VIEWS:
            self.clear()
        self[part] = view
        return view


class Places(dict[int, memoryview]):
    """Views of parts that all have the same length, by address: `places[addr]`, as in `Views`."""

    def __init__(self, views: Views, length: int) -> None:
        self._views = views
        self._length = length

    def __missing__(self, addr: int) -> memoryview:
        view = self._views[addr, self._length]
        if len(self) >= MAX_VIEWS:
            self.clear()
        self[addr] = view
        return view


class RamWindow:
    """Turns parts of guest RAM into views, and remembers them.

    `readable` and `writable` views show the same bytes; the first cannot be written through. Both
    are called with a part and raise GuestMemoryError; `readable_views` and `writable_views` are
    what they look it up in.
    """

    __slots__ = ("_places", "memory", "readable", "readable_views", "writable", "writable_views")

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.readable_views = Views(memory, writable=False)
        self.writable_views = Views(memory, writable=True)
        self.readable = self.readable_views.__getitem__
        self.writable = self.writable_views.__getitem__
        self._places: list[Places] = []

    def places(self, views: Views, length: int) -> Places:
        """A look-up for parts of one `length`, in `views`, which are those of this window."""
        places = Places(views, length)
        self._places.append(places)
        return places

    def refresh(self) -> None:
        """The memory's regions have changed; nobody may be using the window."""
        self.readable_views.clear()
        self.writable_views.clear()
        for places in self._places:
            places.clear()


class DescriptorChain:
    """One buffer that the driver made available: device-readable parts, then device-writable ones.

    `readable` and `writable` are lists of (guest-physical address, length in bytes) in order,
    without the empty ones; `readable_size` and `writable_size` their bytes in all. `head` is the
    number by which the driver knows the chain: in a split ring the index of its first descriptor,
    in a packed one its buffer id.

    `position` is where in the ring it was taken, in the queue's own count, below 0 if nobody knows;
    `slots` how many of the ring's entries it takes: one in a split ring, and see `PackedChain`.
    """

    slots = 1

    __slots__ = (
        "head",
        "position",
        "ram",
        "readable",
        "readable_size",
        "writable",
        "writable_size",
    )

    def __init__(
        self,
        head: int,
        readable: list[Part],
        writable: list[Part],
        readable_size: int,
        writable_size: int,
        ram: RamWindow,
        position: int = -1,
    ) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.readable_size = readable_size
        self.writable_size = writable_size
        self.ram = ram
        self.position = position

    def reader(self) -> Reader:
        """A new Reader at the start of the readable parts."""
        return Reader(self)

    def writer(self) -> Writer:
        """A new Writer at the start of the writable parts."""
        return Writer(self)

    def readable_views(self) -> list[memoryview]:
        """Read-only views of all readable parts. Raises GuestMemoryError."""
        readable = self.ram.readable
        return [readable(part) for part in self.readable]

    def writable_views(self) -> list[memoryview]:
        """Views of all writable parts. Raises GuestMemoryError."""
        writable = self.ram.writable
        return [writable(part) for part in self.writable]

    def __repr__(self) -> str:
        return (
            f"<chain {self.head}: {self.readable_size} bytes to read in {len(self.readable)} parts,"
            f" {self.writable_size} to write in {len(self.writable)}>"
        )


class PackedChain(DescriptorChain):
    """A chain of a packed ring, in which each of its descriptors takes one entry."""

    __slots__ = ("slots",)

    def __init__(
        self,
        head: int,
        readable: list[Part],
        writable: list[Part],
        readable_size: int,
        writable_size: int,
        ram: RamWindow,
        position: int,
        slots: int,
    ) -> None:
        # Written out again: a call of the base's would be a tenth of what a chain costs.
        self.head = head
        self.readable = readable
        self.writable = writable
        self.readable_size = readable_size
        self.writable_size = writable_size
        self.ram = ram
        self.position = position
        self.slots = slots


class _Cursor:
    """A position in the parts of one direction, whatever pieces the driver cut them into."""

    __slots__ = ("_index", "_offset", "_parts", "_ram", "available")

    _parts: list[Part]
    _ram: RamWindow
    _index: int  # of the part the position is in
    _offset: int  # into that part
    available: int

    def _advance(self, n: int) -> list[Part]:
        """The pieces that make up the next `n` bytes; moves past them."""
        if n > self.available or n < 0:
            raise DriverError(
                f"the chain has {self.available} bytes left where {n} are needed",
                section=_FRAMING,
            )
        parts, index, offset = self._parts, self._index, self._offset
        if not offset and n and parts[index][1] == n:  # what most requests need
            self._index = index + 1
            self.available -= n
            return [parts[index]]
        pieces = []
        left = n
        while left:
            addr, length = parts[index]
            if offset:
                addr += offset
                length -= offset
            if length > left:
                offset += left
                pieces.append((addr, left))
                break
            pieces.append((addr, length))
            left -= length
            index += 1
            offset = 0
        self._index, self._offset = index, offset
        self.available -= n
        return pieces

    def skip(self, n: int) -> None:
        """Move past `n` bytes without touching them. Raises DriverError if fewer are left."""
        self._advance(n)


class Reader(_Cursor):
    """Reads a chain's device-readable bytes in order, without regard to how they are cut up.

    `available` is how many bytes are left. Asking for more raises DriverError; touching bytes that
    are not in RAM raises GuestMemoryError (which is a DriverError), and moves on all the same.
    """

    __slots__ = ()

    def __init__(self, chain: DescriptorChain) -> None:
        self._parts = chain.readable
        self._ram = chain.ram
        self._index = self._offset = 0
        self.available = chain.readable_size

    def take(self, n: int) -> list[memoryview]:
        """Read-only views of the next `n` bytes, in place: for pwritev."""
        readable = self._ram.readable
        return [readable(part) for part in self._advance(n)]

    def read(self, n: int) -> bytes:
        """A copy of the next `n` bytes."""
        return b"".join(self.take(n))

    def unpack(self, layout: Struct) -> tuple[Any, ...]:
        """The next bytes as the fields of `layout`, each read once."""
        pieces = self._advance(layout.size)
        if len(pieces) == 1:
            return layout.unpack(self._ram.readable(pieces[0]))
        return layout.unpack(b"".join(map(self._ram.readable, pieces)))


def spread(data: bytes | bytearray | memoryview, views: list[memoryview]) -> None:
    """Copy `data` to `views`, which have as many bytes in all."""
    start = 0
    for view in views:
        end = start + len(view)
        view[:] = data[start:end]
        start = end


class Writer(_Cursor):
    """Writes a chain's device-writable bytes in order, without regard to how they are cut up.

    `available` is how much room is left. Asking for more raises DriverError; touching bytes that
    are not in RAM raises GuestMemoryError (which is a DriverError), and moves on all the same.
    """

    __slots__ = ("_from_end", "_total")

    def __init__(self, chain: DescriptorChain) -> None:
        self._parts = chain.writable
        self._ram = chain.ram
        self._index = self._offset = self._from_end = 0
        self.available = self._total = chain.writable_size

    @property
    def written(self) -> int:
        """Bytes written, taken or skipped so far, counted from the first writable byte."""
        return self._total - self._from_end - self.available

    def take(self, n: int) -> list[memoryview]:
        """Writable views of the next `n` bytes, in place: for preadv."""
        writable = self._ram.writable
        return [writable(part) for part in self._advance(n)]

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to the next bytes. All of it, or none where a part is not in RAM."""
        views = self.take(len(data))
        if len(views) == 1:
            views[0][:] = data
        else:
            spread(data, views)

    def take_last_byte(self) -> memoryview:
        """A one-byte view of the last byte still available, which is then no longer available.

        Where a request ends in a status byte, that byte is the last one, whatever descriptor it
        lies in. It does not count as `written`.
        """
        if not self.available:
            raise DriverError("the chain has no writable byte left", section=_FRAMING)
        index, from_end = -1, self._from_end
        addr, length = self._parts[index]
        while from_end >= length:
            from_end -= length
            index -= 1
            addr, length = self._parts[index]
        self._from_end += 1
        self.available -= 1
        return self._ram.writable((addr + length - 1 - from_end, 1))
