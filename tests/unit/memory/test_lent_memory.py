"""RAM that another process lends, region by region: what is taken, what is refused, what is one."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from pyvmm.errors import HostError
from pyvmm.host import syscalls
from pyvmm.memory import contiguous_view
from pyvmm.memory.lent_memory import LentMemory, LentMemoryError

PAGE = 4096


@pytest.fixture
def file() -> Iterator[int]:
    """Sixteen pages, each full of its number."""
    fd = os.memfd_create("lent")
    os.write(fd, b"".join(bytes([number]) * PAGE for number in range(16)))
    yield fd
    os.close(fd)


@pytest.fixture
def memory() -> Iterator[LentMemory]:
    memory = LentMemory()
    yield memory
    memory.close()


def shape(memory: LentMemory) -> list[tuple[int, int]]:
    return [(region.guest_addr, region.size) for region in memory.regions]


def test_it_is_empty_at_first(memory: LentMemory) -> None:
    assert (memory.size, memory.regions) == (0, ())
    assert not memory.contains(0, 0)


@pytest.mark.parametrize("skew", [0, 0x10])
def test_a_region_is_the_part_of_the_file_that_was_lent(
    memory: LentMemory, file: int, skew: int
) -> None:
    region = memory.add(0x10_0000 + skew, 2 * PAGE - 0x20, file, 3 * PAGE + skew)
    assert memory.regions == (region,)
    assert (region.guest_addr, region.fd_offset) == (0x10_0000 + skew, 3 * PAGE + skew)
    assert region.size == len(region.view) == memory.size == 2 * PAGE - 0x20
    assert memory.read(region.guest_addr, 1) == b"\3"
    assert memory.read(region.end - 1, 1) == b"\4"
    assert ctypes.string_at(memory.host_addr(0x10_0000 + PAGE - 1), 2) == b"\3\4"
    memory.write(region.guest_addr, b"new")
    assert os.pread(file, 3, 3 * PAGE + skew) == b"new"
    assert not memory.contains(region.guest_addr - 1, 1)
    assert not memory.contains(region.end, 1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_regions_that_touch_are_one_whatever_their_order(
    memory: LentMemory, file: int, order: tuple[int, ...]
) -> None:
    """From any parts of a file, the last one not of whole pages."""
    parts = [(0x10_0000, 2 * PAGE, 8), (0x10_2000, PAGE, 1), (0x10_3000, PAGE + 5, 12)]
    for at in order:
        start, size, page = parts[at]
        memory.add(start, size, file, page * PAGE)
    assert shape(memory) == [(0x10_0000, 4 * PAGE + 5)]
    [region] = memory.regions
    assert (region.fd_offset, len(region.view)) == (8 * PAGE, 4 * PAGE + 5)
    pages = b"".join(bytes([number]) * PAGE for number in (8, 9, 1, 12))
    assert memory.read(0x10_0000, 4 * PAGE + 5) == pages + b"\x0d" * 5
    assert ctypes.string_at(memory.host_addr(0x10_2FFF), 2) == b"\x01\x0c"
    memory.write(0x10_1FFF, b"!!")
    assert (os.pread(file, 1, 10 * PAGE - 1), os.pread(file, 1, PAGE)) == (b"!", b"!")


def test_regions_apart_stay_apart_with_the_largest_first(memory: LentMemory, file: int) -> None:
    memory.add(0, PAGE, file, 0)
    memory.add(0x10_0000, 3 * PAGE, file, 0)
    memory.add(0x20_0000, PAGE, file, 0)
    memory.add(0x20_1000, PAGE, file, 9 * PAGE)
    assert shape(memory) == [(0x10_0000, 3 * PAGE), (0x20_0000, 2 * PAGE), (0, PAGE)]
    assert memory.size == 6 * PAGE


def test_regions_that_touch_within_a_page_cannot_be_one(memory: LentMemory, file: int) -> None:
    given_up = list(contiguous_view._given_up)
    memory.add(0x1000, PAGE + 0x10, file, 0)
    memory.add(0x2010, PAGE, file, 5 * PAGE + 0x10)
    assert shape(memory) == [(0x1000, PAGE + 0x10), (0x2010, PAGE)]
    assert memory.read(0x200F, 1) + memory.read(0x2010, 1) == b"\1\5"
    assert not memory.contains(0x200F, 2)
    assert contiguous_view._given_up == given_up, "it was not even tried"


def test_regions_that_cannot_be_put_side_by_side_stay_apart(
    memory: LentMemory, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of different sizes, say. The addresses that were held for both are held for good."""
    given_up: list[mmap.mmap] = []
    monkeypatch.setattr(contiguous_view, "_given_up", given_up)
    monkeypatch.setattr(contiguous_view, "_mremap", lambda *_: contiguous_view._FAILED)
    memory.add(0x1000, PAGE, file, 0)
    memory.add(0x2000, PAGE, file, 3 * PAGE)
    assert sorted(shape(memory)) == [(0x1000, PAGE), (0x2000, PAGE)]
    assert memory.read(0x1FFF, 1) + memory.read(0x2000, 1) == b"\0\3"
    assert [len(mapping) for mapping in given_up] == [2 * PAGE]


