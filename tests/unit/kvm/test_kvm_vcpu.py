"""A vCPU's descriptor and shared page, which a file's page stands in for; KVM_RUN is scripted."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from descriptors import open_descriptors

from pyvmm.errors import HostError
from pyvmm.host import syscalls
from pyvmm.kvm import kick, uapi
from pyvmm.kvm import vcpu as module
from pyvmm.kvm.exits import Intr
from pyvmm.kvm.vcpu import EXIT_INTR, Vcpu

SIZE = 3 * 4096
EHWPOISON = 133
FAULT = uapi.KVM_EXIT_MEMORY_FAULT


@pytest.fixture
def vcpu() -> Iterator[Vcpu]:
    made = Vcpu(3, syscalls.create_memfd("vcpu", SIZE), SIZE)
    yield made
    made.close()


def play(monkeypatch: pytest.MonkeyPatch, vcpu: Vcpu, *steps: int | tuple[int, int]) -> None:
    """Each KVM_RUN's outcome: an exit reason, or (an errno, the reason that stands in the page)."""
    left = iter(steps)

    def ioctl(fd: int, request: int) -> int:
        assert (fd, request) == (vcpu.fd, uapi.KVM_RUN)
        step = next(left)
        number, reason = step if isinstance(step, tuple) else (0, step)
        vcpu._u32[module._EXIT_REASON_U32] = reason
        if number:
            raise OSError(number, "as scripted")
        return 0

    monkeypatch.setattr(module, "_ioctl", ioctl)


def test_run_returns_what_the_page_says(vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, vcpu, uapi.KVM_EXIT_HLT, (errno.EAGAIN, 77), uapi.KVM_EXIT_IO)
    assert (vcpu.run(), vcpu.exit_reason) == (uapi.KVM_EXIT_HLT,) * 2
    assert (vcpu.run(), vcpu.exit_reason) == (uapi.KVM_EXIT_IO,) * 2, "EAGAIN means: enter again"


def test_an_interrupted_run_leaves_no_stale_exit(
    vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, vcpu, (errno.EINTR, uapi.KVM_EXIT_HLT))
    assert (vcpu.run(), vcpu.exit_reason, vcpu.exit()) == (EXIT_INTR, EXIT_INTR, Intr())


@pytest.mark.parametrize("number", [errno.EFAULT, EHWPOISON, errno.ENOMEM, errno.EIO])
@pytest.mark.parametrize("reason", [FAULT, uapi.KVM_EXIT_HLT])
def test_a_failure_is_an_exit_only_where_memory_failed(
    vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch, number: int, reason: int
) -> None:
    play(monkeypatch, vcpu, (number, reason))
    if number in (errno.EFAULT, EHWPOISON) and reason == FAULT:
        assert vcpu.run() == FAULT
        return
    with pytest.raises(HostError, match="KVM_RUN of vCPU 3") as raised:
        vcpu.run()
    assert raised.value.errno == number


def test_a_page_that_cannot_be_mapped_leaves_nothing() -> None:
    fd = syscalls.create_memfd("vcpu", 0)
    with pytest.raises(HostError, match="mmap"):
        Vcpu(0, fd, SIZE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_closed_vcpu_has_nothing_any_more() -> None:
    before = open_descriptors()
    vcpu = Vcpu(0, syscalls.create_memfd("vcpu", SIZE), SIZE)
    page, words, mapping = vcpu.run_page, vcpu._u32, vcpu._map
    vcpu.close()
    assert open_descriptors() == before and vcpu.fd < 0 and mapping.closed
    for view in (page, words):
        with pytest.raises(ValueError, match="released"):
            view[0]
    other = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)  # it has the number now
    vcpu.close()
    os.fstat(other)
    os.close(other)


def test_who_still_looks_at_the_page_may(vcpu: Vcpu) -> None:
    with vcpu.run_page[8:16] as view:
        view[0] = 7
        vcpu.close()
        assert vcpu.fd < 0 and view[0] == 7


# --- the kick -------------------------------------------------------------------------------------


@pytest.fixture
def is_pending() -> Iterator[Callable[[], bool]]:
    """True if the kick's signal has come to this thread since the last time it was asked."""
    before = signal.getsignal(kick.SIGNAL)
    kick.install()
    signal.pthread_sigmask(signal.SIG_BLOCK, [kick.SIGNAL])

    def look() -> bool:
        found = kick.SIGNAL in signal.sigpending()
        if found:
            signal.sigwait([kick.SIGNAL])
        return found

    yield look
    look()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [kick.SIGNAL])
    signal.signal(kick.SIGNAL, before)


def test_a_kick_signals_the_thread_that_runs_it_and_nobody_else(
    vcpu: Vcpu, is_pending: Callable[[], bool]
) -> None:
    vcpu.kick()
    assert vcpu.immediate_exit and not is_pending()
    vcpu.set_immediate_exit(False)
    assert not vcpu.immediate_exit
    vcpu.bind_thread()
    thread = threading.Thread(target=vcpu.kick)
    thread.start()
    thread.join()
    assert vcpu.immediate_exit and is_pending()
    vcpu.unbind_thread()
    vcpu.kick()
    assert not is_pending()


def test_without_its_handler_the_signal_is_not_sent(
    vcpu: Vcpu, is_pending: Callable[[], bool]
) -> None:
    """It would end the process."""
    vcpu.bind_thread()
    signal.signal(kick.SIGNAL, signal.SIG_DFL)
    vcpu.kick()
    assert vcpu.immediate_exit and not is_pending()


@pytest.mark.parametrize("call", ["bind_thread", "unbind_thread", "kick"])
def test_a_thread_cannot_end_while_it_is_signalled(vcpu: Vcpu, call: str) -> None:
    """Its number may be another's then."""
    thread = threading.Thread(target=getattr(vcpu, call))
    with vcpu._kick_lock:
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join()


def test_a_clock_that_knows_no_excuse_needs_none(
    vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    vcpu.excuse_pause()  # a file knows no such call
    called: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "_ioctl", lambda *call: called.append(call))
    vcpu.excuse_pause()
    assert called == [(vcpu.fd, uapi.KVM_KVMCLOCK_CTRL)]
