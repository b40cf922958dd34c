"""How a command ends: what went wrong in one line, and an exit code that nothing changes.

Apart from the rest, because `pyvmm run` inside the emulated host needs it without click.
"""

from __future__ import annotations

import os
import sys

from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.host import log


def explain(error: Exception) -> int:
    """Say in one line what went wrong; the exit code."""
    if isinstance(error, PyvmmError):
        log.to_stderr(str(error))
        return 2 if isinstance(error, ConfigError) else 1
    log.to_stderr(
        f"a defect in pyvmm: {type(error).__name__}: {error}; "
        "run again with --debug and report what it prints"
    )
    return 70  # EX_SOFTWARE


def flush_or_drop() -> None:
    """Write what is left of the output, if there is still somebody who takes it.

    If not, the interpreter would fail at the same thing later and change the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
