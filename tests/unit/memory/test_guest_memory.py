"""Guest RAM: what lies in it and what does not, to the byte."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator

import pytest
from descriptors import open_descriptors

from pyvmm.errors import GuestMemoryError
from pyvmm.host import syscalls
from pyvmm.memory import GuestMemory

PAGE = 4096
LOW, HIGH = (0, 4 * PAGE), (16 * PAGE, 2 * PAGE)
LOW_END, HIGH_END = LOW[1], HIGH[0] + HIGH[1]

INSIDE = [
    (0, 0), (0, 1), (0, LOW_END), (LOW_END - 1, 1), (LOW_END, 0), (HIGH[0], HIGH[1]),
    (HIGH[0], 0), (HIGH_END - 1, 1), (HIGH_END, 0), (PAGE + 1, 2 * PAGE),
]  # fmt: skip
OUTSIDE = [
    (LOW_END, 1), (LOW_END - 1, 2), (0, LOW_END + 1), (HIGH[0] - 1, 1), (HIGH[0] - 1, 2),
    (HIGH_END, 1), (HIGH_END - 1, 2), (HIGH_END + 1, 0), (LOW_END + 1, 0), (0, HIGH_END),
    (2**64 - 1, 1), (2**64 - 1, 2), (2**64, 0), (-1, 1), (-1, 2), (8 * PAGE, PAGE),
]  # fmt: skip


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory([LOW, HIGH])
    yield memory
    memory.close()


@pytest.mark.parametrize(("addr", "length"), INSIDE)
def test_what_lies_in_one_region(memory: GuestMemory, addr: int, length: int) -> None:
    assert memory.contains(addr, length)
    assert memory.read(addr, length) == bytes(length)
    memory.write(addr, b"x" * length)
    assert bytes(memory.view(addr, length)) == b"x" * length
    written = b"".join(bytes(region.view) for region in memory.regions)
    assert written.count(b"x") == length


@pytest.mark.parametrize(("addr", "length"), OUTSIDE)
def test_what_does_not(memory: GuestMemory, addr: int, length: int) -> None:
    assert not memory.contains(addr, length)
    for access in (memory.view, memory.read):
        with pytest.raises(GuestMemoryError) as caught:
            access(addr, length)
        assert hex(addr) in str(caught.value)
    with pytest.raises(GuestMemoryError):
        memory.write(addr, b"x" * length)
    assert not any(b"x" in bytes(region.view) for region in memory.regions)


@pytest.mark.parametrize("length", [-1, -PAGE])
def test_a_length_below_zero_is_refused(memory: GuestMemory, length: int) -> None:
    with pytest.raises(GuestMemoryError):
        memory.view(PAGE, length)


@pytest.mark.parametrize("addr", [0, 1, LOW_END - 1, HIGH[0], HIGH_END - 1])
def test_host_addresses_are_where_the_bytes_are(memory: GuestMemory, addr: int) -> None:
    memory.write(addr, b"!")
    assert ctypes.string_at(memory.host_addr(addr), 1) == b"!"


@pytest.mark.parametrize("addr", [LOW_END, HIGH[0] - 1, HIGH_END, 2**64 - 1, -1])
def test_no_host_address_outside_ram(memory: GuestMemory, addr: int) -> None:
    with pytest.raises(GuestMemoryError):
        memory.host_addr(addr)


def test_all_of_it_is_one_file_that_others_can_map(memory: GuestMemory) -> None:
    assert memory.size == os.fstat(memory.fd).st_size == LOW[1] + HIGH[1]
    for region, (addr, size) in zip(memory.regions, (LOW, HIGH), strict=True):
        assert (region.guest_addr, region.size, region.end) == (addr, size, addr + size)
        memory.write(addr, b"here")
        assert os.pread(memory.fd, 4, region.fd_offset) == b"here"
    assert [region.fd_offset for region in memory.regions] == [0, LOW[1]]


@pytest.mark.parametrize(
    "ranges",
    [
        [], [(0, 0)], [(0, -PAGE)], [(1, PAGE)], [(0, PAGE + 1)], [(0, PAGE - 1)],
        [(0, PAGE), (0, PAGE)], [(0, 2 * PAGE), (PAGE, PAGE)], [(PAGE, PAGE), (0, PAGE)],
        [(-PAGE, PAGE)],
    ],
    ids=str,
)  # fmt: skip
def test_ranges_that_cannot_be(ranges: list[tuple[int, int]]) -> None:
    before = open_descriptors()
    with pytest.raises(ValueError):
        GuestMemory(ranges)
    assert open_descriptors() == before


def test_ranges_may_touch() -> None:
    memory = GuestMemory([(0, PAGE), (PAGE, PAGE)])
    assert len(memory.regions) == 2
    assert not memory.contains(PAGE - 1, 2)  # an access lies within one region
    memory.close()


def test_discarded_pages_read_as_zero_and_are_given_back(memory: GuestMemory) -> None:
    for addr, size in (LOW, HIGH):
        memory.write(addr, b"x" * size)
    full = memory.resident
    assert full == memory.size
    memory.discard(HIGH[0] + PAGE, PAGE)
    assert memory.resident == full - PAGE
    assert memory.read(HIGH[0], PAGE) == b"x" * PAGE
    assert memory.read(0, LOW_END) == b"x" * LOW_END
    memory.discard(0, LOW_END)
    assert memory.resident == PAGE
    # A look at a page has the host give it again.
    assert memory.read(HIGH[0] + PAGE, PAGE) == bytes(PAGE)
    assert memory.read(0, LOW_END) == bytes(LOW_END)


@pytest.mark.parametrize(
    ("addr", "length", "error"),
    [
        (1, PAGE, ValueError), (0, PAGE + 1, ValueError), (0, 0, ValueError),
        (PAGE, -PAGE, ValueError), (0, LOW_END + PAGE, GuestMemoryError),
        (LOW_END, PAGE, GuestMemoryError), (HIGH[0] - PAGE, PAGE, GuestMemoryError),
        (HIGH[0] - PAGE, 2 * PAGE, GuestMemoryError), (HIGH_END, PAGE, GuestMemoryError),
    ],
)  # fmt: skip
def test_what_cannot_be_discarded_stays(
    memory: GuestMemory, addr: int, length: int, error: type[Exception]
) -> None:
    for start, size in (LOW, HIGH):
        memory.write(start, b"x" * size)
    with pytest.raises(error):
        memory.discard(addr, length)
    assert memory.resident == memory.size


def test_closing_gives_the_descriptor_back_and_may_be_repeated() -> None:
    before = open_descriptors()
    memory = GuestMemory([LOW])
    view = memory.view(0, 1)
    for _ in range(2):
        memory.close()
        assert memory.fd == -1 and memory.regions == ()
    with pytest.raises(GuestMemoryError):
        memory.read(0, 1)
    view[0] = 1  # a view that somebody holds keeps the mapping
    del view, memory
    assert open_descriptors() == before


def test_memory_that_cannot_be_mapped_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    before = open_descriptors()
    monkeypatch.setattr(syscalls, "map_shared", refuse)
    with pytest.raises(OSError) as kept:
        GuestMemory([LOW])
    # Closed by now, though not forgotten: the error has the memory in its traceback.
    assert len(os.listdir("/proc/self/fd")) == before
    del kept


def test_memory_may_have_huge_pages(memory: GuestMemory) -> None:
    if not os.path.exists("/sys/kernel/mm/transparent_hugepage"):
        pytest.skip("this kernel has no transparent huge pages")
    start = f"{memory.regions[0].host_addr:x}-"
    with open("/proc/self/smaps") as maps:
        ours = itertools.dropwhile(lambda line: not line.startswith(start), maps)
        flags = next(line.split() for line in ours if line.startswith("VmFlags:"))
    assert "hg" in flags
