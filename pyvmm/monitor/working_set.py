"""The memory that a VM uses after a restore, noted beside its snapshot, and fetched ahead of the
next restore where the page cache has it no more.

A run is the number of its first page, in the order of the memory's file, and its length in pages.
The note is a hint: one that is damaged is as good as none, and costs no more than reading what it
names, MOST_PAGES at most. docs/decisions/0601-memory-after-a-restore.md has the figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress

from pyvmm.control import snapshot_store as store
from pyvmm.errors import ConfigError
from pyvmm.memory import pages
from pyvmm.memory.guest_memory import PAGE_SIZE
from pyvmm.memory.private_memory import PrivateMemory

MOST_RUNS = 2048  # of an answer on the control socket
MOST_PAGES = 1 << 18  # 1 GiB
_MOST_TEXT = 1 << 16
Runs = list[tuple[int, int]]


def used(memory: object) -> tuple[str, Runs]:
    """The id of the snapshot whose memory `memory` began as, and the runs that this process has
    used of it. Raises ConfigError for memory that did not begin so."""
    if not isinstance(memory, PrivateMemory) or not memory.began_as:
        raise ConfigError(
            "its memory is not that of a snapshot", cure="use a VM that was restored from one"
        )
    start = memory.regions[0].host_addr
    return memory.began_as, _joined(pages.looked_up(start, memory.size, pages.ANY))


def _joined(found: bytes) -> Runs:
    """The runs of a set of pages, those with the smallest gaps joined."""
    runs = list(pages.runs(found))
    gap = 1
    while len(runs) > MOST_RUNS:
        joined = runs[:1]
        for first, count in runs[1:]:
            before, length = joined[-1]
            if first - (before + length) <= gap:
                joined[-1] = before, first + count - before
            else:
                joined.append((first, count))
        runs, gap = joined, 2 * gap
    return runs


def learn(vm: str, snapshot: str) -> int:
    """Note beside the snapshot what the VM called `vm`, which began with it, has used until now;
    the number of bytes. Raises ConfigError, also for a VM that began with another one,
    ControlError, NoAnswer or HostError."""
    from pyvmm.control.client import Client

    with store.reading(snapshot) as found:
        with Client.connect(vm) as client:
            answer = client.call("used")
        if answer.get("snapshot") != found.state.get("id"):
            raise ConfigError(f"{vm} was not restored from {snapshot}", cure="restore one from it")
        runs = _checked(answer.get("runs"))
        text = json.dumps(runs, separators=(",", ":")).encode()
        store.write_note(found.path, store.WORKING_SET, text)
    return sum(count for _, count in runs) * PAGE_SIZE


def noted(path: str) -> Runs:
    """The note beside the snapshot in the directory `path`, empty if there is none."""
    with suppress(OSError, ValueError, RecursionError):
        return _checked(json.loads(store.read_file(f"{path}/{store.WORKING_SET}", _MOST_TEXT)))
    return []


def _checked(runs: object) -> Runs:
    return list(_within_bounds(runs)) if isinstance(runs, list) else []


def _within_bounds(runs: list[object]) -> Iterator[tuple[int, int]]:
    left = MOST_PAGES
    for run in runs[:MOST_RUNS]:
        if not isinstance(run, list) or len(run) != 2 or {type(one) for one in run} != {int}:
            return
        first, count = run
        if first < 0 or not 0 < count <= left:
            return
        left -= count
        yield first, count
