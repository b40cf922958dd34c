"""Names of system calls, against the system's own header."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from c_claims import ARM64, assert_in_c, needs_arm64_headers

from pyvmm.host.call_names import NO_CALL, name_of, number_of, numbered, numbers_of

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


@needs_arm64_headers
def test_the_numbers_on_arm64_are_the_kernel_s(tmp_path: Path) -> None:
    numbers = numbers_of("aarch64")
    first = {name: number for name, number in numbers.items() if number < 440}
    assert len(first) > 280
    claims = [f"__NR_{name} == {number}" for name, number in first.items()]
    assert_in_c(tmp_path, ["asm/unistd.h"], claims, compiler=(ARM64,))
    with pytest.raises(AssertionError):
        assert_in_c(tmp_path, ["asm/unistd.h"], ["__NR_read == 64"], compiler=(ARM64,))


def test_calls_that_an_architecture_lacks_have_no_number() -> None:
    assert {"open", "fork", "epoll_wait"}.isdisjoint(numbers_of("aarch64"))
    assert numbers_of("aarch64")["openat"] == 56
    assert numbers_of("x86_64")["landlock_add_rule"] == numbers_of("aarch64")["landlock_add_rule"]
    assert numbers_of("riscv64") == {}
    assert number_of("no_such_call") == NO_CALL
    assert numbered("read no_such_call") == {"read": number_of("read")}
