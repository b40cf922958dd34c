"""A machine that goes on from a snapshot's files: its memory, and its state."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from pyvmm.control import snapshot_store as store
from pyvmm.errors import ConfigError, HostError
from pyvmm.host import syscalls
from pyvmm.host.saved import Saved
from pyvmm.machine import saved_machine
from pyvmm.machine.alarm import Alarm
from pyvmm.machine.board.registry import board_of_host
from pyvmm.machine.builder import Parts, Prepared, prepare_restored
from pyvmm.memory.private_memory import PrivateMemory
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
        state = _read.get(self._path) or store.read_state(self._path)
        self._state = Saved(state, "the VM")

    def prepare(
        self, devices: tuple[VirtioDevice, ...], alarm: Alarm, closing: ExitStack
    ) -> Prepared:
        """The machine without KVM. Raises ConfigError, HostError."""
        path = os.path.join(self._path, store.MEMORY)
        try:
            fd = syscalls.open_file(path, os.O_RDONLY | os.O_NOFOLLOW)
        except HostError as error:
            raise ConfigError(f"the snapshot's memory: {error}", cure="take a new one") from None
        try:
            memory = PrivateMemory(board_of_host().ram_ranges(self._spec.memory), fd)
        finally:
            os.close(fd)
        cmdline = self._state.text("cmdline", 1 << 16)
        return prepare_restored(self._spec, devices, alarm, closing, memory, cmdline)

    def restore(self, parts: Parts, warn: Callable[[str], None]) -> None:
        """Have `parts` go on where they were saved. Raises ConfigError, HostError."""
        saved_machine.restore(parts, self._state.table("machine"), warn)
