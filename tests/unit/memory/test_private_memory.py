"""Guest RAM that begins as a file's contents: shared until it is written, and the file stays."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError, GuestMemoryError
from pyvmm.memory import GuestMemory, private_memory
from pyvmm.memory.private_memory import PrivateMemory

PAGE = 4096
RANGES = [(0, 64 * PAGE), (1 << 32, 1024 * PAGE)]
SIZE = 1088 * PAGE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "memory"
    with open(made, "wb") as file:
        file.truncate(SIZE)
        for page in (1, 3, 63, 64, 700):
            file.seek(page * PAGE)
            file.write(bytes([page & 0xFF]) * PAGE)
    return made


@pytest.fixture
def memory(path: Path) -> Iterator[PrivateMemory]:
    made = opened(path)
    yield made
    made.close()


def opened(path: Path, ranges: list[tuple[int, int]] = RANGES) -> PrivateMemory:
    fd = os.open(path, os.O_RDONLY)
    try:
        return PrivateMemory(ranges, fd)
    finally:
        os.close(fd)


def contents(memory: GuestMemory) -> bytes:
    found = bytearray()
    for piece in memory.touched():
        found += bytes(piece) if isinstance(piece, int) else piece
    return bytes(found)


def test_it_has_what_the_file_has_and_leaves_that_alone(path: Path, memory: PrivateMemory) -> None:
    before = path.read_bytes()
    assert memory.read(3 * PAGE, 2) == b"\x03\x03"
    assert memory.read((1 << 32) + 636 * PAGE, 1) == bytes([700 & 0xFF])
    memory.write(PAGE, b"changed")
    memory.write((1 << 32) + 5 * PAGE, b"new")
    assert path.read_bytes() == before
    assert opened(path).read(PAGE, 7) == b"\x01" * 7, "another one sees what this one wrote"


def test_what_may_not_be_zero_is_all_that_is_there(path: Path, memory: PrivateMemory) -> None:
    assert contents(memory) == path.read_bytes()
    memory.write(PAGE, b"changed")
    memory.write((1 << 32) + 900 * PAGE, b"new")
    memory.write(63 * PAGE, bytes(PAGE))
    wanted = b"".join(bytes(region.view) for region in memory.regions)
    assert contents(memory) == wanted != path.read_bytes()


def test_a_page_that_is_given_back_is_zero_and_not_the_files(memory: PrivateMemory) -> None:
    memory.write(PAGE, b"changed")
    memory.discard(PAGE, 3 * PAGE)
    assert not any(memory.read(PAGE, 3 * PAGE))
    memory.write(2 * PAGE, b"again")
    assert memory.read(2 * PAGE, 5) == b"again"
    wanted = b"".join(bytes(region.view) for region in memory.regions)
    assert contents(memory) == wanted
    with pytest.raises(GuestMemoryError):
        memory.discard(63 * PAGE, 2 * PAGE)
    with pytest.raises(ValueError, match="whole pages"):
        memory.discard(1, PAGE)


@pytest.mark.parametrize("size", [0, SIZE - PAGE, SIZE + 1, 1 << 40])
def test_a_file_of_another_size_is_refused(path: Path, size: int) -> None:
    os.truncate(path, size)
    with pytest.raises(ConfigError, match=f"has {size} bytes, and the guest {SIZE}"):
        opened(path)


def test_what_is_resident_is_counted_in_all_its_mappings(path: Path, tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    upper.touch()
    os.truncate(upper, SIZE)
    count = SIZE // PAGE
    fds = [os.open(one, os.O_RDONLY) for one in (path, upper)]
    memory = PrivateMemory([(0, SIZE)], fds[0], [(fds[1], b"01" * (count // 2))])
    for region in memory.regions:
        for at in range(0, region.size, PAGE):
            region.view[at] = 1
    assert memory.resident == SIZE
    memory.discard(0, PAGE)  # which makes one mapping more
    assert memory.resident == SIZE - PAGE
    for fd in fds:
        os.close(fd)


def test_it_keeps_no_descriptor(path: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    memory = opened(path)
    assert memory.resident >= 0
    memory.close()
    del memory
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_of_its_own_has_holes_where_nobody_wrote() -> None:
    memory = GuestMemory([(0, 64 * PAGE), (1 << 32, 64 * PAGE)])
    memory.write(10 * PAGE, b"x")
    memory.write((1 << 32) + 63 * PAGE, b"y")
    views = [piece for piece in memory.touched() if not isinstance(piece, int)]
    assert sum(map(len, views)) < 64 * PAGE, "all of it is looked at"
    assert contents(memory) == b"".join(bytes(region.view) for region in memory.regions)
    memory.close()


# --- files over one another -----------------------------------------------------------------------


def over(path: Path, *upper: dict[int, bytes]) -> PrivateMemory:
    """A memory of the file at `path`, with files over it that have these pages."""
    fds, layers = [os.open(path, os.O_RDONLY)], []
    for number, changes in enumerate(upper):
        other = path.with_name(f"upper{number}")
        with open(other, "wb") as file:
            file.truncate(SIZE)
            for page, data in changes.items():
                os.pwrite(file.fileno(), data, page * PAGE)
        fds.append(os.open(other, os.O_RDONLY))
        which = bytes(ord("1") if page in changes else ord("0") for page in range(SIZE // PAGE))
        layers.append((fds[-1], which))
    try:
        return PrivateMemory(RANGES, fds[0], layers)
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("most", [8192, 2, 0])
def test_the_highest_file_that_has_a_page_counts(
    path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(private_memory, "_MOST_MAPPED", most)
    one = {page: bytes([0xA0]) * PAGE for page in (2, 3, 63, 64, 65, 900)}
    two = {page: bytes([0xB0]) * PAGE for page in (3, 65)} | {700: bytes(PAGE), 901: b"x" * PAGE}
    wanted = bytearray(path.read_bytes())
    for changes in (one, two):
        for page, data in changes.items():
            wanted[page * PAGE : (page + 1) * PAGE] = data
    memory = over(path, one, two)
    assert contents(memory) == wanted
    memory.write(PAGE * 2, b"own")
    wanted[PAGE * 2 : PAGE * 2 + 3] = b"own"
    memory.discard(3 * PAGE, PAGE)
    wanted[PAGE * 3 : PAGE * 4] = bytes(PAGE)
    assert contents(memory) == wanted
    memory.close()


def test_what_may_have_changed_is_what_was_written_or_discarded(path: Path) -> None:
    memory = over(path, {2: b"a" * PAGE})
    assert b"1" not in memory.changed()
    contents(memory)  # reading changes nothing
    assert b"1" not in memory.changed()
    memory.write(PAGE * 5, b"x")
    memory.write(RANGES[1][0] + PAGE, b"x")
    memory.discard(3 * PAGE, 2 * PAGE)
    changed = memory.changed()
    assert len(changed) == SIZE // PAGE
    assert [page for page, is_it in enumerate(changed) if is_it == ord("1")] == [3, 4, 5, 65]
    memory.close()
