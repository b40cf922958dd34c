"""The front end's memory: regions that have a guest address and a user address.

Descriptors hold guest addresses; ring addresses are the front end's user addresses. Neither is
trusted: the one is looked up at every access, the other when a ring starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.memory.lent_memory import LentMemory
from pyvmm.vhost_user.protocol import MAX_MEM_SLOTS, FrontEndError

_ADDRESSES = 1 << 64


class Slot(NamedTuple):
    """A region as the front end describes it; sizes and offsets in bytes."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int


class MemoryTable:
    """The front end's regions, and the `memory` that they make up."""

    def __init__(self) -> None:
        self.memory = LentMemory()
        self._slots: list[Slot] = []

    def set(self, slots: Sequence[Slot], fds: Sequence[int]) -> None:
        """Replace all regions. Raises PyvmmError, and then nothing has changed."""
        _check(slots)
        regions = [
            LentMemory.map_region(slot.guest_addr, slot.size, fd, slot.mmap_offset)
            for slot, fd in zip(slots, fds, strict=True)
        ]
        self.memory.replace(regions)
        self._slots = list(slots)

    def add(self, slot: Slot, fd: int) -> None:
        """Add a region. Raises PyvmmError, and then nothing has changed."""
        slots = [*self._slots, slot]
        _check(slots)
        self.memory.add(slot.guest_addr, slot.size, fd, slot.mmap_offset)
        self._slots = slots

    def remove(self, wanted: Slot) -> None:
        """Remove the region with these addresses and this size. Raises FrontEndError."""
        kept = [slot for slot in self._slots if slot[:3] != wanted[:3]]
        if len(kept) == len(self._slots):
            raise FrontEndError(f"there is no memory region {wanted}")
        self.memory.remove(wanted.guest_addr, wanted.size)
        self._slots = kept

    def guest_address(self, user_addr: int) -> int:
        """The guest-physical address of the front end's `user_addr`. Raises FrontEndError."""
        for slot in self._slots:
            if 0 <= user_addr - slot.user_addr < slot.size:
                return slot.guest_addr + user_addr - slot.user_addr
        raise FrontEndError(f"user address {user_addr:#x} is in no memory region")


def _check(slots: Sequence[Slot]) -> None:
    if len(slots) > MAX_MEM_SLOTS:
        raise FrontEndError(f"more than {MAX_MEM_SLOTS} memory regions")
    end = 0
    for slot in sorted(slots, key=lambda slot: slot.user_addr):
        if slot.user_addr < end or slot.user_addr + slot.size > _ADDRESSES:
            raise FrontEndError(
                f"user address {slot.user_addr:#x} overlaps or leaves the address space"
            )
        end = slot.user_addr + slot.size
