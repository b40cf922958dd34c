"""Memory that a driver gives back: page numbers and ranges, checked and joined.

Nothing here is trusted: what is not RAM is left out and counted.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

from pyvmm.memory import GuestMemory
from pyvmm.virtio.balloon.uapi import VIRTIO_BALLOON_PFN_SHIFT
from pyvmm.virtio.queue.chain import DescriptorChain, Part

PAGE = 1 << VIRTIO_BALLOON_PFN_SHIFT
# Page numbers taken from one buffer; Linux sends 256. Each may cost a system call, and a reset
# waits for the buffer at hand.
MAX_PAGES = 1 << 14


def read_page_numbers(chain: DescriptorChain) -> list[int]:
    """The page numbers in the chain's buffer, at most MAX_PAGES. Raises GuestMemoryError."""
    reader = chain.reader()
    numbers = array("I")
    numbers.frombytes(reader.read(min(reader.available // 4, MAX_PAGES) * 4))
    return numbers.tolist()


def ranges_of(numbers: Iterable[int]) -> Iterator[Part]:
    """(address, size in bytes) of the runs that the pages form, each page once."""
    start = end = -1
    for number in sorted(set(numbers)):
        if number != end:
            if start >= 0:
                yield start * PAGE, (end - start) * PAGE
            start = number
        end = number + 1
    if start >= 0:
        yield start * PAGE, (end - start) * PAGE


def whole_pages(addr: int, size: int) -> Part:
    """The part of a range that is made of whole pages; of size 0 if none is."""
    start = -(-addr // PAGE) * PAGE
    end = (addr + size) // PAGE * PAGE
    return start, max(0, end - start)


def in_ram(memory: GuestMemory, ranges: Iterable[Part]) -> Iterator[Part]:
    """The parts of `ranges` that are RAM, each within one region."""
    for addr, size in ranges:
        for region in memory.regions:
            start, end = max(addr, region.guest_addr), min(addr + size, region.end)
            if start < end:
                yield start, end - start
