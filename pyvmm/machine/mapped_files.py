"""Files of the host that are memory of the guest: each above the RAM, in a KVM memory slot of its
own.

The guest alone reads and writes them. For devices they are no RAM (a buffer there is refused), and
nothing here touches a byte: whoever may write to such a file may also cut it short, and an access
of ours to what is gone then would end the process (SIGBUS). The guest's own access is KVM's
business: KVM_RUN fails, and so the run ends. See docs/decisions/0359-files-as-memory.md.
"""

from __future__ import annotations

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

_ALIGN = 1 << 30  # the largest page, eight of Linux's memory sections
_ffi = _cffi_backend.FFI()


class MappedFile(NamedTuple):
    """`size` bytes that the guest sees at `guest_addr` and this process has at `host_addr`."""

    guest_addr: int
    size: int
    host_addr: int
    read_only: bool


class MappedFiles:
    """All such files of one machine, in the order in which they were mapped."""

    def __init__(self, ram: int, closing: ExitStack) -> None:
        """For a guest with `ram` bytes of RAM; `closing` unmaps them, after the VM is gone."""
        self._room = board_of_host().mapped_files(ram)
        self._next = self._room.start
        self._closing = closing
        self._files: list[MappedFile] = []

    def __iter__(self) -> Iterator[MappedFile]:
        return iter(self._files)

    def map(self, fd: int, size: int, read_only: bool) -> int:
        """Make the first `size` bytes of a file, whole pages, memory of the guest; its
        guest-physical address, a whole number of GiB.

        What the guest writes goes to the file; with `read_only` it cannot write. The file
        descriptor may be closed afterwards. Raises ConfigError if the guest has no room for it,
        HostError if it cannot be mapped (ENODEV: its file system has no shared mappings).
        """
        start = self._next
        end = start + size
        if end > self._room.stop:
            raise ConfigError(
                f"files of more than {len(self._room) >> 40} TiB as memory of one guest",
                cure="use smaller ones, or disks",
            )
        mapping = syscalls.map_shared(fd, size, read_only=read_only)
        self._closing.callback(mapping.close)
        host_addr = int(_ffi.cast("uintptr_t", _ffi.from_buffer(mapping)))
        self._files.append(MappedFile(start, size, host_addr, read_only))
        self._next = -(-end // _ALIGN) * _ALIGN
        return start

    def add_to(
        self, vm: Vm, bus: Bus, slot: int, address_bits: int, warn: Callable[[str], None]
    ) -> None:
        """Give them to `vm`, in memory slots from `slot` on. What the guest writes to one that is
        read-only comes to `bus`, and `warn` hears of it once.

        Raises ConfigError for a guest whose `address_bits` do not reach that far, HostError.
        """
        for number, file in enumerate(self._files, slot):
            if (file.guest_addr + file.size) >> address_bits:
                raise ConfigError(
                    f"files as memory end at {file.guest_addr + file.size:#x}, and this machine's "
                    f"KVM gives a guest addresses of {address_bits} bits",
                    cure="use smaller ones, or less --memory",
                )
            flags = uapi.KVM_MEM_READONLY if file.read_only else 0
            vm.set_memory_region(number, file.guest_addr, file.size, file.host_addr, flags)
            if file.read_only:
                bus.register(file.guest_addr, file.size, _Unwritable(warn))


class _Unwritable:
    """Answers the guest's writes to memory that it can only read; KVM answers the reads."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._has_warned = False

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._warn(
                "the guest writes to a file that it was given read-only; nothing is written, and "
                "this is not said again: mount it with -o ro"
            )
