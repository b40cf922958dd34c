"""`pyvmm console` and `pyvmm events` on a guest that echoes what is typed, on real KVM."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from running import SAFETY_TIMEOUT, Running

from pyvmm.kvm.system import Kvm

# Says "ready", then: wait for LSR's bit 0 (received), read RBR, write it to THR, again.
ECHO = b"\xba\xf8\x03\x00\x00"  # mov edx, 0x3f8
ECHO += b"".join(b"\xb0" + bytes([key]) + b"\xee" for key in b"ready\r\n")  # mov al, …; out dx, al
ECHO += bytes.fromhex("ba fd030000 ec a801 74f6 ba f8030000 ec ee ebed")


@pytest.fixture
def vm(kvm: Kvm, tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path, "echoing", ECHO) as running:
        yield running


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SAFETY_TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Attached:
    """`pyvmm console`, or another command, on a terminal of its own."""

    def __init__(self, vm: Running, *options: str, command: tuple[str, ...] = ()) -> None:
        self.keyboard, self.terminal = pty.openpty()
        os.set_blocking(self.keyboard, False)
        self.before = termios.tcgetattr(self.terminal)
        self.screen = bytearray()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", *(command or ("console", vm.name, *options))],
            env={**vm.environment, "TERM": "xterm"},
            stdin=self.terminal,
            stdout=self.terminal,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def type(self, keys: bytes) -> None:
        # Before that a terminal echoes keys itself, and may drop them once it is made raw.
        until(lambda: not termios.tcgetattr(self.terminal)[3] & termios.ECHO)
        os.write(self.keyboard, keys)

    def look(self) -> bytes:
        with contextlib.suppress(BlockingIOError):
            self.screen += os.read(self.keyboard, 65536)
        return bytes(self.screen)

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said on standard error."""
        deadline = time.monotonic() + SAFETY_TIMEOUT
        while (code := self.process.poll()) is None:  # a terminal that nobody reads is full soon
            assert time.monotonic() < deadline
            self.look()
            time.sleep(0.01)
        self.look()
        assert termios.tcgetattr(self.terminal) == self.before
        os.close(self.terminal)
        os.close(self.keyboard)
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            return code, stream.read().decode().replace("\r\n", "\n")


def test_two_share_a_console_and_leave_it(vm: Running) -> None:
    one = Attached(vm)
    until(lambda: one.look() == b"ready\r\n")
    one.type(b"from one")
    until(lambda: one.look().endswith(b"from one"))
    two = Attached(vm)
    until(lambda: two.look() == b"ready\r\nfrom one")
    two.type(b", from two")
    until(lambda: one.look().endswith(b"from one, from two"))
    two.type(b"\x01d")
    code, said = two.end()
    assert code == 0
    assert said.endswith("pyvmm: left echoing, which runs on\n")
    assert [row["state"] for row in vm.ps()] == ["running"]
    one.type(b"\x01x")
    assert one.end()[1].endswith("pyvmm: echoing has ended\n")
    assert vm.process.wait(SAFETY_TIMEOUT) == 14


def test_in_a_pipe_it_shows_all_and_ends_with_the_vm(vm: Running) -> None:
    looking = subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "console", vm.name],
        env=vm.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert looking.stdin is not None and looking.stdout is not None
    looking.stdin.write(b"\x01d is no command here\n")
    looking.stdin.close()
    expected = b"ready\r\n\x01d is no command here\n"
    assert looking.stdout.read(len(expected)) == expected
    assert vm("stop", vm.name).returncode == 0
    looking.stdin = None
    rest, said = looking.communicate(timeout=SAFETY_TIMEOUT)
    assert (looking.returncode, rest) == (0, b"")
    assert said == b"pyvmm: echoing has ended\n"


def test_who_only_looks_types_nothing(vm: Running) -> None:
    looking, typing = Attached(vm, "--read-only"), Attached(vm, "--no-history")
    until(lambda: looking.look() == b"ready\r\n")
    looking.type(b"unseen")
    typing.type(b"seen")
    until(lambda: typing.look() == b"seen")
    until(lambda: looking.look().endswith(b"seen"))
    assert b"unseen" not in looking.look()
    for one in (looking, typing):
        one.type(b"\x01d")
        assert one.end()[0] == 0


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_events_tell_the_story(vm: Running, how: str) -> None:
    assert vm("pause", vm.name).returncode == 0
    listening = subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "events", vm.name],
        env=vm.environment,
        stdout=subprocess.PIPE,
    )
    assert listening.stdout is not None
    assert json.loads(listening.stdout.readline())["event"] == "started"
    assert vm("resume", vm.name).returncode == 0
    if how == "stop":
        assert vm("stop", vm.name).returncode == 0
    else:
        assert json.loads(listening.stdout.readline())["event"] == "paused"
        assert json.loads(listening.stdout.readline())["event"] == "resumed"
        vm.process.send_signal(signal.SIGKILL)
    rest = [json.loads(line) for line in listening.stdout]
    assert listening.wait(SAFETY_TIMEOUT) == 0
    listening.stdout.close()
    if how == "stop":
        assert [event["event"] for event in rest] == ["paused", "resumed", "ended"]
        assert (rest[-1]["ending"], rest[-1]["exit_code"]) == ("terminated", 143)
        cut = "nobody in the guest can be asked, so its power was cut"
        assert rest[-1]["message"] == f"ended by pyvmm stop: {cut}"
    else:
        assert rest == []


