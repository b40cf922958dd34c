"""A folder for what a process that fuzzes writes, which goes with it."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from pathlib import Path

_END_SECONDS = 50


def at_end(function: Callable[..., object], *arguments: object) -> None:
    """Call it when this process ends, also if it is one of several that share the work: those do
    not come to what `atexit` has."""
    Finalize(None, function, arguments, exitpriority=1)


def room() -> Path:
    """A new one, in memory where there is such a place."""
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    at_end(shutil.rmtree, place, True)
    return place


def open_files() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def check_closed(before: int) -> None:
    """Raise AssertionError if there are more than `before`."""
    if open_files() > before:
        gc.collect()  # what an error's traceback has kept
        assert open_files() <= before, f"a descriptor is left, of {_open_now()}"


def check_ended(before: int) -> None:
    """Wait until there are no more threads than `before`. Raises AssertionError if they stay."""
    give_up_at = time.monotonic() + _END_SECONDS
    while threading.active_count() > before:
        assert time.monotonic() < give_up_at, f"a thread is left, of {threading.enumerate()}"
        time.sleep(0.001)


def _open_now() -> list[str]:
    found = []
    for name in sorted(os.listdir("/proc/self/fd"), key=int):
        with suppress(OSError):  # that of the listing itself
            found.append(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return found


@contextmanager
def told(way: Callable[..., object], note: Sequence[str]) -> Iterator[None]:
    """In which `way` works: an error has its name and what is in `note` by then."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"{way.__name__}: " + "\n".join(one[:4000] for one in note))
        raise
