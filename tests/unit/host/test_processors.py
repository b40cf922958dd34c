"""The processors that this process may use, by its affinity and its groups' quotas."""

from __future__ import annotations

import os

import pytest

from pyvmm.host import processors


@pytest.fixture
def files(monkeypatch):
    """A machine of eight processors, in whose /proc and /sys these files are, by path."""
    found: dict[str, str] = {}
    monkeypatch.setattr(processors, "read_or_empty", lambda path: found.get(path, ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return found


def test_those_that_it_may_run_on():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert processors.usable() <= 1
    finally:
        os.sched_setaffinity(0, before)


def test_without_groups_there_is_no_quota(files):
    assert processors.usable() == 8


@pytest.mark.parametrize(
    ("quotas", "count"),
    [
        ({"/a/b": "150000 100000"}, 1.5),
        ({"/a/b": "max 100000", "/a": "300000 100000"}, 3),
        ({"/a/b": "400000 100000", "": "200000 100000"}, 2),
        ({"/a/b": "max 100000"}, 8),
        ({"/a/b": "1600000 100000"}, 8),
        ({"/c": "100000 100000"}, 8),
        ({"/a/b": "100000 0"}, 8),
        ({"/a/b": "what?"}, 8),
    ],
    ids=str,
)
def test_the_quota_of_its_group_and_of_those_above(files, quotas, count):
    files["/proc/self/cgroup"] = "4:cpu:/c\n0::/a/b\n"
    files |= {f"/sys/fs/cgroup{group}/cpu.max": f"{quota}\n" for group, quota in quotas.items()}
    assert processors.usable() == count


def test_the_uppermost_group(files):
    files["/proc/self/cgroup"] = "0::/\n"
    files["/sys/fs/cgroup/cpu.max"] = "50000 100000\n"
    assert processors.usable() == 0.5


def test_a_group_may_have_any_name(tmp_path, monkeypatch):
    """Names of directories are bytes, and need not be text."""
    group = os.fsencode(tmp_path) + b"/gr\xffup"
    os.mkdir(group)
    with open(group + b"/cpu.max", "w") as file:
        file.write("50000 100000\n")
    (tmp_path / "cgroup").write_bytes(b"0::/gr\xffup\n")
    monkeypatch.setattr(processors, "_GROUPS", str(tmp_path))
    read = processors.read_or_empty
    own = {"/proc/self/cgroup": str(tmp_path / "cgroup")}
    monkeypatch.setattr(processors, "read_or_empty", lambda path: read(own.get(path, path)))
    assert processors.usable() == 0.5
