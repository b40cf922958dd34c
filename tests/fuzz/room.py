"""A folder for what a process that fuzzes writes, which goes with it."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path


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
        assert open_files() <= before, "a descriptor is left"