def test_a_detached_one_runs_on_and_keeps_its_console(vm: Running, tmp_path: Path) -> None:
    argv = [word.replace("echoing", "behind") for word in vm.argv]
    done = vm(*argv, "--detach")
    assert (done.returncode, done.stdout, done.stderr) == (0, "behind\n", "")
    row = next(row for row in vm.ps() if row["name"] == "behind")
    assert row["state"] == "running"
    vm.name = "behind"
    looking = Attached(vm)
    until(lambda: looking.look() == b"ready\r\n")
    assert vm("stop", "behind").returncode == 0
    assert looking.end()[0] == 0
    assert [row["name"] for row in vm.ps()] == ["echoing"]


def test_a_detached_one_that_fails_says_why(vm: Running) -> None:
    taken = vm(*vm.argv, "-d")
    assert taken.returncode == 2
    assert taken.stderr.startswith("pyvmm: --name: a VM called 'echoing' is running")
    wrong = vm("run", "-d", "--kvm=host", "--kernel", "/dev/null", "--name", "wrong")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert len(wrong.stderr.splitlines()) == 1
    # And one that gets as far as having a name: it needs more vCPUs than KVM gives.
    late = vm(*vm.argv[:-1], "late", "-d", "--cpus=64", "--trace-file=/nowhere/x", "--trace=all")
    assert (late.returncode, late.stdout) == (2, "")
    assert len(late.stderr.splitlines()) == 1
    assert [row["name"] for row in vm.ps()] == ["echoing"]


def test_messages_of_a_detached_one_go_to_the_file_that_was_chosen(
    vm: Running, tmp_path: Path
) -> None:
    argv = [word.replace("echoing", "behind") for word in vm.argv]
    with open(tmp_path / "log", "wb") as log:
        subprocess.run(
            [sys.executable, "-m", "pyvmm", *argv, "-d"],
            env=vm.environment,
            stderr=log,
            stdout=subprocess.DEVNULL,
            check=True,
        )
    assert vm("stop", "behind").returncode == 0
    cut = "nobody in the guest can be asked, so its power was cut"
    assert (tmp_path / "log").read_text() == f"pyvmm: behind: ended by pyvmm stop: {cut}\n"


def test_exits_are_counted_by_kvm_itself(vm: Running) -> None:
    def exits() -> int:
        numbers = json.loads(vm("stats", vm.name, "--json").stdout)
        assert numbers["exits"] == numbers["vcpus"][0]["exits"]
        total: int = numbers["exits"].pop("total")
        assert total == sum(numbers["exits"].values())
        return total

    first = exits()
    assert first > 0  # it polls its serial port
    until(lambda: exits() > first)
    assert vm("pause", vm.name).returncode == 0
    paused = exits()
    assert exits() == paused


def test_numbers_in_three_forms(vm: Running) -> None:
    numbers = json.loads(vm("stats", vm.name, "--json").stdout)
    assert numbers["memory"]["size"] == 512 << 20
    text = vm("stats", vm.name, "--prometheus").stdout
    found = {
        (sample.name, sample.labels.get("reason")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for reason, count in numbers["exits"].items():
        assert reason == "total" or found["pyvmm_exits_total", reason] >= count
    assert found["pyvmm_memory_bytes", None] == 512 << 20
    assert vm("metrics").stdout.splitlines()[0] == text.splitlines()[0]
    lines = vm("stats", vm.name).stdout.splitlines()
    assert lines[0].startswith("up ") and "of 512 MiB" in lines[0]
    assert lines[1].startswith("exits: total ")
    both = vm("stats", vm.name, "--json", "--prometheus")
    assert (both.returncode, both.stdout) == (2, "")
    nobody = vm("metrics", "nobody")
    assert nobody.returncode == 2 and "no VM called 'nobody'" in nobody.stderr


def test_top_without_a_terminal_prints_one_table(vm: Running) -> None:
    lines = vm("top", "--once", "--interval=0.2").stdout.splitlines()
    [head, row] = [line.split() for line in lines if line.split()[:1] in (["VM"], ["echoing"])]
    assert head[:7] == ["VM", "STATE", "CPUS", "MEMORY", "EXITS", "IRQS", "REQS"]
    assert row[:3] == ["echoing", "running", "1"]
    assert float(row[5].replace(",", "")) > 0  # behind 44.0 KiB, say
    one = vm("top", vm.name, "--once", "--interval=0.2").stdout.splitlines()
    assert one[0].startswith("echoing  running, up ")
    [total] = [line.split()[1] for line in one if line.split()[:1] == ["total"]]
    assert float(total.replace(",", "")) > 0
    nobody = vm("top", "nobody")
    assert nobody.returncode == 2 and "no VM called 'nobody'" in nobody.stderr


def test_top_on_a_terminal_is_live_and_q_ends_it(vm: Running) -> None:
    for key in (b"q", b"\x03"):
        top = Attached(vm, command=("top", "--interval=0.2"))
        until(lambda top=top: top.look().count(b"echoing") >= 2)  # drawn again
        assert vm("pause", vm.name).returncode == 0
        until(lambda top=top: b"paused" in top.look())
        assert vm("resume", vm.name).returncode == 0
        top.type(key)
        assert top.end() == (0, "")


def test_top_of_one_ends_with_it(vm: Running) -> None:
    top = Attached(vm, command=("top", vm.name, "--interval=0.2"))
    until(lambda: b"EXITS" in top.look())
    assert vm("stop", vm.name).returncode == 0
    assert top.end() == (2, "pyvmm: echoing has ended\n")
