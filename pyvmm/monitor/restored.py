"""A machine that goes on from a snapshot's files: its memory, and its state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pyvmm.control import snapshot_store as store
from pyvmm.host.saved import Saved
from pyvmm.machine import saved_machine
from pyvmm.machine.board.registry import board_of_host
from pyvmm.machine.builder import GoesOn, Parts, Prepared, open_kvm, prepare_restored
from pyvmm.machine.outcome import Alarm
from pyvmm.memory import GuestMemory
from pyvmm.memory.private_memory import PrivateMemory
from pyvmm.monitor import working_set
from pyvmm.monitor.saved_memory import SavedMemory
from pyvmm.spec.vm import VmSpec
from pyvmm.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from pyvmm.kvm.system import Kvm
    from pyvmm.machine.mapped_files import MappedFiles

_read: dict[str, dict[str, Any]] = {}
_compared: set[str] = set()


def read_once(spec: VmSpec) -> None:
    """Read the state of the snapshot that `spec` goes on from now, and see that this machine has
    what it has used, for all who begin with it in this process or those forked from it. Raises
    ConfigError, HostError."""
    _read[spec.restored_from] = store.read_state(spec.restored_from)
    with ExitStack() as closing:
        restoring = Restoring(spec)
        restoring.open_kvm(closing)
    with SavedMemory(spec.restored_from, _read[spec.restored_from], spec.memory) as saved:
        saved.fetch_ahead(working_set.noted(spec.restored_from))
    _compared.add(spec.restored_from)


class Restoring:
    """The snapshot that `spec` names, until the machine runs."""

    def __init__(self, spec: VmSpec) -> None:
        """Raises ConfigError."""
        self._spec = spec
        self._path = spec.restored_from
        self._raw = _read.get(self._path) or store.read_state(self._path)
        self._state = Saved(self._raw, "the VM")

    def open_kvm(self, closing: ExitStack) -> Kvm:
        """This machine's KVM, which has all that the saved machine has used. Raises ConfigError,
        which names what is missing, HostError."""
        board = board_of_host()
        kvm = open_kvm(board, self._spec.cpus, closing)
        if self._path not in _compared:
            state = self._state.table("machine").table("board")
            board.check_saved(kvm, state, self._spec.cpus)
        return kvm

    def prepare(
        self,
        devices: tuple[VirtioDevice, ...],
        alarm: Alarm,
        closing: ExitStack,
        files: MappedFiles | None,
    ) -> Prepared:
        """The machine without KVM. Raises ConfigError, HostError."""
        memory = self._memory(lent=any(device.lends_memory for device in devices))
        machine = self._state.table("machine")
        places = saved_machine.read_places(machine, devices, self._spec.transport)
        goes_on = GoesOn(self._state.text("cmdline", 1 << 16), places)
        return prepare_restored(self._spec, devices, alarm, closing, memory, goes_on, files)

    def _memory(self, *, lent: bool) -> GuestMemory:
        """The machine's RAM. What is lent to another process has to be a file of this VM alone, so
        that it is read from the snapshot now and not page by page."""
        ranges = board_of_host().ram_ranges(self._spec.memory)
        with SavedMemory(self._path, self._raw, self._spec.memory) as saved:
            if lent:
                copied = GuestMemory(ranges)
                saved.copy_to(copied)
                return copied
            if self._path not in _compared:  # else it has been fetched for those before
                saved.fetch_ahead(working_set.noted(self._path))
            (fd, _), *over = saved.files
            memory = PrivateMemory(ranges, fd, over)
        memory.began_as = str(self._raw.get("id", ""))
        return memory

    def restore(self, parts: Parts, warn: Callable[[str], None]) -> None:
        """Have `parts` go on where they were saved. Raises ConfigError, HostError."""
        saved_machine.restore(parts, self._state.table("machine"), warn)

    def start_clock(self, parts: Parts) -> None:
        """The vCPUs of `parts`, which have been restored, are about to run for the first time.
        Raises ConfigError, HostError."""
        saved_machine.start_clock(parts, self._state.table("machine"))
