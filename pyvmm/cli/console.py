"""`pyvmm console`, `pyvmm events`: looking at a VM that runs."""

from __future__ import annotations

import os
import select
import signal
import sys
from contextlib import suppress

import click

from pyvmm.control import client
from pyvmm.control.client import Client
from pyvmm.host import log
from pyvmm.host.output import write_all
from pyvmm.host.unix_sockets import SHUT_WR, Socket
from pyvmm.platform.console import standard_fds
from pyvmm.platform.escape import CONSOLE_HELP, Command, EscapeParser
from pyvmm.platform.terminal import Terminal, is_terminal

_PIECE = 1 << 16


@click.command()
@click.argument("vm")
@click.option("--read-only", is_flag=True, help="Only look: what is typed is not for the guest.")
@click.option("--no-history", is_flag=True, help="Do not show what the console said before.")
def console(vm: str, read_only: bool, no_history: bool) -> None:
    """Join this terminal to the console of VM, whoever else looks at it.

    Shows the last of what the guest has said first. Ctrl-A d leaves, and the VM runs on; Ctrl-A x
    ends it; Ctrl-A h shows all keys.
    """
    stdin, stdout = standard_fds()
    socket = client.open_console(vm, history=not no_history, input=not read_only)
    try:
        if is_terminal(stdin):
            log.to_stderr(f"the console of {vm}; Ctrl-A d leaves it, Ctrl-A h shows help")
        with Terminal(stdin):
            ended = _Joined(vm, socket, stdin, stdout).run()
    finally:
        socket.close()
    log.to_stderr(f"{vm} has ended" if ended else f"left {vm}, which runs on")


class _Joined:
    """A terminal (or pipes) and a console, until one of them ends it."""

    def __init__(self, vm: str, socket: Socket, stdin: int | None, stdout: int | None) -> None:
        self._vm = vm
        self._socket = socket
        self._stdin = stdin
        self._stdout = stdout
        self._keys = EscapeParser(detach=True) if is_terminal(stdin) else None
        self._typed = bytearray()
        self._leaving = False

    def run(self) -> bool:
        """True if the VM has ended, False if the user has left it."""
        while not self._leaving:
            poll = select.poll()
            typed = select.POLLOUT if self._typed else 0
            poll.register(self._socket.fileno(), select.POLLIN | typed)
            if self._stdin is not None and len(self._typed) < _PIECE:
                poll.register(self._stdin, select.POLLIN)
            if self._stdout is not None and self._stdout != self._stdin:
                poll.register(self._stdout, 0)  # for POLLERR: nobody reads any more
            for fd, events in poll.poll():
                if fd == self._stdout:
                    self._leaving = True
                elif fd == self._stdin:
                    self._read_keys()
                elif events & select.POLLIN or not events & select.POLLOUT:
                    if not self._show():
                        return True
                else:
                    self._send()
        return False

    def _read_keys(self) -> None:
        assert self._stdin is not None
        try:
            data = os.read(self._stdin, _PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # the terminal hung up
        if not data:
            self._stdin = None
            if self._keys is not None:
                self._leaving = True
            elif not self._typed:
                self._end_input()
            return
        commands: list[Command] = []
        if self._keys is not None:
            data, commands = self._keys.feed(data)
        self._typed += data
        self._send()
        for command in commands:
            self._obey(command)

    def _obey(self, command: Command) -> None:
        if command is Command.DETACH:
            self._leaving = True
        elif command is Command.QUIT:
            with Client.connect(self._vm) as vm:
                vm.call("quit")
        else:
            self._write(b"\r\n" + CONSOLE_HELP.replace("\n", "\r\n").encode())

    def _send(self) -> None:
        try:
            while self._typed:
                del self._typed[: self._socket.send(self._typed)]
        except BlockingIOError:
            return
        except OSError:
            self._typed.clear()  # it has ended: the next look shows it
        if self._stdin is None:
            self._end_input()

    def _end_input(self) -> None:
        with suppress(OSError):  # it has ended
            self._socket.shutdown(SHUT_WR)

    def _show(self) -> bool:
        try:
            data = self._socket.recv(_PIECE)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        self._write(data)
        return bool(data)

    def _write(self, data: bytes) -> None:
        try:
            if self._stdout is not None:
                write_all(self._stdout, data)
        except BrokenPipeError:
            self._leaving = True  # nobody reads any more


@click.command()
@click.argument("vm")
@click.option("--no-history", is_flag=True, help="Do not begin with the events before.")
def events(vm: str, no_history: bool) -> None:
    """Show what happens to VM, a line of JSON for each event, until it ends.

    docs/control-socket.md has the events.
    """
    import json

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for event in client.events(vm, history=not no_history):
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
