"""The share of its machine that a monitor's process has, as /proc tells."""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

SAFETY_TIMEOUT = 60


def footprint(pid: int) -> Counter[str]:
    """Descriptors by what they are, and threads."""
    process = Path(f"/proc/{pid}")
    found: Counter[str] = Counter()
    for fd in (process / "fd").iterdir():
        with suppress(FileNotFoundError):
            found[os.readlink(fd).partition(":[")[0]] += 1
    for task in (process / "task").iterdir():
        with suppress(FileNotFoundError):
            name = (task / "comm").read_text().strip()
            found["a thread"] += not name.startswith("kvm-")  # those are KVM's
    return found


def has_no_more_than(pid: int, before: Counter[str]) -> None:
    """The monitor sees a moment later that its clients have left."""
    give_up_at = time.monotonic() + SAFETY_TIMEOUT
    while more := footprint(pid) - before:
        assert time.monotonic() < give_up_at, more
        time.sleep(0.05)
