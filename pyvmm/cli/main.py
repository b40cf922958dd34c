"""The top of the command line: where an error becomes one line and an exit code."""

from __future__ import annotations

import os
import sys
from functools import partial

from pyvmm.cli import interrupts
from pyvmm.cli.quick import run_quickly
from pyvmm.host import log
from pyvmm.monitor.exit_code import explain, flush_or_drop


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code; errors are one line unless --debug is given."""
    argv = sys.argv[1:] if args is None else args
    _occupy_standard_fds()
    sys.exit(flush_or_drop(_run(argv)))


def _run(argv: list[str]) -> int:
    _choose_log_format(argv)
    carry_out = run_quickly(argv)
    if carry_out is None:
        from pyvmm.cli.commands import run_command

        carry_out = partial(run_command, argv)
    try:
        with interrupts.raised():
            return carry_out()
    except KeyboardInterrupt:
        return 130
    except Exception as wrong:
        return explain(wrong)


def _choose_log_format(argv: list[str]) -> None:
    """Before anything can go wrong, and whoever reads the other options."""
    options = argv[: argv.index("--")] if "--" in argv else argv
    for index, word in enumerate(options):
        flag, equals, value = word.partition("=")
        if flag == "--log-format":
            log.set_format(value if equals else "".join(options[index + 1 : index + 2]))


def _occupy_standard_fds() -> None:
    """Open /dev/null where a standard stream was closed when the process started.

    The next file to be opened would get its number, and what somebody writes to "standard error"
    would go into a disk image. Python's own streams stay None.
    """
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)
