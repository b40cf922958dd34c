"""Names of system calls, against the system's own header."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyvmm.host.call_names import name_of

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


@pytest.mark.skipif(not HEADER.exists(), reason="this machine has no headers of x86-64's calls")
def test_the_names_are_the_kernel_s() -> None:
    claimed = re.findall(r"^#define __NR_(\w+) (\d+)$", HEADER.read_text(), re.MULTILINE)
    assert len(claimed) > 300
    for name, number in claimed:
        if name_of(int(number)) != f"system call {number}":  # newer than the table
            assert name_of(int(number)) == name
    assert {name for name, number in claimed if int(number) < 440} == {
        name_of(int(number)) for _, number in claimed if int(number) < 440
    }


@pytest.mark.parametrize("number", [-1, 335, 400, 10_000])
def test_a_number_without_a_name_is_told_as_it_is(number: int) -> None:
    assert name_of(number) == f"system call {number}"
