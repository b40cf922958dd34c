"""The processors that this process runs on."""

from __future__ import annotations

import os

from pyvmm.host.syscalls import read_or_empty

# Tells a program that it runs in an emulated host, and that its standard input is a plain byte
# stream.
INSIDE_VARIABLE = "PYVMM_INSIDE_EMULATED_HOST"
_GROUPS = "/sys/fs/cgroup"


def are_emulated() -> bool:
    """True if this process runs in an emulated host of ours."""
    return os.environ.get(INSIDE_VARIABLE) == "1"


def usable() -> float:
    """How many processors this process can keep busy: those that it may run on
    (sched_setaffinity(2)), or less if its group of processes has a quota (cpu.max in
    Documentation/admin-guide/cgroup-v2.rst, its own or one above)."""
    count = float(len(os.sched_getaffinity(0)))
    for line in read_or_empty("/proc/self/cgroup").splitlines():
        number, _, place = line.split(":", 2)
        if number == "0":  # the others are of version 1
            place = place.rstrip("/")
            count = min(count, _quota(place))
            while place:
                place = place.rpartition("/")[0]
                count = min(count, _quota(place))
    return count


def _quota(group: str) -> float:
    quota, _, period = read_or_empty(f"{_GROUPS}{group}/cpu.max").strip().partition(" ")
    is_limit = quota.isdecimal() and period.isdecimal() and int(period) > 0
    return int(quota) / int(period) if is_limit else float("inf")
