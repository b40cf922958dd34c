"""`pyvmm logs`: what a VM has said, while it runs and afterwards."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import click

from pyvmm.cli.plain_text import RESET, PlainText
from pyvmm.control import registry, vm_log
from pyvmm.control.client import Client, NotRunning
from pyvmm.errors import ConfigError
from pyvmm.host.output import write_all
from pyvmm.platform.console import standard_fds
from pyvmm.platform.terminal import is_terminal
from pyvmm.spec.names import check_name


@click.command()
@click.argument("vm")
@click.option("-f", "--follow", is_flag=True, help="Go on until VM ends.")
@click.option(
    "--raw", is_flag=True, help="Show a terminal the guest's control sequences, for it to obey."
)
def logs(vm: str, follow: bool, raw: bool) -> None:
    """Show what VM has said: its console on standard output, pyvmm's messages on standard error.

    Also of one that has ended: the last 512 KiB at least, until pyvmm rm VM, for a week at most, or
    until 32 others have ended. On a terminal, colours stay and other control sequences are left
    out; a file or pipe gets every byte.
    """
    check_name(vm, option="VM")
    process = _process_of(vm) if follow else None
    printer = _Printer(standard_fds()[1], None if sys.stderr is None else 2, raw=raw)
    try:
        for record in vm_log.read(registry.folder(), vm, process):
            if record.kind == vm_log.CONSOLE:
                printer.console(record.data)
            else:
                printer.message(record.data)
    except ConfigError:
        if vm not in registry.running():
            raise
        # It runs, and has said nothing yet.
    finally:
        printer.end()
        if process is not None:
            os.close(process)


def _process_of(vm: str) -> int | None:
    try:
        with Client.connect(vm) as client:
            process = client.watch_process()
    except NotRunning:
        return None
    return None if process < 0 else process


class _Printer:
    def __init__(self, out: int | None, err: int | None, *, raw: bool) -> None:
        self._out = out
        self._err = err
        self._plain = PlainText() if is_terminal(out) and not raw else None
        self._in_line = False
        self._coloured = False

    def console(self, data: bytes) -> None:
        if self._plain is not None:
            data = self._plain.feed(data).encode(errors="replace")
        self._write(data)

    def _write(self, data: bytes) -> None:
        if self._out is None or not data:
            return
        write_all(self._out, data)
        self._in_line = not data.endswith(b"\n")
        self._coloured = self._coloured or b"\x1b" in data

    def message(self, line: bytes) -> None:
        if self._err is None:
            return
        # On one terminal a message begins a line; in two files each has its own.
        if self._in_line and is_terminal(self._out) and is_terminal(self._err):
            self._write(b"\n")
        text = PlainText()
        shown = text.feed(line) + text.end()
        with suppress(BrokenPipeError):
            write_all(self._err, shown.encode(errors="replace") + b"\n")

    def end(self) -> None:
        if self._plain is not None:
            rest = self._plain.end() + (RESET if self._coloured else "")
            with suppress(OSError):
                self._write(rest.encode(errors="replace"))
