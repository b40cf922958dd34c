"""MSI-X: a table of messages that a driver fills, one for each vector of a function (PCI Local Bus
Specification 3.0, 6.8.2 MSI-X Capability and Table Structure).

A vector's interrupt is a signal on its `MessageLine`. While the vector is masked, or MSI-X is off,
the line is disconnected. A signal waits there, a pending bit says so, and the signal goes out when
the line is connected. So masking and signalling need no lock between them, and an interrupt takes
one system call.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from threading import Lock
from typing import Any, Protocol

from pyvmm.errors import HostError
from pyvmm.host.log import RateLimited
from pyvmm.host.saved import Saved
from pyvmm.pci import registers as pci
from pyvmm.pci.function import Capability, Function

MAX_VECTORS = 2048
_FLAGS_AT = 2  # in the capability
_WORDS = 4  # of an entry


class MessageLine(Protocol):
    """The target of the signals of one vector. The machine has it; a device signals it at any
    time."""

    def connect(self, address: int, data: int) -> None:
        """From now on each signal writes `data` to `address`; signals that wait do so at once, as
        one. Raises PyvmmError if there is nobody to take such a message."""

    def disconnect(self) -> None:
        """From now on signals wait. Raises HostError."""

    @property
    def pending(self) -> bool:
        """True if a signal waits."""

    def wait(self) -> None:
        """Have a signal wait, as one did when the state was saved. Of a line that is not connected;
        raises HostError."""


class Msix:
    """The table, the pending bits and the capability of one function.

    Any vCPU's thread may call it; nothing here is called for an interrupt.
    """

    def __init__(self, lines: Sequence[MessageLine], warn: RateLimited) -> None:
        if not 0 < len(lines) <= MAX_VECTORS:
            raise ValueError(f"{len(lines)} vectors")
        self.lines = lines
        self.table_size = len(lines) * pci.PCI_MSIX_ENTRY_SIZE
        self.pending_size = -(-len(lines) // 64) * 8
        self._warn = warn
        self._lock = Lock()
        self._entries = [[0] * _WORDS for _ in lines]
        self._messages: list[tuple[int, int] | None] = [None] * len(lines)  # as connected
        self._bus_master = False
        self._flags = 0
        self._clear()

    def _clear(self) -> None:
        for entry in self._entries:
            entry[:] = (0, 0, 0, pci.PCI_MSIX_ENTRY_CTRL_MASKBIT)

    def add_to(self, function: Function, bar: int, table: int, pending: int) -> None:
        """Announce it: table and pending bits lie at offsets `table` and `pending` of BAR number
        `bar`."""
        body = struct.pack("<HII", len(self.lines) - 1, table | bar, pending | bar)
        flags = pci.PCI_MSIX_FLAGS_ENABLE | pci.PCI_MSIX_FLAGS_MASKALL
        capability = Capability(pci.PCI_CAP_ID_MSIX, body, struct.pack("<H", flags))
        self._function = function
        self._at = function.add_capability(capability, self)

    @property
    def enabled(self) -> bool:
        """True if the driver has turned MSI-X on."""
        return bool(self._flags & pci.PCI_MSIX_FLAGS_ENABLE)

    # --- what may change whether a vector's messages go out ---------------------------------------

    def before_read(self, offset: int, size: int) -> None:
        """See pyvmm.pci.function.Watcher."""

    def after_write(self, offset: int, size: int) -> None:
        """See pyvmm.pci.function.Watcher: the function may have been turned on or masked."""
        at = self._at + _FLAGS_AT
        with self._lock:
            self._flags = int.from_bytes(self._function.space[at : at + 2], "little")
            self._update_all()

    def bus_master_changed(self, on: bool) -> None:
        """Messages are memory accesses of the function: without bus mastering they wait."""
        with self._lock:
            self._bus_master = on
            self._update_all()

    def reset(self) -> None:
        """Every vector is masked and MSI-X is off, as at the beginning."""
        at = self._at + _FLAGS_AT
        self._function.space[at + 1] &= 0x07  # all but the size
        with self._lock:
            self._flags = 0
            self._clear()
            self._update_all()

    def _update_all(self) -> None:
        for vector in range(len(self.lines)):
            self._update(vector)

    def _update(self, vector: int) -> None:
        low, high, data, control = self._entries[vector]
        masked = self._flags & pci.PCI_MSIX_FLAGS_MASKALL or control & 1
        message = None
        if self.enabled and self._bus_master and not masked:
            message = high << 32 | low, data
        if message == self._messages[vector]:
            return
        line = self.lines[vector]
        self._messages[vector] = None
        if message is None:
            self._disconnect(vector)
            return
        try:
            line.connect(*message)
        except Exception as error:
            self._disconnect(vector)
            self._warn(f"vector {vector} sends nothing: {error}")
            return
        self._messages[vector] = message

    def _disconnect(self, vector: int) -> None:
        try:
            self.lines[vector].disconnect()
        except HostError as error:
            self._warn(f"vector {vector} is not masked: {error}")

    # --- saved and restored -----------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """The table, and the vectors whose messages wait. The rest is in configuration space."""
        with self._lock:
            pending = [vector for vector, line in enumerate(self.lines) if line.pending]
            return {"entries": [list(entry) for entry in self._entries], "pending": pending}

    def restore(self, saved: Saved) -> None:
        """Restore what `save` gave, once configuration space is restored. Raises ConfigError,
        HostError."""
        rows = saved.items("entries", MAX_VECTORS)
        if len(rows) != len(self._entries):
            raise saved.wrong(f"there are {len(rows)} vectors, not {len(self._entries)}")
        for row in rows:
            good = isinstance(row, list) and len(row) == _WORDS
            if not good or not all(type(word) is int and 0 <= word < 1 << 32 for word in row):
                raise saved.wrong(f"an entry is {row!r:.60}")
        pending = saved.integers("pending", len(rows), len(rows) - 1)
        with self._lock:
            # Before the entries: a signal that waits goes out when its line is connected.
            for vector in pending:
                self.lines[vector].wait()
            for entry, row in zip(self._entries, rows, strict=True):
                entry[:] = row
                entry[0] &= ~3
                entry[3] &= pci.PCI_MSIX_ENTRY_CTRL_MASKBIT
            at = self._at + _FLAGS_AT
            self._flags = int.from_bytes(self._function.space[at : at + 2], "little")
            self._update_all()

    # --- the table and the pending bits in a BAR --------------------------------------------------

    def read_table(self, offset: int, size: int) -> int:
        """Aligned accesses of 4 and 8 bytes; 0 for others."""
        if size not in (4, 8) or offset % size:
            return 0
        words = self._entries[offset // pci.PCI_MSIX_ENTRY_SIZE]
        word = offset // 4 % _WORDS
        return words[word] if size == 4 else words[word] | words[word + 1] << 32

    def write_table(self, offset: int, size: int, value: int) -> None:
        """Likewise; others change nothing."""
        if size not in (4, 8) or offset % size:
            self._warn(f"{size}-byte write to the MSI-X table at {offset:#x} ignored")
            return
        vector, word = offset // pci.PCI_MSIX_ENTRY_SIZE, offset // 4 % _WORDS
        with self._lock:
            words = self._entries[vector]
            words[word] = value & 0xFFFF_FFFF
            if size == 8:
                words[word + 1] = value >> 32
            words[0] &= ~3  # a message is four bytes, aligned
            words[3] &= pci.PCI_MSIX_ENTRY_CTRL_MASKBIT
            self._update(vector)

    def read_pending(self, offset: int, size: int) -> int:
        """A set bit for each vector whose message waits; it is read-only."""
        if size not in (4, 8) or offset % size:
            return 0
        vectors = self.lines[8 * offset : 8 * (offset + size)]
        return sum(1 << bit for bit, line in enumerate(vectors) if line.pending)
