"""A vCPU's thread: how the guest's ending, an error or a stop gets it out."""

from __future__ import annotations

import threading

import pytest

from pyvmm.bus import Action
from pyvmm.errors import HostError
from pyvmm.kvm import exits
from pyvmm.machine.outcome import Ending
from pyvmm.machine.vcpu_runner import VcpuRunner
from pyvmm.memory import GuestMemory

MEMORY = GuestMemory([(0, 4096)])


class FakeVcpu:
    """A vCPU that exits for `event`, or for whoever kicks it."""

    id = 3

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
    runner = VcpuRunner(vcpu, loop, MEMORY, ended, None)
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
    runner = VcpuRunner(vcpu, in_guest, None, ended, None)
    runner.start()
    assert entered.wait(30)
    runner.stop()
    assert ended.outcomes == []
    assert vcpu.bound == 0


def test_a_runner_that_never_started_can_be_stopped():
    runner = VcpuRunner(FakeVcpu(), lambda vcpu: None, None, Ended(), None)
    runner.stop()


def test_a_host_without_threads_is_a_host_error(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    runner = VcpuRunner(FakeVcpu(), lambda vcpu: None, None, Ended(), None)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(HostError, match="thread for vCPU 3"):
            runner.start()
    runner.stop()
