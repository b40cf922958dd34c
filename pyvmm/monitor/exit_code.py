"""The end of a command: what went wrong in one line, and an exit code that nothing changes.

Apart from the rest, because `pyvmm run` inside the emulated host needs it without click.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress

from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.host import log

BROKEN_PIPE = 141  # as a shell's for SIGPIPE
# Failures of the host: pyvmm has no defect wherever it meets one of these.
_HOST_FAILURES = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
_NO_THREAD = "can't start new thread"  # all that Python says of pthread_create's EAGAIN


def explain(error: Exception) -> int:
    """Say in one line what went wrong; the exit code."""
    code = 1
    more: dict[str, object] = {}
    if isinstance(error, PyvmmError):
        text = str(error)
        if isinstance(error, ConfigError):
            code, more = 2, {"message": error.message, "cure": error.cure, "option": error.option}
    elif isinstance(error, BrokenPipeError):
        return BROKEN_PIPE  # nobody reads any more, and knows that best
    elif isinstance(error, FileNotFoundError) and error.filename is None and _directory_is_gone():
        code, text = 2, "the current directory has been removed; cd to another one"
    elif isinstance(error, OSError) and error.errno in _HOST_FAILURES:
        text = f"{error.filename or 'writing the output'}: {error.strerror}"
    elif isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        text = f"{_NO_THREAD}; raise the limit of processes: ulimit -u, or pids= of --cgroup"
    else:
        code = 70  # EX_SOFTWARE
        text = (
            f"a defect in pyvmm: {type(error).__name__}: {error}; "
            "run again with --debug and report what it prints"
        )
    log.to_stderr(log.Line(text, level=log.ERROR, more={**more, "exit_code": code}))
    return code


def _directory_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def flush_or_drop(code: int = 0) -> int:
    """Write the rest of the output, if it still has a reader; the exit code, which is `code` unless
    that was 0 and a disk is full.

    Otherwise the interpreter would fail at that rest later, and change the exit code.
    """
    log.flush()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            if stream is sys.stdout and error.errno in _HOST_FAILURES:
                code = code or explain(error)
            with suppress(OSError):  # a box without Landlock opens nothing to write
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
    return code
