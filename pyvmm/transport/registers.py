"""Registers as rows of a table, and the way from an access to its row, the same on every transport.

A transport writes its registers down as `Register` rows, in the order of the specification's table,
and gives them to a `RegisterFile`. Dispatch, gates, traces and docs/registers.md come from the
rows; ``python -m pyvmm.transport > docs/registers.md`` writes the latter.

What a driver must not do changes nothing and costs a rate-limited warning: an access of another
width than the register's or not aligned to it, to no register, against its direction, or at the
wrong time (virtio 1.3, 4.1.3.1 Driver Requirements: PCI Device Layout, and 4.2.2.2 Driver
Requirements: MMIO Device Register Layout). Such a read gives 0.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from pyvmm.bus import Action
from pyvmm.transport import events
from pyvmm.transport.base import Transport
from pyvmm.virtio import status
from pyvmm.virtio.lifecycle import Trace
from pyvmm.virtio.status import Gate

CONFIG_SPACE = 0  # as a row's width: as long as the window has room

_LOW_32 = 0xFFFF_FFFF
_CONFIG_SIZES = (1, 2, 4, 8)
_MOST_BYTES = 8  # of one access, see pyvmm.bus.Handler
_NOWHERE = 1 << 64

_Reader = Callable[[], int]
_Writer = Callable[[int], None]


class Register(NamedTuple):
    """One register.

    `offset` is from the base of the window, `access` ``"R"``, ``"W"`` or ``"RW"``, `gate` says when
    a write is taken. `handler` names the methods ``read_…`` and ``write_…`` of the transport or,
    what is the same for all of them, of its negotiation; `arguments` are passed to them first.
    `linux` is the name in the kernel's header after its common prefix, empty where it has none.
    `decode` says how a trace shows the value. Writes to a `locked` register happen one after the
    other; those that a driver makes for each request or interrupt are not, so that they never wait
    for a reset.

    `width` is 1, 2, 4 or 8 bytes. One of 8 may be accessed as two halves of 4 as well (4.1.3.2
    Device Requirements: PCI Device Layout): its handlers get another argument, the `shift` of a
    half, 0 or 32. The last row may be the device's `CONFIG_SPACE` (2.5 Device Configuration Space),
    accessed by 1, 2, 4 or 8 bytes, whose handler is ``config``.
    """

    offset: int
    name: str
    access: str
    gate: Gate
    handler: str
    linux: str
    purpose: str
    decode: str = ""
    arguments: tuple[str | int, ...] = ()
    width: int = 4
    locked: bool = True

    @property
    def sizes(self) -> str:
        """The bytes of an access, for a reader."""
        if self.width == CONFIG_SPACE:
            return "1, 2, 4 or 8"
        return "4 or 8" if self.width == 8 else str(self.width)

    def name_of(self, offset: int, size: int) -> str:
        """The name, where a part is accessed with the offset and size of it in bytes."""
        return self.name if size == self.width else f"{self.name}[{offset - self.offset:#x}:{size}]"


class RegisterFile:
    """The registers of one window: a `pyvmm.bus.Handler`."""

    def __init__(
        self, rows: Iterable[Register], transport: Transport, *, trace: Trace | None = None
    ) -> None:
        """`rows` in the order of their offsets. Raises AttributeError for one without handlers."""
        self._rows = tuple(rows)
        self._offsets = [row.offset for row in self._rows]
        self._transport = transport
        self._negotiation = transport.negotiation
        self._device = transport.device
        self._trace = trace
        # By size in bytes, then by offset.
        sizes = range(_MOST_BYTES + 1)
        self._readers: list[dict[int, _Reader]] = [{} for _ in sizes]
        self._writers: list[dict[int, tuple[Register, _Writer]]] = [{} for _ in sizes]
        self._unlocked_writers: list[dict[int, _Writer]] = [{} for _ in sizes]
        self._config_row = self._rows[-1]
        self._config_start = _NOWHERE
        for row in self._rows:
            if row.width == CONFIG_SPACE:
                self._bind_config(row)
            else:
                self._bind(row)

    def _bind(self, row: Register) -> None:
        if "R" in row.access:
            for offset, size, reader in _readers(row, self._find("read", row)):
                self._readers[size][offset] = reader
        if "W" in row.access:
            for offset, size, writer in _writers(row, self._find("write", row)):
                if row.locked:
                    self._writers[size][offset] = row, writer
                else:
                    self._unlocked_writers[size][offset] = writer

    def _bind_config(self, row: Register) -> None:
        always = self._device.config_always_writable
        self._config_row = row._replace(gate=status.ALWAYS) if always else row
        self._config_start = row.offset

    def _find(self, verb: str, row: Register) -> Callable[..., Any]:
        name = f"{verb}_{row.handler}"
        own = getattr(self._transport, name, None)
        found = own if own is not None else getattr(self._negotiation, name)
        return partial(found, *row.arguments) if row.arguments else found

    # --- accesses -----------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The value of `size` bytes at `offset`; 0 for what is not a register that can be read."""
        reader = self._readers[size].get(offset)
        if reader is not None:
            value = reader()
        elif offset >= self._config_start and size in _CONFIG_SIZES:
            value = self._negotiation.read_config(offset - self._config_start, size)
        else:
            self._refuse(offset, size, None)
            return 0
        if self._trace is not None:
            self._trace_access(offset, size, value, write=False)
        return value

    def write(self, offset: int, size: int, value: int) -> Action | None:
        """Write `size` bytes at `offset`. No register of a virtio device ends the machine."""
        unlocked = self._unlocked_writers[size].get(offset)
        if unlocked is not None:
            if self._trace is not None:
                self._trace_access(offset, size, value, write=True)
            unlocked(value)
            return None
        found = self._writers[size].get(offset)
        if found is not None:
            row, writer = found
            self._write_locked(row, offset, size, value, writer)
        elif offset >= self._config_start and size in _CONFIG_SIZES:
            writer = partial(self._negotiation.write_config, offset - self._config_start, size)
            self._write_locked(self._config_row, offset, size, value, writer)
        else:
            self._refuse(offset, size, value)
        return None

    def _write_locked(
        self, row: Register, offset: int, size: int, value: int, writer: _Writer
    ) -> None:
        negotiation = self._negotiation
        with negotiation.lock:
            if self._trace is not None:
                self._trace_access(offset, size, value, write=True)
            now = negotiation.state.status
            if row.gate.open(now):
                writer(value)
            else:
                negotiation.warn(
                    f"write of {value:#x} to {row.name} ignored: only {row.gate.when},"
                    f" the status is {status.describe(now)}"
                )

    def _row_at(self, offset: int) -> Register | None:
        place = bisect_right(self._offsets, offset) - 1
        if place < 0:
            return None
        row = self._rows[place]
        return row if row.width == CONFIG_SPACE or offset < row.offset + row.width else None

    def _refuse(self, offset: int, size: int, value: int | None) -> None:
        verb = "read" if value is None else f"write of {value:#x}"
        row = self._row_at(offset)
        if row is None:
            why = "there is no register"
        elif offset in self._readers[size]:
            why = f"{row.name} is read-only"
        elif offset in self._writers[size] or offset in self._unlocked_writers[size]:
            why = f"{row.name} is write-only"
        else:
            width = "1 byte" if row.width == 1 else f"{row.sizes} bytes"
            why = f"{row.name} takes aligned accesses of {width}"
        self._negotiation.warn(f"{size}-byte {verb} at {offset:#x} ignored: {why}")
        if self._trace is not None:
            event = events.BadAccess(self._device.name, value is not None, offset, size, value or 0)
            self._trace(event)

    def _trace_access(self, offset: int, size: int, value: int, *, write: bool) -> None:
        row = self._row_at(offset)
        if self._trace is not None and row is not None:
            names = self._device.feature_names
            meaning = events.decode(row.decode, value, self._negotiation.state, names)
            name = row.name_of(offset, size)
            self._trace(events.RegisterAccess(self._device.name, write, name, value, meaning))


