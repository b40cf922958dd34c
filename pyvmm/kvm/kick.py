"""The signal that gets a thread out of KVM_RUN.

A signal makes KVM_RUN return EINTR; its handler has nothing to do. Alone it would come too late for
a thread that is just about to enter KVM_RUN: hence `Vcpu.kick` sets kvm_run.immediate_exit first,
which KVM reads after the thread can no longer miss the signal (KVM API, "KVM_RUN",
KVM_CAP_IMMEDIATE_EXIT).
"""

from __future__ import annotations

import signal

from pyvmm.errors import ConfigError

SIGNAL = signal.SIGRTMIN


def _ignore(number: int, frame: object) -> None:
    # A Python function and not SIG_IGN: an ignored signal would not interrupt the system call.
    pass


def install() -> None:
    """Have SIGRTMIN interrupt system calls and do nothing else; once is enough, more is harmless.

    Call it in the main thread, as Python allows it nowhere else. Raises ConfigError elsewhere,
    unless it was done already.
    """
    if installed():
        return
    try:
        signal.signal(SIGNAL, _ignore)
    except ValueError:
        raise ConfigError(
            "a VM's signal handler can be installed in the main thread only",
            cure="call pyvmm.kvm.kick.install() there first",
        ) from None


def installed() -> bool:
    """True if a kick may be sent: without the handler the signal would end the process."""
    return signal.getsignal(SIGNAL) is _ignore
