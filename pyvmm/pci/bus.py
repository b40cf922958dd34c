"""A PCI bus: functions at device numbers, two ways to their configuration spaces, and the windows
of memory in which their BARs answer.

The ways are configuration mechanism #1 (PCI Local Bus Specification 3.0, 3.2.2.3.2 Software
Generation of Configuration Transactions) and the enhanced configuration access mechanism (PCI
Express Base Specification, 7.2.2). A read of a function that is not there gives all ones, and a
write to it has no effect.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from threading import Lock
from typing import Any, NamedTuple

from pyvmm.bus import Action
from pyvmm.host.saved import Saved
from pyvmm.pci import registers as pci
from pyvmm.pci.function import Bar, Function

DEVICES = 32  # on a bus
ECAM_SIZE = DEVICES << 15  # eight functions of 4 KiB each
_FUNCTIONS = 8
_ENABLE = 1 << 31  # of CONFIG_ADDRESS
_RESERVED = 0x7F00_0003  # bits of it that read as zeros
_MOST_PULLED = DEVICES  # places that are remembered


def _ones(size: int) -> int:
    return (1 << 8 * size) - 1


class PciBus:
    """Bus 0: `functions` by device number, each its device's only one. The handlers of its ways in,
    `ports`, `ecam` and `window`, are for the machine to place."""

    def __init__(self, window_base: int, window_size: int) -> None:
        """BARs answer at guest-physical addresses within a window only."""
        self.functions: dict[int, Function] = {}
        self.window = Window(window_base, window_size)
        self._windows = [self.window]
        self.ports = ConfigPorts(self)
        self.ecam = Ecam(self)
        self._lock = Lock()  # of the window and of `functions`; taken after a function's

    def add_window(self, base: int, size: int) -> Window:
        """Another one, which is for the machine to place as well; before the guest runs."""
        window = Window(base, size)
        self._windows.append(window)
        return window

    def where(self, bar: Bar) -> int | None:
        """The guest-physical address at which `bar` answers."""
        places = (window.where(bar) for window in self._windows)
        return next((place for place in places if place is not None), None)

    def add(self, device: int, function: Function) -> None:
        """Plug `function` in as device number `device`. Raises ValueError if that is taken."""
        with self._lock:
            if device in self.functions or not 0 <= device < DEVICES:
                raise ValueError(f"there is no place for device {device}")
            self.functions = {**self.functions, device: function}
        with function.lock:
            self._place(function)

    def remove(self, device: int, function: Function, *, pulled: bool = False) -> None:
        """Take `function` out of `device`: from now on the place is empty. A function that has left
        already may be removed again: a guest and its host may both want it gone.

        If it is `pulled`, away from a driver that has not let go, its BARs read as zeros where they
        were (see Window).
        """
        with function.lock:
            with self._lock:
                if self.functions.get(device) is not function:
                    return
                self.functions = {at: one for at, one in self.functions.items() if at != device}
            if pulled:
                with self._lock:
                    for window in self._windows:
                        window.note_pulled(function.bars)
            function.reset()
            self._place(function)

    def save(self) -> dict[str, Any]:
        """All configuration spaces, the address that the ports stand at, and where there were BARs
        whose function was pulled away."""
        spaces = [{"device": at, "space": one.save()} for at, one in self.functions.items()]
        saved = {"address": self.ports.address, "functions": spaces}
        if pulled := [place for window in self._windows for place in window.save_pulled()]:
            saved["pulled"] = pulled
        return saved

    def restore(self, saved: Saved) -> None:
        """Restore what `save` gave, to a bus with the same functions: their BARs answer where they
        did, and they are told of bus mastering. Raises ConfigError."""
        self.ports.address = saved.bits("address", 32) & ~_RESERVED
        rest = dict(self.functions)
        for one in saved.tables("functions", DEVICES):
            function = rest.pop(one.integer("device", DEVICES - 1), None)
            if function is None:
                raise one.wrong("there is no such device on the bus")
            with function.lock:
                function.load(one)
                self._place(function)
        if rest:
            raise saved.wrong(f"device {min(rest)} is missing")
        most = _MOST_PULLED * len(self._windows)
        for one in saved.tables("pulled", most) if saved.has("pulled") else ():
            if not any(window.restore_pulled(one) for window in self._windows):
                raise one.wrong("no BAR was there")

    def read(self, device: int, function: int, offset: int, size: int) -> int:
        """Read configuration space."""
        found = None if function else self.functions.get(device)
        return _ones(size) if found is None else found.read(offset, size)

    def write(self, device: int, function: int, offset: int, size: int, value: int) -> None:
        """Write configuration space."""
        found = None if function else self.functions.get(device)
        if found is None:
            return
        with found.lock:
            if self.functions.get(device) is found:
                found.write(offset, size, value)
                self._place(found)

    def _place(self, function: Function) -> None:
        """Have the function's BARs answer where the driver has put them, and tell it. Its lock is
        held; a write to it may wait for a request in flight, and must hold up no other function."""
        reset, function.wants_reset = function.wants_reset, False
        if reset:
            function.reset()
        with self._lock:
            if self._place_bars(function):
                # Another BAR may have waited for the place that has become free.
                for other in self.functions.values():
                    if other is not function:
                        self._place_bars(other)
            left = [lock for window in self._windows for lock in window.take_left()]
        for access in left:
            with access:
                pass  # a write that was under way has ended
        if function.is_bus_master != function.was_bus_master:
            function.was_bus_master = function.is_bus_master
            if function.placement is not None:
                function.placement.bus_master_changed(function.is_bus_master)
        if reset and function.placement is not None:
            function.placement.function_reset()

    def _place_bars(self, function: Function) -> bool:
        """True if one of them has moved."""
        moved = False
        for bar in function.bars:
            before = self.where(bar)
            address = function.address_of(bar) if function.decodes_memory else None
            for window in self._windows:
                window.put(bar, address)
            after = self.where(bar)
            if after != before:
                moved = True
                if function.placement is not None:
                    function.placement.bar_moved(bar, after)
        return moved


class _Placed(NamedTuple):
    """A BAR where it answers, by offsets into the window; `access` is held for a write to it."""

    start: int
    end: int
    bar: Bar
    access: Lock


class Window:
    """The handler of the addresses that BARs may have. Any thread reads and writes; whoever moves a
    BAR holds the bus's lock.

    A BAR outside the window, or over another one, answers nowhere: what lies there stays. The bus
    tries again when that one has moved.

    Nothing answers elsewhere, which reads as all ones. Where BARs were whose function was pulled
    away it reads as zeros, until another BAR comes there: a driver of virtio waits for its device's
    status to be 0 after a reset (4.1.4.3.2), and would wait for ever.

    Writes to one BAR happen one after the other, each with the lock of its place; so whoever takes
    the lock of a place that a BAR has left knows that no write by it is under way.
    """

    def __init__(self, base: int, size: int) -> None:
        self.base = base
        self.size = size
        # Replaced as one, so that a vCPU that just looks sees the old or the new.
        self._map: tuple[tuple[int, ...], tuple[_Placed, ...]] = ((), ())
        self._left: list[Lock] = []
        self._pulled: tuple[range, ...] = ()  # offsets; the latest last

    def where(self, bar: Bar) -> int | None:
        """The guest-physical address at which `bar` answers."""
        return next((self.base + one.start for one in self._map[1] if one.bar is bar), None)

    def put(self, bar: Bar, address: int | None) -> None:
        """Have `bar` answer at guest-physical `address`, if it can, or nowhere."""
        if self.where(bar) == address:
            return
        self._clear(bar)
        if address is None:
            return
        start, end = address - self.base, address - self.base + bar.size
        if start < 0 or end > self.size:
            return
        placed = list(self._map[1])
        if any(start < other.end and other.start < end for other in placed):
            return
        self._pulled = tuple(
            one for one in self._pulled if not (start < one.stop and one.start < end)
        )
        self._set([*placed, _Placed(start, end, bar, Lock())])

    def note_pulled(self, bars: Sequence[Bar]) -> None:
        """The function of `bars` is about to be pulled away."""
        places = (range(one.start, one.end) for one in self._map[1] if one.bar in bars)
        self._pulled = (*self._pulled, *places)[-_MOST_PULLED:]

    def save_pulled(self) -> list[dict[str, int]]:
        """Where there were BARs whose function was pulled away."""
        return [{"start": self.base + one.start, "size": len(one)} for one in self._pulled]

    def restore_pulled(self, saved: Saved) -> bool:
        """Restore one of what `save_pulled` gave, if it is in this window, to which no BAR comes
        there later. Raises ConfigError."""
        start = saved.bits("start", 64) - self.base
        end = start + saved.bits("size", 64)
        if not 0 <= start < end <= self.size:
            return False
        self._pulled = (*self._pulled, range(start, end))[-_MOST_PULLED:]
        return True

    def _clear(self, bar: Bar) -> None:
        self._left += [one.access for one in self._map[1] if one.bar is bar]
        self._set([one for one in self._map[1] if one.bar is not bar])

    def take_left(self) -> list[Lock]:
        """The locks of the places that BARs have left since the last call."""
        left, self._left = self._left, []
        return left

    def _set(self, placed: list[_Placed]) -> None:
        placed.sort(key=lambda one: one.start)
        self._map = tuple(one.start for one in placed), tuple(placed)

    def _find(self, offset: int, size: int) -> _Placed | None:
        starts, placed = self._map
        place = bisect_right(starts, offset) - 1
        if place < 0:
            return None
        found = placed[place]
        return found if offset + size <= found.end else None

    def read(self, offset: int, size: int) -> int:
        """See pyvmm.bus.Handler."""
        found = self._find(offset, size)
        if found is not None:
            return found.bar.handler.read(offset - found.start, size)
        was_pulled = any(offset in one and offset + size <= one.stop for one in self._pulled)
        return 0 if was_pulled else _ones(size)

    def write(self, offset: int, size: int, value: int) -> Action | None:
        """See pyvmm.bus.Handler."""
        found = self._find(offset, size)
        if found is None:
            return None
        with found.access:
            if self._find(offset, size) is not found:
                return None  # the BAR has left meanwhile
            return found.bar.handler.write(offset - found.start, size, value)


class ConfigPorts:
    """CONFIG_ADDRESS and CONFIG_DATA, eight I/O ports: the former takes aligned accesses of four
    bytes only, the latter shows four bytes of a function's configuration space."""

    SIZE = 8
    _DATA = 4

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus
        self.address = 0

    def _place(self, offset: int) -> tuple[int, int, int] | None:
        address = self.address
        if not address & _ENABLE or address >> 16 & 0xFF:
            return None
        register = (address & 0xFC) + offset - self._DATA
        return address >> 11 & DEVICES - 1, address >> 8 & _FUNCTIONS - 1, register

    def read(self, offset: int, size: int) -> int:
        """See pyvmm.bus.Handler."""
        if offset == 0 and size == 4:
            return self.address
        place = self._place(offset) if offset >= self._DATA else None
        return _ones(size) if place is None else self._bus.read(*place, size)

    def write(self, offset: int, size: int, value: int) -> Action | None:
        """See pyvmm.bus.Handler."""
        if offset == 0 and size == 4:
            self.address = value & ~_RESERVED
        elif offset >= self._DATA and (place := self._place(offset)) is not None:
            self._bus.write(*place, size, value)
        return None


class Ecam:
    """All configuration spaces of the bus, one after the other, as memory."""

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus

    @staticmethod
    def _place(offset: int, size: int) -> tuple[int, int, int] | None:
        register = offset & pci.PCI_CFG_SPACE_EXP_SIZE - 1
        if register + size > pci.PCI_CFG_SPACE_EXP_SIZE:
            return None  # it straddles two functions
        return offset >> 15, offset >> 12 & _FUNCTIONS - 1, register

    def read(self, offset: int, size: int) -> int:
        """See pyvmm.bus.Handler."""
        place = self._place(offset, size)
        return _ones(size) if place is None else self._bus.read(*place, size)

    def write(self, offset: int, size: int, value: int) -> Action | None:
        """See pyvmm.bus.Handler."""
        place = self._place(offset, size)
        if place is not None:
            self._bus.write(*place, size, value)
        return None
