"""One PCI function: its configuration space, with a type 0 header, and its memory BARs.

The space is bytes and, for each bit of them, whether a driver may change it; so read-only and
reserved fields, BARs that are sized and accesses of any width need no rule of their own. What a
write changes has an effect through the bus, which looks at BARs and command afterwards, or through
the watcher of a capability.

PCI Local Bus Specification 3.0: 6.1 Configuration Space Organization, 6.2 Configuration Space
Functions, 6.2.5 Base Addresses, 6.7 Capabilities List.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple, Protocol

from pyvmm.bus import Handler
from pyvmm.host.saved import Saved
from pyvmm.pci import registers as pci

_BARS = 6  # 32-bit registers; a 64-bit BAR takes two
_BAR_TYPE = 0xF  # the low bits of a memory BAR
_FLAGS = pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER | pci.PCI_COMMAND_INTX_DISABLE
_ONES = 0xFF


class Bar(NamedTuple):
    """A 64-bit memory BAR, register `number` (0, 2 or 4): `size` bytes, a power of two of 4 KiB or
    more, that `handler` answers. It is `prefetchable` where a read has no effect, as of memory."""

    number: int
    size: int
    handler: Handler
    prefetchable: bool = False


class Watcher(Protocol):
    """The effect of a driver's access to a part of the space, at offsets into that part."""

    def before_read(self, offset: int, size: int) -> None:
        """The driver reads the `size` bytes at `offset` next: they may be brought up to date."""

    def after_write(self, offset: int, size: int) -> None:
        """The driver has written the `size` bytes at `offset`, as far as they can be written."""


class Placement(Protocol):
    """Hears what becomes of a function on its bus."""

    def bar_moved(self, bar: Bar, address: int | None) -> None:
        """`bar` answers at guest-physical `address` from now on, or nowhere."""

    def bus_master_changed(self, on: bool) -> None:
        """True if the function may access memory and send messages."""

    def function_reset(self) -> None:
        """The driver has reset the function: what is behind it starts anew. Its BARs answer nowhere
        by now, and no access to them is under way."""


class Capability(NamedTuple):
    """A capability to be put into the list: `body` follows its ID and the pointer to the next one;
    `writable` has a set bit for each bit of `body` that a driver may change, if there is any."""

    id: int
    body: bytes
    writable: bytes = b""


