"""Files of the host that are memory of the guest: each above the RAM, in a KVM memory slot of its
own.

The guest alone reads and writes them. For devices they are not RAM (a buffer there is refused), and
nothing here touches a byte of a shared mapping: whoever may write to such a file may also cut it
short, and an access of ours to what is gone then would end the process (SIGBUS). The guest's own
access is KVM's business: KVM_RUN fails, and so the run ends. A file of a snapshot is mapped
privately, as RAM is then. See docs/decisions/0359-files-as-memory.md, and 0377 for those that are
BARs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import _cffi_backend

from pyvmm.bus import Bus
from pyvmm.errors import ConfigError
from pyvmm.host import syscalls
from pyvmm.kvm import uapi
from pyvmm.kvm.vm import Vm
from pyvmm.machine.board.registry import board_of_host
from pyvmm.memory.private_memory import PrivateMemory

_ALIGN = 1 << 30  # the largest page, eight of Linux's memory sections
_ffi = _cffi_backend.FFI()


class MappedFile(NamedTuple):
    """`size` bytes that the guest sees at `guest_addr` and this process has at `host_addr`; `fd` is
    the file itself, and `private` what it has become for this guest alone."""

    guest_addr: int
    size: int
    host_addr: int
    read_only: bool
    fd: int
    private: PrivateMemory | None = None


class MappedFiles:
    """All such files of one machine, in the order in which they were mapped."""

    def __init__(self, ram: int, closing: ExitStack, *, as_bars: bool = False) -> None:
        """For a guest with `ram` bytes of RAM; `closing` unmaps them, after the VM is gone. With
        `as_bars` each has a place that a BAR can have: its size is a power of two then, and its
        address a multiple of that."""
        self._room = board_of_host().mapped_files(ram)
        self._as_bars = as_bars
        self._next = self._room.start
        self._closing = closing
        self._files: list[MappedFile] = []

    def __iter__(self) -> Iterator[MappedFile]:
        return iter(self._files)

    def map(self, fd: int, size: int, read_only: bool, private: PrivateMemory | None = None) -> int:
        """Make the first `size` bytes of a file, whole pages, memory of the guest; its
        guest-physical address, a whole number of GiB.

        The guest's writes go to the file; with `read_only` it cannot write, and with `private`,
        which has the same bytes, they go there, which is closed with the rest. The file
        descriptor may be closed afterwards. Raises ConfigError if the guest has no room for it,
        HostError if it cannot be mapped (ENODEV: its file system has no shared mappings).
        """
        room = 1 << (size - 1).bit_length() if self._as_bars else size
        start = -(-self._next // room) * room if self._as_bars else self._next
        end = start + room
        if end > self._room.stop:
            raise ConfigError(
                f"files of more than {len(self._room) >> 40} TiB as memory of one guest",
                cure="use smaller ones, or disks",
            )
        if private is not None:
            self._closing.callback(private.close)
            host_addr = private.regions[0].host_addr
        else:
            mapping = syscalls.map_shared(fd, size, read_only=read_only)
            self._closing.callback(mapping.close)
            host_addr = int(_ffi.cast("uintptr_t", _ffi.from_buffer(mapping)))
        kept = os.dup(fd)
        self._closing.callback(os.close, kept)
        self._files.append(MappedFile(start, size, host_addr, read_only, kept, private))
        self._next = -(-end // _ALIGN) * _ALIGN
        return start

    @property
    def window(self) -> range:
        """The guest-physical addresses that all of them are in."""
        return range(self._room.start, self._next)

    def check_reach(self, address_bits: int) -> None:
        """Raise ConfigError for a guest whose `address_bits` do not reach all of them."""
        end = max(file.guest_addr + file.size for file in self._files)
        if end >> address_bits:
            raise ConfigError(
                f"files as memory end at {end:#x}, and this machine's KVM gives a guest addresses "
                f"of {address_bits} bits",
                cure="use smaller ones, or less --memory",
            )

    def add_to(
        self, vm: Vm, bus: Bus, slot: int, address_bits: int, warn: Callable[[str], None]
    ) -> None:
        """Give them to `vm`, in memory slots from `slot` on. What the guest writes to one that is
        read-only comes to `bus`, and `warn` hears of it once.

        Raises ConfigError for a guest whose `address_bits` do not reach that far, HostError.
        """
        self.check_reach(address_bits)
        for slot_of_file in self.slots(vm, slot, warn):
            file = slot_of_file.file
            slot_of_file.put(file.guest_addr)
            if file.read_only:
                bus.register(file.guest_addr, file.size, slot_of_file)

    def slots(self, vm: Vm, first: int, warn: Callable[[str], None]) -> list[FileSlot]:
        """Memory slots for them, from number `first` on, that are nowhere yet."""
        return [FileSlot(vm, number, file, warn) for number, file in enumerate(self._files, first)]


class FileSlot:
    """A file in its memory slot of KVM; also the handler of what KVM does not answer of it: the
    guest's writes where it may only read, and accesses in roundabout ways."""

    def __init__(self, vm: Vm, number: int, file: MappedFile, warn: Callable[[str], None]) -> None:
        self.file = file
        self._vm = vm
        self._number = number
        self._warn = warn
        self._at: int | None = None
        self._has_warned = False

    def put(self, address: int | None) -> None:
        """Be at guest-physical `address`, or nowhere. Raises HostError; it is nowhere then, or
        where it was."""
        vm, file = self._vm, self.file
        if self._at is not None:
            vm.set_memory_region(self._number, self._at, 0, file.host_addr)
            self._at = None
        if address is not None:
            flags = uapi.KVM_MEM_READONLY if file.read_only else 0
            vm.set_memory_region(self._number, address, file.size, file.host_addr, flags)
            self._at = address

    def read(self, offset: int, size: int) -> int:
        """See pyvmm.bus.Handler; all ones for what is not there."""
        found = self._read(offset, size)
        return (1 << 8 * size) - 1 if found is None else int.from_bytes(found, "little")

    def _read(self, offset: int, size: int) -> bytes | None:
        if offset + size > self.file.size:
            return None
        if self.file.private is not None:
            return self.file.private.read(offset, size)
        try:
            found = os.pread(self.file.fd, size, offset)
        except OSError:
            return None
        return found if len(found) == size else None

    def write(self, offset: int, size: int, value: int) -> None:
        """See pyvmm.bus.Handler. A file that was cut short does not grow."""
        if self.file.private is not None:
            if offset + size <= self.file.size:
                self.file.private.write(offset, value.to_bytes(size, "little"))
        elif self.file.read_only:
            if not self._has_warned and offset < self.file.size:
                self._has_warned = True
                self._warn(
                    "the guest writes to a file that it was given read-only; nothing is written, "
                    "and this is not said again: mount it with -o ro"
                )
        elif self._read(offset, size) is not None:
            try:
                os.pwrite(self.file.fd, value.to_bytes(size, "little"), offset)
            except OSError as error:
                self._warn(f"a write to {offset:#x} of a file as memory is lost: {error}")
