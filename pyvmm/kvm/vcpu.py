"""A virtual CPU: its thread's way into the guest (KVM_RUN), and the other threads' way to stop it.

Registers are in x86/; what an exit means is in exits.py; the loop that serves exits in loop.py.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from pyvmm.errors import HostError
from pyvmm.host import syscalls
from pyvmm.kvm import kick, uapi
from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.uapi import ffi

if TYPE_CHECKING:
    from pyvmm.kvm.exits import Exit

EXIT_INTR: Final = uapi.KVM_EXIT_INTR
"""`Vcpu.run` returns this for EINTR and for immediate_exit: nothing happened in the guest."""

_IMMEDIATE_EXIT = ffi.offsetof("struct kvm_run", "immediate_exit")
_EXIT_REASON_U32 = ffi.offsetof("struct kvm_run", "exit_reason") // 4

_EHWPOISON = 133  # <asm-generic/errno.h>; Python's errno has it from 3.14 on

_ioctl = fcntl.ioctl
_KVM_RUN = uapi.KVM_RUN


class Vcpu(syscalls.Closable):
    """One vCPU's file descriptor, `fd`, and its shared page.

    `run_page` is that page as the kernel maps it: struct kvm_run, then the data of port I/O.
    All methods but `kick` belong to the thread that runs the vCPU.
    """

    def __init__(self, vcpu_id: int, fd: int, mmap_size: int) -> None:
        """Own `fd`; `Vm.create_vcpu` is how to get one. Raises HostError."""
        self.id = vcpu_id
        self.fd = fd
        try:
            self._map: mmap.mmap = syscalls.map_shared(fd, mmap_size)
        except BaseException:
            os.close(fd)
            raise
        self.run_page = memoryview(self._map)
        self._u32 = self.run_page.cast("I")
        self._kick_lock = threading.Lock()
        self._thread: int | None = None

    # --- running ---------------------------------------------------------------------------------

    def run(self) -> int:
        """Run the guest until it exits; the reason, one of KVM_EXIT_….

        EXIT_INTR (equal to KVM_EXIT_INTR) for a signal or immediate_exit. The operation an IO or
        MMIO exit reports is completed by the *next* run, which is also when a value put into the
        shared page reaches the guest. Raises HostError where KVM itself fails.
        """
        while True:
            try:
                # No third argument: fcntl.ioctl would try to read a 0 as a buffer, twice, first.
                _ioctl(self.fd, _KVM_RUN)
            except OSError as error:
                reason = self.failed_run(error.errno or 0)
                if reason is None:
                    continue
                return reason
            return int(self._u32[_EXIT_REASON_U32])

    def failed_run(self, number: int) -> int | None:
        """The meaning of errno `number` of KVM_RUN: an exit reason, or None for "enter again".

        Raises HostError for what is neither. For those who call KVM_RUN themselves, as loop.py.
        """
        if number == errno.EINTR:
            # immediate_exit leaves the reason of the exit before; exit() must not decode that.
            self._u32[_EXIT_REASON_U32] = EXIT_INTR
            return EXIT_INTR
        if number == errno.EAGAIN:
            return None  # a vCPU that waited for INIT and SIPI woke up
        if (
            number in (errno.EFAULT, _EHWPOISON)
            and self._u32[_EXIT_REASON_U32] == uapi.KVM_EXIT_MEMORY_FAULT
        ):
            return uapi.KVM_EXIT_MEMORY_FAULT
        raise HostError(number, f"KVM_RUN of vCPU {self.id}")

    @property
    def exit_reason(self) -> int:
        """The reason that the last `run` returned."""
        return int(self._u32[_EXIT_REASON_U32])

    def exit(self) -> Exit:
        """The last exit as a value (see exits.py): for reports, traces and all but the hot path."""
        from pyvmm.kvm.exit_decoding import decode

        return decode(self.run_page)

    def set_immediate_exit(self, on: bool) -> None:
        """While on, `run` completes a pending IO or MMIO operation and returns EXIT_INTR."""
        self.run_page[_IMMEDIATE_EXIT] = int(on)

    @property
    def immediate_exit(self) -> bool:
        """True if `run` would return at once: somebody kicked, or `set_immediate_exit` is on."""
        return bool(self.run_page[_IMMEDIATE_EXIT])

    # --- stopping from another thread ------------------------------------------------------------

    def bind_thread(self) -> None:
        """Say that the calling thread runs this vCPU from now on: `kick` signals it."""
        with self._kick_lock:
            self._thread = threading.get_ident()

    def unbind_thread(self) -> None:
        """The calling thread is done with the vCPU, and may end. `kick` then only sets the flag."""
        with self._kick_lock:
            self._thread = None

    def kick(self) -> None:
        """Make the running or the next `run` return EXIT_INTR, from any thread.

        It keeps returning that until `set_immediate_exit(False)`, so no kick is lost.
        """
        self.set_immediate_exit(True)
        with self._kick_lock:
            # The lock: a thread that ended must not be signalled, its number may be reused.
            if self._thread is not None and kick.installed():
                signal.pthread_kill(self._thread, kick.SIGNAL)

    def excuse_pause(self) -> None:
        """Have the guest not take the time since its last run for a lockup of its own.

        For the guest's clock, which went on (KVM API, "KVM_KVMCLOCK_CTRL"); nothing happens if it
        uses another.
        """
        with suppress(OSError):
            _ioctl(self.fd, uapi.KVM_KVMCLOCK_CTRL)

    # --- state that every architecture has -------------------------------------------------------

    def get_mp_state(self) -> int:
        """KVM_MP_STATE_…: runnable, halted, waiting for start-up… Raises HostError."""
        state = ffi.new("struct kvm_mp_state *")
        struct_ioctl(self.fd, uapi.KVM_GET_MP_STATE, state, "KVM_GET_MP_STATE")
        return int(state.mp_state)

    def set_mp_state(self, mp_state: int) -> None:
        """Set KVM_MP_STATE_…. Raises HostError."""
        state = ffi.new("struct kvm_mp_state *")
        state.mp_state = mp_state
        struct_ioctl(self.fd, uapi.KVM_SET_MP_STATE, state, "KVM_SET_MP_STATE")

    # --- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Release the vCPU. No thread may be in `run`."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        # The mapping holds the VM in the kernel as the descriptor does.
        try:
            self._u32.release()
            self.run_page.release()
            self._map.close()
        except BufferError:
            pass  # somebody still has a view of the page; it goes with the last one
