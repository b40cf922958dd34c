"""The frequency of this machine's time-stamp counter, which is the emulated CPUs' too.

Linux finds that out by the emulated timers. On a busy machine it takes the time for which nobody
ran the emulated CPU for the timer's, and goes by a frequency that is several times too low: its
clock then runs as many times too fast, time limits pass early, and timer interrupts come faster
than guests can handle them.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable

# rdtsc; shl rdx, 32; or rax, rdx; ret
_READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_WINDOW = 0.02  # seconds
_TRIES = 8

Reading = tuple[int, int]  # nanoseconds and the counter at the same moment


def frequency_khz() -> int | None:
    """The counter's frequency in kHz, to some 0.01 %; None where programs may not make code.

    It takes 20 ms.
    """
    import ctypes

    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    code.write(_READ_TSC)
    start = ctypes.c_char.from_buffer(code)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(start))
    khz = measure(read, time.monotonic_ns, time.sleep)
    del start  # else the memory cannot be given back
    code.close()
    return khz


def measure(
    counter: Callable[[], int], clock: Callable[[], int], sleep: Callable[[float], None]
) -> int:
    """The frequency of `counter` in kHz by `clock`, which counts nanoseconds."""
    begin = _read(counter, clock)
    sleep(_WINDOW)
    end = _read(counter, clock)
    return round((end[1] - begin[1]) * 1_000_000 / (end[0] - begin[0]))


def _read(counter: Callable[[], int], clock: Callable[[], int]) -> Reading:
    # Of several readings, the one in which least time passed: nobody else ran in between.
    readings = []
    for _ in range(_TRIES):
        before, count, after = clock(), counter(), clock()
        readings.append((after - before, (before + after) // 2, count))
    _, moment, count = min(readings)
    return moment, count