def _readers(row: Register, read: Callable[..., int]) -> Iterator[tuple[int, int, _Reader]]:
    """Offset, size and function of each access by which `row` is read."""
    if row.width == 8:
        low, high = partial(read, 0), partial(read, 32)
        yield row.offset, 4, low
        yield row.offset + 4, 4, high
        yield row.offset, 8, lambda: low() | high() << 32
    elif row.width < 4:
        # A counter may be wider than the field that shows it.
        mask = (1 << 8 * row.width) - 1
        yield row.offset, row.width, lambda: read() & mask
    else:
        yield row.offset, row.width, read


def _writers(row: Register, write: Callable[..., None]) -> Iterator[tuple[int, int, _Writer]]:
    """Offset, size and function of each access by which `row` is written."""
    if row.width == 8:
        low, high = partial(write, 0), partial(write, 32)

        def both(value: int) -> None:
            low(value & _LOW_32)
            high(value >> 32)

        yield row.offset, 4, low
        yield row.offset + 4, 4, high
        yield row.offset, 8, both
    else:
        yield row.offset, row.width, write


def markdown(rows: Iterable[Register], prefix: str) -> str:
    """`rows` as a table for docs/registers.md; `prefix` is what the names in the kernel's header
    begin with."""
    lines = [
        f"| offset | name | access | bytes | writes are taken | meaning | `{prefix}` |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = row.sizes.replace(" or", ",")
        when = row.gate.when if "W" in row.access else ""
        linux = f"`{row.linux}`" if row.linux else ""
        lines.append(
            f"| {row.offset:#05x} | {row.name} | {row.access} | {sizes} | {when}"
            f" | {row.purpose} | {linux} |"
        )
    return "\n".join(lines) + "\n"
