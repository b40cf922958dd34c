"""A machine's run ends: by signals at any moment, by errors, with threads that hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

from pyvmm.bus import Bus
from pyvmm.machine.builder import Parts
from pyvmm.machine.machine import Machine
from pyvmm.machine.outcome import Ending, Outcome
from pyvmm.machine.trace import Trace

SAFETY_TIMEOUT = 60


class Device:
    """Of which a reset does `at_reset`, and nothing else."""

    def __init__(self, at_reset):
        self.device = self
        self.reset = at_reset
        self.negotiation = self
        self.active_queues = ()


def bare_machine(at_reset=None):
    """A machine without vCPUs: only what waits for the end and stops is left of it."""
    transports = () if at_reset is None else (Device(at_reset),)
    return Machine(bare_parts(transports), Trace(()))


def bare_parts(transports=()):
    ports, mmio = Bus("I/O port"), Bus("MMIO")
    return Parts(
        prepared=None, vm=None, ports=ports, mmio=mmio, serial=None, transports=transports, vcpus=()
    )


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a process of its own, which is the only safe place for signals."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=SAFETY_TIMEOUT,
        cwd=os.path.dirname(__file__),
    )


def test_what_comes_before_the_first_instruction_comes_once():
    seen = []
    machine = Machine(bare_parts(), Trace(()), before_first=lambda: seen.append("clock"))
    machine.end(Outcome(Ending.PANIC))
    machine.run(lambda: seen.append("started"), lambda: None)
    assert seen == ["clock", "started"]


def test_the_first_reason_counts():
    machine = bare_machine()
    machine.end(Outcome(Ending.PANIC))
    machine.end(Outcome(Ending.QUIT))
    assert machine.run(lambda: None, lambda: None).ending is Ending.PANIC


def test_the_handlers_of_before_are_back_after_a_run():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    machine = bare_machine()
    machine.end(Outcome(Ending.QUIT))
    machine.run(lambda: None, lambda: None)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_ends_the_run_whatever_line_it_interrupts():
    done = run_python(
        """
        import faulthandler, signal, sys
        from test_machine_end import bare_machine
        from pyvmm.machine import machine as module

        faulthandler.dump_traceback_later(30, exit=True)
        module._LOOK_EVERY = 0.001
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # for one after the run

        def run_with_signal_at(wanted):
            "Send SIGTERM at the `wanted`th line after the start; whether the run had so many."
            lines = 0

            def count(frame, event, argument):
                nonlocal lines
                if event == "line" and armed and frame.f_code.co_name != "on_signal":
                    lines += 1
                    if lines == wanted:
                        signal.raise_signal(signal.SIGTERM)
                return count

            armed = []
            machine = bare_machine()
            looks = []

            def on_idle():
                looks.append(None)
                if len(looks) > 1:  # the wait for it has been traced from end to end
                    signal.raise_signal(signal.SIGTERM)

            sys.settrace(count)
            try:
                outcome = machine.run(lambda: armed.append(True), on_idle)
            finally:
                sys.settrace(None)
            assert outcome.exit_code == 143, outcome
            return lines >= wanted

        wanted = 1
        while run_with_signal_at(wanted):
            wanted += 1
        print("lines:", wanted)
        """
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 3


def test_a_signal_ends_a_stop_that_hangs():
    done = run_python(
        """
        import os, signal, threading, time
        from test_machine_end import bare_machine
        from pyvmm.machine import machine as module
        from pyvmm.machine.outcome import Ending, Outcome

        module._PATIENCE = 0.0

        def hang():
            print("stopping", flush=True)
            again = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
            again.start()
            threading.Event().wait()  # a disk that does not answer

        machine = bare_machine(at_reset=hang)
        machine.end(Outcome(Ending.QUIT))
        machine.run(lambda: None, lambda: None)
        print("not reached")
        """
    )
    assert done.stdout == "stopping\n"
    assert done.returncode == -signal.SIGTERM


def test_a_second_signal_at_once_does_not_cut_the_stop_short():
    done = run_python(
        """
        import os, signal
        from test_machine_end import bare_machine

        machine = bare_machine(at_reset=lambda: os.kill(os.getpid(), signal.SIGTERM))
        outcome = machine.run(lambda: os.kill(os.getpid(), signal.SIGINT), lambda: None)
        print(outcome.exit_code)
        """
    )
    assert done.stdout == "130\n", done.stderr


def test_a_second_signal_ends_a_monitor_that_hangs_before_it_can_stop():
    done = run_python(
        """
        import os, signal, threading
        from test_machine_end import bare_machine
        from pyvmm.machine import machine as module

        module._PATIENCE = 0.0
        module._LOOK_EVERY = 0.001

        def hang():
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            threading.Event().wait()

        bare_machine().run(lambda: None, hang)
        print("not reached")
        """
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
