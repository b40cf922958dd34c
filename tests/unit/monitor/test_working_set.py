"""The note of what a restored VM uses: how large it can be, and what is made of others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

import pytest

from pyvmm.control import snapshot_store as store
from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory, pages
from pyvmm.memory.guest_memory import PAGE_SIZE
from pyvmm.memory.private_memory import PrivateMemory
from pyvmm.monitor import working_set
from pyvmm.monitor.saved_memory import SavedMemory

COUNT = 1024


def private(folder: Path, name: str) -> PrivateMemory:
    path = folder / name
    path.write_bytes(bytes(COUNT * PAGE_SIZE))
    with path.open("rb") as file:
        return PrivateMemory([(0, COUNT * PAGE_SIZE)], file.fileno())


def test_pages_that_were_used_are_told(tmp_path: Path) -> None:
    memory = private(tmp_path, "memory")
    memory.began_as = "it"
    memory.write(700 * PAGE_SIZE, b"x")
    name, runs = working_set.used(memory)
    assert name == "it"
    assert any(first <= 700 < first + count for first, count in runs)
    assert sum(count for _, count in runs) < COUNT // 2


def test_memory_of_no_snapshot_is_refused(tmp_path: Path) -> None:
    for memory in (GuestMemory([(0, 1 << 20)]), private(tmp_path, "memory")):
        with pytest.raises(ConfigError, match=r"is not that of a snapshot.*restored from one"):
            working_set.used(memory)


def test_so_many_runs_are_joined_where_they_are_close() -> None:
    rng = Random(5)
    found = bytes(rng.choices(pages.NO + pages.YES, [9, 1], k=200_000))
    runs = working_set._joined(found)
    assert 0 < len(runs) <= working_set.MOST_RUNS
    covered = bytearray(pages.NO * len(found))
    for first, count in runs:
        assert pages.NO * count == covered[first : first + count]
        covered[first : first + count] = pages.YES * count
    assert pages.both(bytes(covered), found) == covered, "a page is missing"


@pytest.mark.parametrize(
    ("note", "known"),
    [
        (b"[[1,2],[5,1]]", [(1, 2), (5, 1)]),
        (b"[[1,2],[-5,1],[7,1]]", [(1, 2)]),
        (b"[[0,262144],[300000,1]]", [(0, 262144)]),
        (b"[[0,262145]]", []),
        (b"[[true,1]]", []),
        (b"[[1,2,3]]", []),
        (b"[[1,0]]", []),
        (b"{}", []),
        (b"[", []),
        (b"\xff", []),
        (b"[" * 60_000, []),
        (b" " * 70_000, []),
        (json.dumps([[n, 1] for n in range(5000)]).encode(), [(n, 1) for n in range(2048)]),
    ],
)
def test_a_note_is_a_hint(tmp_path: Path, note: bytes, known: list[tuple[int, int]]) -> None:
    assert working_set.noted(str(tmp_path)) == []
    store.write_note(str(tmp_path), store.WORKING_SET, note)
    assert working_set.noted(str(tmp_path)) == known
    assert os.listdir(tmp_path) == [store.WORKING_SET]


def test_a_run_is_read_ahead_from_the_file_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 64 * PAGE_SIZE
    for name in ("memory", "memory-1"):
        (tmp_path / name).write_bytes(bytes(size))
    upper = pages.NO * 8 + pages.YES * 4 + pages.NO * 52
    rows = [{"file": "memory-1", "pages": None}]
    state = {"pages": pages.to_bitmap(upper).hex(), "below": rows}
    asked: list[tuple[int, int, int]] = []

    def advise(fd: int, offset: int, length: int, how: int) -> None:
        assert how == os.POSIX_FADV_WILLNEED
        asked.append((fd, offset // PAGE_SIZE, length // PAGE_SIZE))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    with SavedMemory(str(tmp_path), state, size) as saved:
        (below, _), (above, _) = saved.files
        saved.fetch_ahead([(4, 10), (60, 100), (64, 1), (1 << 60, 5)])
        assert asked == [(below, 4, 4), (above, 8, 4), (below, 12, 2), (below, 60, 4)]
