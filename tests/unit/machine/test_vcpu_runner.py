"""A vCPU's thread: how the guest's ending, an error or a stop gets it out."""

from __future__ import annotations

import threading

import pytest

from pyvmm.bus import Action
from pyvmm.errors import HostError
from pyvmm.kvm import exits
from pyvmm.kvm.vcpu import EXIT_INTR
from pyvmm.kvm.x86.state_text import state_lines
from pyvmm.machine.outcome import Ending
from pyvmm.machine.vcpu_runner import VcpuRunner
from pyvmm.memory import GuestMemory

MEMORY = GuestMemory([(0, 4096)])


class FakeVcpu:
    """A vCPU that exits for `event`, or for whoever kicks it."""

    id = 3
    exit_reason = None

    def __init__(self, event=None):
        self.event = event
        self.kicked = threading.Event()
        self.bound = 0

    def bind_thread(self):
        self.bound += 1

    def unbind_thread(self):
        self.bound -= 1

    def kick(self):
        self.kicked.set()

    def set_immediate_exit(self, on):
        if not on:
            self.kicked.clear()

    def excuse_pause(self):
        pass

    def exit(self):
        return self.event


class Ended:
    """Waits for the outcome that a runner reports."""

    def __init__(self):
        self.outcomes = []
        self.happened = threading.Event()

    def __call__(self, outcome):
        self.outcomes.append(outcome)
        self.happened.set()

    def only(self):
        assert self.happened.wait(30)
        [outcome] = self.outcomes
        return outcome


def run(loop, vcpu=None):
    """Run `loop` to its end in a runner; the one outcome."""
    ended = Ended()
    vcpu = vcpu or FakeVcpu()
    runner = VcpuRunner(vcpu, loop, MEMORY, ended, None, state_lines)
    runner.start()
    outcome = ended.only()
    runner.stop()
    assert vcpu.bound == 0
    return outcome


@pytest.mark.parametrize(
    "action, ending", [(Action.POWEROFF, Ending.POWEROFF), (Action.RESET, Ending.RESET)]
)
def test_what_a_handler_asks_for_ends_the_run(action, ending):
    assert run(lambda vcpu: action).ending is ending


def test_a_handler_that_raises_ends_the_run_with_its_traceback():
    def broken(vcpu):
        raise KeyError("register")

    outcome = run(broken)
    assert outcome.ending is Ending.FAILED
    assert outcome.line == "a defect in pyvmm stopped vCPU 3: KeyError('register')"
    assert "in broken" in outcome.report


def test_a_kvm_that_fails_ends_the_run_in_one_line():
    def failing(vcpu):
        raise HostError(14, "KVM_RUN of vCPU 3")

    outcome = run(failing)
    assert (outcome.ending, outcome.line) == (Ending.FAILED, "KVM_RUN of vCPU 3: Bad address")


def test_a_triple_fault_has_a_report_even_if_the_state_cannot_be_read():
    outcome = run(lambda vcpu: None, FakeVcpu(exits.Shutdown()))
    assert outcome.ending is Ending.TRIPLE_FAULT
    assert outcome.line == "the guest triple-faulted (vCPU 3)"
    assert "general registers unavailable" in outcome.report


def test_an_exit_that_nobody_knows_is_an_error_of_its_own():
    outcome = run(lambda vcpu: None, FakeVcpu(exits.Unknown(99)))
    assert outcome.ending is Ending.KVM_ERROR


def test_a_stop_gets_the_vcpu_out_and_is_no_ending():
    entered = threading.Event()

    def in_guest(vcpu):
        entered.set()
        assert vcpu.kicked.wait(30)

    ended = Ended()
    vcpu = FakeVcpu(exits.Intr())
    runner = VcpuRunner(vcpu, in_guest, None, ended, None, state_lines)
    runner.start()
    assert entered.wait(30)
    runner.stop()
    assert ended.outcomes == []
    assert vcpu.bound == 0


def test_a_runner_that_never_started_can_be_stopped():
    runner = VcpuRunner(FakeVcpu(), lambda vcpu: None, None, Ended(), None, state_lines)
    runner.stop()


def test_a_host_without_threads_is_a_host_error(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    runner = VcpuRunner(FakeVcpu(), lambda vcpu: None, None, Ended(), None, state_lines)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(HostError, match="thread for vCPU 3"):
            runner.start()
    runner.stop()


def test_a_paused_vcpu_does_not_run_until_it_is_resumed():
    vcpu = FakeVcpu()
    vcpu.exit_reason = EXIT_INTR
    running = threading.Event()

    def loop(vcpu):
        running.set()
        assert vcpu.kicked.wait(30)

    runner = VcpuRunner(vcpu, loop, MEMORY, Ended(), None, state_lines)
    runner.start()
    for _ in range(3):
        assert running.wait(30)
        runner.request_pause()
        assert runner.wait_parked(30)
        running.clear()
        assert not running.wait(0.01)
        runner.resume()
    assert running.wait(30)
    runner.request_pause()
    runner.stop()  # paused or not
    assert vcpu.bound == 0


def test_a_vcpu_that_has_ended_counts_as_parked():
    ended = Ended()
    runner = VcpuRunner(FakeVcpu(), lambda vcpu: Action.POWEROFF, MEMORY, ended, None, state_lines)
    runner.start()
    ended.only()
    runner.request_pause()
    assert runner.wait_parked(30)
    runner.stop()
