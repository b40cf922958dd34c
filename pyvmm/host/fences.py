"""Memory fences between a virtqueue's two sides.

The monitor and the guest's driver share rings without a lock. On x86, loads are not reordered with
loads, nor stores with stores, and CPython keeps program order, so the acquire and release fences of
the specification cost nothing there: whoever needs one calls a fence only if `WEAKLY_ORDERED`. The
one order that x86 gives up is a store followed by a load from elsewhere ("StoreLoad"): needed
wherever one side publishes something and then looks whether the other side wants to hear of it
(virtio 1.3, 2.7.13.3 and 2.7.10, 2.8.21).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Lock

Fence = Callable[[], None]


def _fence_by_locked_instruction() -> Fence:
    # Acquiring a free lock executes one LOCK-prefixed instruction (a compare and exchange in
    # sem_trywait, and in the PyMutex of Python 3.14), a full fence on x86, in about 40 ns: a third
    # of what a foreign call into libatomic takes. Both fail with a plain load if the lock is held.
    lock = Lock()
    acquire, release = lock.acquire, lock.release

    def full_fence() -> None:
        if acquire(False):
            release()
        else:
            # Another thread is between the two lines above, or was interrupted there for good.
            # Nobody else knows this lock, so it is free.
            Lock().acquire(False)

    return full_fence


def _fence_by_libatomic() -> Fence:
    import ctypes

    # By its name: ctypes' search for it starts programs, and queues begin in the box.
    fence = ctypes.CDLL("libatomic.so.1").atomic_thread_fence
    seq_cst = 5  # memory_order_seq_cst, C11 <stdatomic.h>

    def full_fence() -> None:
        fence(seq_cst)

    return full_fence


WEAKLY_ORDERED = os.uname().machine != "x86_64"
"""The processor may reorder loads with loads, or stores with stores."""


def new_fence() -> Fence:
    """A full fence: what comes before a call of it is visible before what comes after is looked at.

    Any thread may call it. It is quickest where one thread at a time does: so each queue has one.
    """
    return _fence_by_libatomic() if WEAKLY_ORDERED else _fence_by_locked_instruction()
