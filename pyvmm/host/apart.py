"""Programs that serve another process than the one that starts them.

Whoever asks a confined monitor for a device starts what serves it, and goes; the monitor
is handed what it needs. Such a program is nobody's child, and ends with the monitor, or before it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from pyvmm.host import handed

# Says who it is, and ends the program once nobody has the other end of its standard input.
_SUPERVISES = """\
echo $$
exec > /dev/null
setpriv --pdeathsig TERM -- "$@" &
read -r line
kill "$!" 2> /dev/null
wait "$!"
"""
_MOST = 32  # bytes of a process's number


@contextmanager
def handed_here(names: Mapping[str, int]) -> Iterator[None]:
    """Inside, these descriptors of programs that were started apart are found as if another process
    had handed them over."""
    with handed.Descriptors() as owner:
        for fd in names.values():
            owner.fds.append(os.dup(fd))
        with handed.files(dict(zip(names, owner.fds.copy(), strict=True)), owner):
            yield


class Supervised(NamedTuple):
    """A program that ends when all copies of `life` are closed. `says` is what it writes its
    messages to, and `process` can be read once it has ended, with its files closed (pidfd)."""

    says: int
    life: int
    process: int


def start(
    argv: Sequence[str],
    given: Sequence[int],
    closing: ExitStack,
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
) -> int:
    """Start the program `argv` with the descriptors `given`, in a session of its own; what it
    writes its messages to. Raises OSError."""
    reads, writes = os.pipe()
    closing.callback(os.close, reads)
    try:
        subprocess.run(
            ["setsid", "--fork", *argv],
            stdin=stdin,
            stdout=stdout,
            stderr=writes,
            pass_fds=given,
            check=False,
        )
    finally:
        os.close(writes)
    return reads


def supervise(argv: Sequence[str], given: Sequence[int], closing: ExitStack) -> Supervised:
    """The same for a program that has to be told to end. `closing` closes our descriptors. Raises
    OSError."""
    with ExitStack() as here:
        held, life = os.pipe()
        here.callback(os.close, held)
        closing.callback(os.close, life)
        told, tells = os.pipe()
        here.callback(os.close, told)
        try:
            program = ["/bin/sh", "-c", _SUPERVISES, "sh", *argv]
            says = start(program, given, closing, stdin=held, stdout=tells)
        finally:
            os.close(tells)  # or what is read would not end if the program has not begun
        process = os.pidfd_open(int(os.read(told, _MOST) or b"-1"))
    closing.callback(os.close, process)
    return Supervised(says, life, process)