class Function:
    """A function of a device. `read` and `write` are its configuration space; the bus alone writes,
    under `lock`, so that one write happens after the other.

    `placement` hears what a write has done to BARs and bus mastering.
    """

    def __init__(
        self,
        vendor_id: int,
        device_id: int,
        class_code: int,
        *,
        revision: int = 0,
        subsystem_vendor_id: int = 0,
        subsystem_id: int = 0,
        bars: Sequence[Bar] = (),
    ) -> None:
        """`class_code` has 24 bits: class, subclass, programming interface."""
        self.lock = Lock()
        self.space = bytearray(pci.PCI_CFG_SPACE_EXP_SIZE)
        self._writable = bytearray(pci.PCI_CFG_SPACE_EXP_SIZE)
        self._watched: list[tuple[int, int, Watcher]] = []
        self._last_pointer = pci.PCI_CAPABILITY_LIST
        self._free = pci.PCI_STD_HEADER_SIZEOF
        self.bars = tuple(bars)
        self.placement: Placement | None = None
        self.was_bus_master = False  # when `placement` last heard of it
        self.wants_reset = False  # a write has asked for a function-level reset
        struct.pack_into("<HH", self.space, pci.PCI_VENDOR_ID, vendor_id, device_id)
        struct.pack_into("<I", self.space, pci.PCI_CLASS_REVISION, class_code << 8 | revision)
        struct.pack_into(
            "<HH", self.space, pci.PCI_SUBSYSTEM_VENDOR_ID, subsystem_vendor_id, subsystem_id
        )
        struct.pack_into("<H", self._writable, pci.PCI_COMMAND, _FLAGS)
        # Of no effect here; system software keeps its own notes in them.
        self._writable[pci.PCI_CACHE_LINE_SIZE] = _ONES
        self._writable[pci.PCI_INTERRUPT_LINE] = _ONES
        for bar in bars:
            self._add_bar(bar)

    def _add_bar(self, bar: Bar) -> None:
        if (
            bar.number % 2
            or not 0 <= bar.number < _BARS
            or bar.size < 4096
            or bar.size & bar.size - 1
        ):
            raise ValueError(f"no such BAR: {bar.number}, {bar.size} bytes")
        at = pci.PCI_BASE_ADDRESS_0 + 4 * bar.number
        kind = pci.PCI_BASE_ADDRESS_MEM_TYPE_64
        if bar.prefetchable:
            kind |= pci.PCI_BASE_ADDRESS_MEM_PREFETCH
        struct.pack_into("<Q", self.space, at, kind)
        # The address bits below the size are read-only zeros: that is what sizing finds out.
        struct.pack_into("<Q", self._writable, at, (1 << 64) - bar.size)

    def add_capability(self, capability: Capability, watcher: Watcher | None = None) -> int:
        """Put `capability` at the end of the list; where its ID stands. `watcher` sees accesses to
        it, at offsets from there. Raises ValueError if there is no room."""
        at = self._free
        end = at + 2 + len(capability.body)
        if end > pci.PCI_CFG_SPACE_SIZE:
            raise ValueError("no room for another capability")
        self.space[self._last_pointer] = at
        self.space[at : at + 2] = bytes((capability.id, 0))
        self.space[at + 2 : end] = capability.body
        self._writable[at + 2 : at + 2 + len(capability.writable)] = capability.writable
        self.space[pci.PCI_STATUS] |= pci.PCI_STATUS_CAP_LIST
        if watcher is not None:
            self._watched.append((at, end, watcher))
        self._last_pointer = at + 1
        self._free = -(-end // 4) * 4
        return at

    # --- what a driver has set ------------------------------------------------------------------

    @property
    def command(self) -> int:
        """The command register (6.2.2 Device Control)."""
        return self.space[pci.PCI_COMMAND] | self.space[pci.PCI_COMMAND + 1] << 8

    @property
    def decodes_memory(self) -> bool:
        """True if the BARs answer."""
        return bool(self.command & pci.PCI_COMMAND_MEMORY)

    @property
    def is_bus_master(self) -> bool:
        """True if the function may access memory, which includes sending messages."""
        return bool(self.command & pci.PCI_COMMAND_MASTER)

    def address_of(self, bar: Bar) -> int:
        """The guest-physical address to which the driver has set `bar`."""
        at = pci.PCI_BASE_ADDRESS_0 + 4 * bar.number
        return int.from_bytes(self.space[at : at + 8], "little") & ~_BAR_TYPE

    def place(self, bar: Bar, address: int) -> None:
        """Set `bar` as firmware does before a driver looks."""
        at = pci.PCI_BASE_ADDRESS_0 + 4 * bar.number
        low = self.space[at] & _BAR_TYPE
        self.space[at : at + 8] = (address | low).to_bytes(8, "little")

    def reset(self) -> None:
        """Give the fields that a driver can set their first values, in the header and in
        capabilities (PCI Express Base Specification, 6.6.2 Function Level Reset)."""
        for at, mask in enumerate(self._writable[: pci.PCI_CFG_SPACE_SIZE]):
            self.space[at] &= ~mask

    # --- saved and restored ---------------------------------------------------------------------

    def save(self) -> str:
        """The configuration space, as hexadecimal digits."""
        return self.space.hex()

    def load(self, saved: Saved) -> None:
        """Restore what `save` gave, the value `space` of `saved`; the bus has BARs follow. Raises
        ConfigError for the space of another device: only what a driver can set may differ."""
        space = saved.data("space", pci.PCI_CFG_SPACE_EXP_SIZE)
        for at, (byte, now, mask) in enumerate(zip(space, self.space, self._writable, strict=True)):
            if (byte ^ now) & ~mask:
                raise saved.wrong(f"configuration space differs at {at:#x}, so the device does")
        self.space[:] = space

    # --- accesses -------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """`size` bytes of configuration space; ones beyond its end."""
        for start, end, watcher in self._watched:
            if offset < end and start < offset + size:
                watcher.before_read(offset - start, size)
        found = self.space[offset : offset + size]
        return int.from_bytes(found.ljust(size, b"\xff"), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `size` bytes; bits that a driver may not change stay."""
        end = min(offset + size, len(self.space))
        for at in range(offset, end):
            mask = self._writable[at]
            byte = value >> 8 * (at - offset) & 0xFF
            self.space[at] = self.space[at] & ~mask | byte & mask
        for start, stop, watcher in self._watched:
            if offset < stop and start < end:
                watcher.after_write(offset - start, size)