def test_a_file_that_is_cut_short_meanwhile_is_refused(
    memory: LentMemory, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    map_shared = syscalls.map_shared

    def too_late(fd: int, size: int) -> mmap.mmap:
        os.ftruncate(fd, 0)
        return map_shared(fd, size)

    monkeypatch.setattr(syscalls, "map_shared", too_late)
    with pytest.raises(HostError, match="mmap"):
        memory.add(0, PAGE, file, 0)
    assert memory.regions == ()


def test_what_begins_within_a_page_is_not_made_one(memory: LentMemory, file: int) -> None:
    memory.add(0x1010, PAGE - 0x10, file, 0x10)
    memory.add(0x2000, PAGE, file, 7 * PAGE)
    assert sorted(shape(memory)) == [(0x1010, PAGE - 0x10), (0x2000, PAGE)]
    assert memory.read(0x1FFF, 1) + memory.read(0x2000, 1) == b"\0\7"


def test_a_region_is_taken_back_by_its_exact_range(memory: LentMemory, file: int) -> None:
    memory.add(0x1000, PAGE, file, 0)
    memory.add(0x2000, PAGE, file, PAGE)
    for start, size in ((0x1000, 2 * PAGE), (0x2000, 1), (0x1001, PAGE), (0, PAGE)):
        with pytest.raises(LentMemoryError, match="there is no region"):
            memory.remove(start, size)
        assert shape(memory) == [(0x1000, 2 * PAGE)]
    memory.remove(0x1000, PAGE)
    assert (shape(memory), memory.size) == ([(0x2000, PAGE)], PAGE)
    memory.close()
    assert (memory.regions, memory.size) == ((), 0)


@pytest.mark.parametrize(
    ("start", "size"), [(0x1000, PAGE), (0, PAGE + 1), (0, 4 * PAGE), (0x2000, 1), (0x2000, PAGE)]
)
def test_an_overlap_is_refused_and_changes_nothing(
    memory: LentMemory, file: int, start: int, size: int
) -> None:
    memory.add(0x1000, PAGE + 1, file, 0)
    with pytest.raises(LentMemoryError, match="overlaps another"):
        memory.add(start, size, file, 0)
    both = [memory.map_region(at, 1 + PAGE, file, 0) for at in (start, start + PAGE)]
    with pytest.raises(LentMemoryError, match="overlaps another"):
        memory.replace(both)
    assert (shape(memory), memory.size) == ([(0x1000, PAGE + 1)], PAGE + 1)
    memory.replace(both[1:])
    assert shape(memory) == [(start + PAGE, PAGE + 1)]


@pytest.mark.parametrize(
    ("start", "size", "offset", "why"),
    [
        (0x1000, 0, 0, "is empty"),
        (0x1001, PAGE, 0, "lies askew in its file, at 0x0"),
        (0x1000, PAGE, 0x10, "lies askew in its file, at 0x10"),
        (0x1010, PAGE, PAGE - 0x10, "lies askew"),
        (2**64 - PAGE, PAGE + 1, 0, "leaves the address space"),
        (0, 16 * PAGE + 1, 0, "ends at 0x10001 of a file of 0x10000 bytes"),
        (0, PAGE + 1, 15 * PAGE, "ends at 0x10001 of a file of 0x10000 bytes"),
        (0, 1, 2**63, "of a file of 0x10000 bytes"),
    ],
)
def test_regions_that_cannot_be(
    memory: LentMemory, file: int, start: int, size: int, offset: int, why: str
) -> None:
    with pytest.raises(LentMemoryError, match=why):
        memory.add(start, size, file, offset)
    assert memory.regions == ()


def test_the_ends_of_a_file_and_of_the_address_space_can_be_reached(
    memory: LentMemory, file: int
) -> None:
    memory.add(2**64 - PAGE, PAGE, file, 15 * PAGE)
    assert memory.read(2**64 - 1, 1) == b"\x0f"
    memory.add(0, 16 * PAGE, file, 0)
    assert memory.read(16 * PAGE - 1, 1) == b"\x0f"


def test_what_is_no_file_of_memory_is_refused(memory: LentMemory, file: int) -> None:
    ours, theirs = os.pipe()
    with pytest.raises(LentMemoryError, match="is not in a file of memory"):
        memory.add(0, PAGE, ours, 0)
    os.close(ours)
    os.close(theirs)
    with pytest.raises(HostError, match="fstat"):
        memory.add(0, PAGE, ours, 0)
