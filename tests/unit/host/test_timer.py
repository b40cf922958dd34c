"""A timer's thread rings when it is time and does nothing else."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import pytest

from pyvmm.host.timer import Timer
from pyvmm.platform import serial as uart
from pyvmm.platform.serial import Serial

# An exception in a thread fails the test.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

PATIENCE = 60.0  # seconds until a test counts as hung


class Bell:
    """The times at which a timer rings; `again` are those that it answers, None after them."""

    def __init__(self, *again: float) -> None:
        self.rung: SimpleQueue[float] = SimpleQueue()
        self._again = list(again)
        self.timer = Timer("test-timer", self._ring)

    def _ring(self) -> float | None:
        self.rung.put(self.timer.now())
        return self._again.pop(0) if self._again else None


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_it_rings_at_its_time_and_not_before() -> None:
    bell = Bell()
    with bell.timer:
        when = bell.timer.now() + 0.02
        bell.timer.set(when)
        assert bell.rung.get(timeout=PATIENCE) >= when


def test_a_time_that_has_passed_rings_at_once() -> None:
    bell = Bell()
    with bell.timer:
        for _ in range(3):
            bell.timer.set(0.0)
            bell.rung.get(timeout=PATIENCE)


def test_it_rings_again_when_it_is_told_to() -> None:
    later = Timer.now() + 0.02
    bell = Bell(later, 0.0)
    with bell.timer:
        bell.timer.set(0.0)
        rung = [bell.rung.get(timeout=PATIENCE) for _ in range(3)]
        assert rung[1] >= later
    assert bell.rung.empty()


def test_there_is_no_thread_before_there_is_a_time() -> None:
    bell = Bell()
    assert "test-timer" not in threads()
    bell.timer.close()
    assert "test-timer" not in threads()


def test_a_closed_timer_has_no_thread_and_never_rings() -> None:
    bell = Bell()
    bell.timer.set(bell.timer.now() + 0.01)
    bell.timer.close()
    assert "test-timer" not in threads()
    bell.timer.set(0.0)
    bell.timer.close()
    assert bell.rung.empty()


def test_closing_waits_for_the_one_that_rings() -> None:
    inside, go = threading.Event(), threading.Event()
    done: list[bool] = []

    def ring() -> None:
        inside.set()
        go.wait(PATIENCE)
        done.append(True)

    timer = Timer("test-timer", ring)
    timer.set(0.0)
    assert inside.wait(PATIENCE)
    closing = threading.Thread(target=timer.close)
    closing.start()
    go.set()
    closing.join(PATIENCE)
    assert done == [True]
    assert "test-timer" not in threads()


def test_a_serial_port_interrupts_by_itself_until_it_is_closed() -> None:
    raised = threading.Semaphore(0)
    serial = Serial(lambda level: raised.release() if level else None, lambda data: None)
    serial.write(uart.FCR, 1, uart.FCR_ENABLE)
    serial.write(uart.IER, 1, uart.IER_THRI)
    assert "serial-port" not in threads()
    for _ in range(50):
        assert raised.acquire(timeout=PATIENCE)
        assert serial.read(uart.IIR, 1) & 0x0F == uart.IIR_THRI
        for byte in range(16):
            serial.write(uart.THR, 1, byte)
    serial.close()
    assert "serial-port" not in threads()
