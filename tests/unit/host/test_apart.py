"""Programs that serve another process: what is left where they cannot be started."""

from __future__ import annotations

import os
import resource
from contextlib import ExitStack
from pathlib import Path

import pytest
from descriptors import open_descriptors

from pyvmm.host import apart


def supervise_with(descriptors: int) -> bool:
    """Start a program while no more than so many descriptors may come; whether it has begun."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = os.open(os.devnull, os.O_RDONLY)
    os.close(least)  # the lowest number that is free
    with ExitStack() as closing:
        resource.setrlimit(resource.RLIMIT_NOFILE, (least + descriptors, limits[1]))
        try:
            apart.supervise(["true"], (), closing)
        except OSError:
            return False
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        return True


def test_no_descriptor_is_left_wherever_the_limit_is_met() -> None:
    before = open_descriptors()
    found = []
    for descriptors in range(16):
        found.append(supervise_with(descriptors))
        assert open_descriptors() == before, f"with {descriptors}"
    assert found == sorted(found) and not found[4] and found[-1]


def test_a_program_that_is_none_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no setsid
    before = open_descriptors()
    with ExitStack() as closing, pytest.raises(FileNotFoundError):
        apart.supervise(["true"], (), closing)
    assert open_descriptors() == before
