"""A child process that does not outlive its parent, whatever ends that: prctl(2)."""

from __future__ import annotations

import ctypes
import os
import signal

from pyvmm.errors import HostError

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def end_with(parent: int) -> None:
    """Have the kernel kill this process once `parent`, the PID of the one that forked it, has gone:
    at once if it has gone already. It must have forked in a thread that lasts as long as itself.

    Raises HostError.
    """
    if _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0):
        raise HostError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it went before the kernel knew of our wish
        os.kill(os.getpid(), signal.SIGKILL)
