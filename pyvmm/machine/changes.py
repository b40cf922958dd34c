"""The pages of guest memory that changed since a snapshot was taken, for one that has only those.

RAM that lies in files privately (PrivateMemory) knows it by its page tables. For the usual RAM, a
memfd, two are asked, from the first snapshot on after which somebody wants to know:

- KVM, by its dirty log, of what vCPUs write and KVM itself. It gets a mapping of the memfd of its
  own for that: then the pages that this process has in its mapping are those that
- our devices, and vhost in the kernel, have touched. They are let go of at each snapshot.

Both may name pages that are as they were, and whoever stores them compares. Of memory that was lent
to another process (vhost-user) these are all that have ever been written to.
"""

from __future__ import annotations

import mmap

import _cffi_backend

from pyvmm.errors import ConfigError
from pyvmm.host import syscalls
from pyvmm.kvm import uapi
from pyvmm.kvm.vm import Vm
from pyvmm.memory import GuestMemory, pages
from pyvmm.memory.guest_memory import PAGE_SIZE
from pyvmm.memory.private_memory import PrivateMemory

_ffi = _cffi_backend.FFI()
_MOST_KNOWN = 4  # snapshots, the newest ones
WITH_TRACK = "take that one with --track, or restore the VM from it"


class Changes:
    """Of the memory of one machine, which stands still in each call."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._known: dict[str, bytes] = {}  # by snapshot: what has changed since
        self._none = pages.NO * (memory.size // PAGE_SIZE)
        self._vm: Vm | None = None  # whose log is on
        self._kvms: mmap.mmap | None = None
        if isinstance(memory, PrivateMemory) and memory.began_as:
            self._known[memory.began_as] = self._none

    def since(self, snapshot: str, vm: Vm) -> bytes:
        """The set of the pages that may have changed since the snapshot of that id was taken.
        Raises ConfigError if nobody has kept note of them, HostError."""
        self._collect(vm)
        if snapshot not in self._known:
            raise ConfigError("what has changed since that snapshot is not known", cure=WITH_TRACK)
        return self._known[snapshot]

    def begin(self, snapshot: str, vm: Vm) -> None:
        """Keep note of what changes from now on. Raises HostError."""
        self._collect(vm)
        self._known[snapshot] = self._none
        while len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]

    def before_reading(self, vm: Vm) -> None:
        """All of memory is read next, which is not to be taken for a change. Raises HostError."""
        if self._vm is vm:
            self._collect(vm)

    def after_reading(self, vm: Vm) -> None:
        """It was."""
        if self._vm is vm:
            self._memory.let_go()

    def _collect(self, vm: Vm) -> None:
        if isinstance(self._memory, PrivateMemory):
            found = self._memory.changed()
        elif self._vm is not vm:  # the first time, or the guest has booted anew
            self._known = {}
            self._start(vm)
            return
        else:
            found = self._logged(vm)
        for snapshot, before in self._known.items():
            self._known[snapshot] = pages.both(before, found)

    def _start(self, vm: Vm) -> None:
        memory = self._memory
        kvms = syscalls.map_shared(memory.fd, memory.size)
        syscalls.prefer_huge_pages(kvms)
        start = int(_ffi.cast("uintptr_t", _ffi.from_buffer(kvms)))
        for slot, region in enumerate(memory.regions):
            # A slot that is there cannot move to other memory of this process.
            vm.set_memory_region(slot, region.guest_addr, 0, region.host_addr)
            vm.set_memory_region(
                *(slot, region.guest_addr, region.size, start + region.fd_offset),
                uapi.KVM_MEM_LOG_DIRTY_PAGES,
            )
        self._vm, self._kvms = vm, kvms
        memory.watch_discards()
        memory.let_go()

    def _logged(self, vm: Vm) -> bytes:
        memory = self._memory
        by_kvm = [
            pages.from_bitmap(vm.get_dirty_log(slot, region.size), region.size // PAGE_SIZE)
            for slot, region in enumerate(memory.regions)
        ]
        found = pages.both(b"".join(by_kvm), memory.mapped())
        found = pages.both(found, memory.discarded())
        memory.let_go()
        return found
