"""A split ring that a back end has left behind: what is in it, and in what order it was used."""

from __future__ import annotations

from pyvmm.memory import GuestMemory
from pyvmm.virtio.queue.state import QueueState, avail_bytes, used_bytes


def used_idx(memory: GuestMemory, state: QueueState) -> int:
    """The index at which the next used element goes: 2.7.8 The Virtqueue Used Ring."""
    return int.from_bytes(memory.read(state.used_addr + 2, 2), "little")


def outstanding(memory: GuestMemory, state: QueueState) -> int:
    """The number of chains that the driver has made available and that are not used."""
    available = int.from_bytes(memory.read(state.avail_addr + 2, 2), "little")
    return (available - used_idx(memory, state)) & 0xFFFF


def looks_in_order(memory: GuestMemory, state: QueueState, began: int) -> bool:
    """True if the chains that are not used are the last ones that were made available.

    That is so if chains were used in the order in which they were made available; this compares as
    much of both rings as is still there of what was used since position `began`. One that was
    overtaken by a whole ring of others is not seen.
    """
    size, mask = state.size, state.size - 1
    end = used_idx(memory, state)
    waiting = outstanding(memory, state)
    if waiting > size:
        return False
    available = memory.view(state.avail_addr, avail_bytes(size)).cast("H")
    used = memory.view(state.used_addr, used_bytes(size))[4 : 4 + 8 * size].cast("I")
    window = min(size - waiting, (end - began) & 0xFFFF)
    return all(
        available[2 + (position & mask)] == used[2 * (position & mask)]
        for position in range(end - window, end)
    )
