"""Work on demand in a vCPU's own thread: when it is parked, runs, ends, and for many at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from bare_guest import CODE, BareGuest

from pyvmm.errors import ConfigError
from pyvmm.kvm import exits
from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.x86 import registers as r
from pyvmm.kvm.x86 import uapi
from pyvmm.kvm.x86.state_text import state_lines
from pyvmm.kvm.x86.uapi import ffi
from pyvmm.machine.outcome import Outcome
from pyvmm.machine.run_loop import make_run_loop
from pyvmm.machine.vcpu_runner import VcpuRunner

COUNT = bytes.fromhex("43 ebfd")  # again: inc ebx; jmp again
SLEEP = bytes.fromhex("f4 ebfd")  # again: hlt; jmp again
READ_PORT = bytes.fromhex("e411 ebfc")  # again: in al, 0x11; jmp again
POWER_OFF = bytes.fromhex("e6f4")  # out 0xf4, al: the stop port
PORT = 0x11

Run = Callable[[bytes], tuple[BareGuest, VcpuRunner]]


@pytest.fixture
def run(bare_guest: Callable[..., BareGuest]) -> Iterator[Run]:
    """Starts a guest of machine code in a runner; what ends them is stopped at the end."""
    with ExitStack() as stack:

        def start(code: bytes) -> tuple[BareGuest, VcpuRunner]:
            guest = bare_guest(code)
            runner = make(guest)
            stack.callback(runner.stop)
            runner.start()
            return guest, runner

        yield start


def make(guest: BareGuest, end: Callable[[Outcome], None] = lambda outcome: None) -> VcpuRunner:
    loop = make_run_loop(guest.ports, guest.mmio, None)
    return VcpuRunner(guest.vcpu, loop, guest.memory, end, None, state_lines)


def rbx(vcpu: Vcpu) -> int:
    return int(r.get_regs(vcpu).rbx)


def grows(runner: VcpuRunner) -> bool:
    """True if the guest counts, within reason."""
    before = runner.call(rbx)
    limit = time.monotonic() + 60
    while runner.call(rbx) == before:
        if time.monotonic() > limit:
            return False
    return True


def test_a_parked_vcpu_answers_and_stays_parked(run: Run) -> None:
    _, runner = run(COUNT)
    assert grows(runner)
    runner.request_pause()
    assert runner.wait_parked(60)
    counts = {runner.call(rbx) for _ in range(50)}
    assert len(counts) == 1
    assert runner.wait_parked(0)
    runner.resume()
    assert grows(runner)


def test_a_running_vcpu_answers_and_goes_on(run: Run) -> None:
    _, runner = run(COUNT)
    names = {runner.call(lambda vcpu: threading.current_thread().name) for _ in range(5)}
    assert names == {"vcpu0"}

    def set_high(vcpu: Vcpu) -> None:
        regs = r.get_regs(vcpu)
        regs.rbx = 0x7000_0000
        r.set_regs(vcpu, regs)

    runner.call(set_high)
    assert runner.call(rbx) >= 0x7000_0000
    assert grows(runner)


def test_a_sleeping_vcpu_is_woken_for_a_call(run: Run) -> None:
    _, runner = run(SLEEP)
    places = {runner.call(lambda vcpu: int(r.get_regs(vcpu).rip)) for _ in range(20)}
    assert places <= {CODE, CODE + 1}


def test_an_access_is_never_half_done_when_a_call_is_made(
    bare_guest: Callable[..., BareGuest],
) -> None:
    class Changing:
        given = 0

        def read(self, offset: int, size: int) -> int:
            self.given = (self.given + 1) & 0xFF
            return self.given

        def write(self, offset: int, size: int, value: int) -> None:
            pass

    guest, port = bare_guest(READ_PORT), Changing()
    guest.ports.register(PORT, 1, port)
    runner = make(guest)
    runner.start()
    try:
        while port.given < 3:
            time.sleep(0.001)
        for _ in range(300):
            seen = runner.call(lambda vcpu: (r.get_regs(vcpu).rax & 0xFF, port.given))
            assert seen[0] == seen[1]
    finally:
        runner.stop()


def test_what_a_call_raises_is_the_callers_and_the_guest_goes_on(run: Run) -> None:
    _, runner = run(COUNT)

    def fail(vcpu: Vcpu) -> None:
        raise KeyError("no such register")

    with pytest.raises(KeyError, match="no such register"):
        runner.call(fail)
    assert grows(runner)


def test_calls_from_many_threads_are_made_one_at_a_time(run: Run) -> None:
    _, runner = run(COUNT)
    inside, together, wrong = [0], [0], []

    def work(number: int) -> None:
        for turn in range(40):

            def function(vcpu: Vcpu, mine: tuple[int, int] = (number, turn)) -> tuple[int, int]:
                inside[0] += 1
                together[0] = max(together[0], inside[0])
                rbx(vcpu)
                inside[0] -= 1
                return mine

            if runner.call(function, seconds=60) != (number, turn):
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        runner.request_pause()
        assert runner.wait_parked(60)
        runner.resume()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert (together[0], wrong) == (1, [])
    assert grows(runner)


def test_a_pause_that_is_called_off_at_once_does_not_hold_the_guest(run: Run) -> None:
    guest, runner = run(COUNT)
    for _ in range(50):
        runner.request_pause()
        runner.resume()
    # Not by a call, which would get a vCPU out of whatever holds it.
    time.sleep(0.05)
    limit = time.monotonic() + 60
    while guest.vcpu.immediate_exit and time.monotonic() < limit:
        time.sleep(0.001)
    assert not guest.vcpu.immediate_exit
    assert grows(runner)


def test_a_call_that_has_begun_ends_before_the_vcpu_and_others_are_refused(run: Run) -> None:
    _, runner = run(COUNT)
    begun, go = threading.Event(), threading.Event()
    got: list[object] = []

    def slow(vcpu: Vcpu) -> int:
        begun.set()
        assert go.wait(60)
        return rbx(vcpu)

    def ask(function: Callable[[Vcpu], int]) -> None:
        try:
            got.append(runner.call(function, seconds=60))
        except ConfigError as error:
            got.append(str(error))

    first = threading.Thread(target=ask, args=(slow,))
    first.start()
    assert begun.wait(60)
    waiting = [threading.Thread(target=ask, args=(rbx,)) for _ in range(3)]
    for thread in waiting:
        thread.start()
    while len(runner._calls) < 3:
        time.sleep(0.001)
    stopping = threading.Thread(target=runner.stop)
    stopping.start()
    while not runner._stopping:
        time.sleep(0.001)
    go.set()
    for thread in (first, stopping, *waiting):
        thread.join(60)
        assert not thread.is_alive()
    assert [said for said in got if isinstance(said, str)] == ["the VM is ending"] * 3
    assert len([value for value in got if isinstance(value, int)]) == 1
    with pytest.raises(ConfigError, match="is ending"):
        runner.call(rbx)


def test_a_guest_that_ends_by_itself_refuses_calls(
    bare_guest: Callable[..., BareGuest],
) -> None:
    ended = threading.Event()
    guest = bare_guest(POWER_OFF)
    runner = make(guest, lambda outcome: ended.set())
    with pytest.raises(ConfigError, match="has not started"):
        runner.call(rbx)
    runner.start()
    assert ended.wait(60)
    with pytest.raises(ConfigError, match="is ending"):
        while True:  # the thread may still be on its way out
            runner.call(rbx)
    runner.stop()


def test_calls_while_the_guest_ends_are_answered_or_refused(
    bare_guest: Callable[..., BareGuest],
) -> None:
    for _ in range(10):
        guest = bare_guest(COUNT)
        runner = make(guest)
        runner.start()
        said: list[str] = []

        def ask(runner: VcpuRunner = runner, said: list[str] = said) -> None:
            try:
                while True:
                    runner.call(rbx, seconds=60)
            except ConfigError as error:
                said.append(str(error))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.005)
        runner.stop()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert said == ["the VM is ending"] * 3


def test_a_call_that_the_vcpu_does_not_come_to_is_called_off(
    bare_guest: Callable[..., BareGuest],
) -> None:
    class Stuck:
        def __init__(self) -> None:
            self.entered, self.go = threading.Event(), threading.Event()

        def read(self, offset: int, size: int) -> int:
            self.entered.set()
            assert self.go.wait(60)
            return 0

        def write(self, offset: int, size: int, value: int) -> None:
            pass

    guest, port, made = bare_guest(READ_PORT), Stuck(), []
    guest.ports.register(PORT, 1, port)
    runner = make(guest)
    runner.start()
    try:
        assert port.entered.wait(60)
        with pytest.raises(ConfigError, match="vCPU 0 does not come to rest"):
            runner.call(made.append, seconds=0.05)
        port.go.set()
        assert runner.call(lambda vcpu: 7, seconds=60) == 7
        assert made == []
    finally:
        port.go.set()
        runner.stop()


def test_a_vcpu_cannot_wait_for_itself(run: Run) -> None:
    _, runner = run(COUNT)
    with pytest.raises(RuntimeError, match="cannot wait for itself"):
        runner.call(lambda vcpu: runner.call(rbx))
    assert grows(runner)


def single_step(vcpu: Vcpu, on: bool) -> None:
    debug = ffi.new("struct kvm_guest_debug *")
    debug.control = uapi.KVM_GUESTDBG_ENABLE | uapi.KVM_GUESTDBG_SINGLESTEP if on else 0
    struct_ioctl(vcpu.fd, uapi.KVM_SET_GUEST_DEBUG, debug, "KVM_SET_GUEST_DEBUG")


def test_a_debugger_hears_of_each_step_and_the_vcpu_waits_for_it(run: Run) -> None:
    _, runner = run(COUNT)
    runner.request_pause()
    assert runner.wait_parked(60)
    heard: list[exits.Debug] = []
    stopped = threading.Event()

    def on_debug(who: VcpuRunner, event: exits.Debug) -> None:
        assert who is runner
        heard.append(event)
        stopped.set()

    runner.on_debug = on_debug
    runner.call(lambda vcpu: single_step(vcpu, True))
    for step in range(1, 7):
        before = runner.call(rbx), runner.call(lambda vcpu: int(r.get_regs(vcpu).rip))
        runner.resume()
        assert stopped.wait(60)
        assert runner.wait_parked(60)
        stopped.clear()
        assert len(heard) == step
        after = runner.call(rbx), runner.call(lambda vcpu: int(r.get_regs(vcpu).rip))
        counted = before[1] == CODE
        assert after == (before[0] + counted, CODE + 1 if counted else CODE)
    runner.call(lambda vcpu: single_step(vcpu, False))
    runner.resume()
    assert grows(runner)
    assert len(heard) == 6


def test_a_debug_exit_that_nobody_waits_for_is_no_ending(
    bare_guest: Callable[..., BareGuest],
) -> None:
    ended: list[Outcome] = []
    guest = bare_guest(COUNT)
    single_step(guest.vcpu, True)
    runner = make(guest, ended.append)
    runner.start()
    try:
        assert grows(runner)
        assert ended == []
    finally:
        runner.stop()
