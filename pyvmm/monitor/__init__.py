"""The life of one monitor process, from its options to its exit code.

It begins in `start` (`pyvmm run`), `process` (of a Python program, or in the background) or
`emulated_inside`. `run_spec` gives the VM its name and its log, and says where it runs: here
(`phases`: open → assemble → run → end) or in an emulated host (`emulated`). `exit_code` is its end.
"""

from __future__ import annotations

import gc


def collect_garbage_rarely() -> None:
    """For a process that is a monitor or a command, before it imports what it needs: a start makes
    some ten thousand objects that stay, and searching them for garbage again and again would take a
    tenth of the time until the guest runs."""
    gc.set_threshold(100_000)
