"""A machine that goes on from a snapshot's files: its memory, and its state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from pyvmm.control import snapshot_store as store
from pyvmm.host.saved import Saved
from pyvmm.machine import saved_machine
from pyvmm.machine.board.registry import board_of_host
from pyvmm.machine.builder import Parts, Prepared, prepare_restored
from pyvmm.machine.outcome import Alarm
from pyvmm.memory.private_memory import PrivateMemory
from pyvmm.monitor.saved_memory import SavedMemory
from pyvmm.spec.vm import VmSpec
from pyvmm.virtio.device import VirtioDevice

_read: dict[str, dict[str, Any]] = {}


def read_once(path: str) -> None:
    """Read the state of the snapshot in the directory `path` now, for all who begin with it in this
    process or those forked from it. Raises ConfigError."""
    _read[path] = store.read_state(path)


class Restoring:
    """The snapshot that `spec` names, until the machine runs."""

    def __init__(self, spec: VmSpec) -> None:
        """Raises ConfigError."""
        self._spec = spec
        self._path = spec.restored_from
        self._raw = _read.get(self._path) or store.read_state(self._path)
        self._state = Saved(self._raw, "the VM")

    def prepare(
        self, devices: tuple[VirtioDevice, ...], alarm: Alarm, closing: ExitStack
    ) -> Prepared:
        """The machine without KVM. Raises ConfigError, HostError."""
        with SavedMemory(self._path, self._raw, self._spec.memory) as saved:
            (fd, _), *over = saved.files
            memory = PrivateMemory(board_of_host().ram_ranges(self._spec.memory), fd, over)
        memory.began_as = str(self._raw.get("id", ""))
        cmdline = self._state.text("cmdline", 1 << 16)
        return prepare_restored(self._spec, devices, alarm, closing, memory, cmdline)

    def restore(self, parts: Parts, warn: Callable[[str], None]) -> None:
        """Have `parts` go on where they were saved. Raises ConfigError, HostError."""
        saved_machine.restore(parts, self._state.table("machine"), warn)
