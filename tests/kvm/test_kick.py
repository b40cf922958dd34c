"""Getting a vCPU out of the guest from another thread, without ever missing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

from bare_guest import BareGuest, VcpuThread

from pyvmm.kvm import kick
from pyvmm.kvm.exits import Intr
from pyvmm.kvm.vcpu import EXIT_INTR

MakeGuest = Callable[..., BareGuest]

SPIN = bytes.fromhex("e610 ebfe")  # out 0x10, al; here: jmp here
WAIT = bytes.fromhex("e610 f4 ebfd")  # out 0x10, al; wait: hlt; jmp wait


class Arrival:
    """A port that tells another thread that the guest got there."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.event.set()


def _kicked(guest: BareGuest) -> VcpuThread:
    arrival = Arrival()
    guest.ports.register(0x10, 1, arrival)
    thread = VcpuThread(guest, guest.vcpu)
    assert arrival.event.wait(60)
    guest.vcpu.kick()
    thread.join()
    return thread


def test_a_kick_ends_a_guest_that_spins(bare_guest: MakeGuest) -> None:
    assert _kicked(bare_guest(SPIN)).exit_reason == EXIT_INTR


def test_a_kick_ends_a_guest_that_sleeps(bare_guest: MakeGuest) -> None:
    assert _kicked(bare_guest(WAIT)).exit_reason == EXIT_INTR


def test_a_kick_before_the_guest_is_entered_is_not_lost(bare_guest: MakeGuest) -> None:
    guest = bare_guest(SPIN)
    guest.vcpu.kick()
    thread = VcpuThread(guest, guest.vcpu)
    thread.join()
    assert thread.exit_reason == EXIT_INTR


def test_kicks_at_any_moment_arrive(bare_guest: MakeGuest) -> None:
    guest = bare_guest(bytes.fromhex("e610 ebfc"))  # again: out 0x10, al; jmp again
    guest.ports.register(0x10, 1, Arrival())
    for _ in range(50):
        thread = VcpuThread(guest, guest.vcpu)
        guest.vcpu.kick()
        thread.join()
        assert thread.exit_reason == EXIT_INTR
        guest.vcpu.set_immediate_exit(False)


def test_a_kick_after_the_thread_ended_harms_nobody(bare_guest: MakeGuest) -> None:
    guest = bare_guest(bytes.fromhex("e6f4"))  # out 0xf4, al
    VcpuThread(guest, guest.vcpu).join()
    guest.vcpu.kick()
    assert guest.vcpu.immediate_exit


def test_immediate_exit_runs_nothing_and_leaves_no_stale_exit(bare_guest: MakeGuest) -> None:
    guest = bare_guest(bytes.fromhex("e6f4 e6f4"))
    guest.run()
    guest.vcpu.set_immediate_exit(True)
    assert guest.vcpu.run() == EXIT_INTR
    assert guest.vcpu.exit_reason == EXIT_INTR
    assert guest.vcpu.exit() == Intr()
    assert len(guest.stop.values) == 1


def test_the_signal_has_a_handler_that_does_nothing() -> None:
    kick.install()
    kick.install()
    assert kick.installed()
    signal.raise_signal(kick.SIGNAL)
