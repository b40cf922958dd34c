"""Monitors that are forked from a prepared process: pyvmm.monitor.template, seen from a program."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from threading import Lock
from typing import Any

from pyvmm.api.cancellation import woken_by
from pyvmm.api.errors import VMError, check_owner
from pyvmm.api.monitor import ProcessMonitor
from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.host import own_python
from pyvmm.host.syscalls import Closable
from pyvmm.kinds.vm_spec import to_json
from pyvmm.monitor import template
from pyvmm.spec.surroundings import Surroundings
from pyvmm.spec.vm import VmSpec

_PATIENCE = 300.0  # seconds; it makes the emulated host's image, if need be


class Template(Closable):
    """A prepared process for VMs that begin with the same snapshot. Any thread may use it.

    `close` has it end as soon as its last VM has; if its VMs outlive us it ends at once.
    """

    def __init__(
        self, spec: VmSpec, kvm: str, surroundings: Surroundings, *, outlives_us: bool = False
    ) -> None:
        """`spec` is one of such VMs. Raises ConfigError, VMError, HostError."""
        self._lock = Lock()
        self._owner = os.getpid()
        self._outlives_us = outlives_us
        self._living: set[ForkedMonitor] = set()
        self._closing = False
        request = {
            "spec": to_json(spec),
            "kvm": kvm,
            "surroundings": surroundings.as_values(),
            "outlives": outlives_us,
        }
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request_fd = os.memfd_create("pyvmm-request", 0)
        try:
            os.write(request_fd, json.dumps(request).encode())
            os.lseek(request_fd, 0, os.SEEK_SET)
            self._process = subprocess.Popen(
                own_python.command(template.__name__, str(theirs.fileno()), str(request_fd)),
                env=own_python.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), request_fd),
                start_new_session=True,
            )
        finally:
            os.close(request_fd)
            theirs.close()
        self._socket.settimeout(_PATIENCE)
        try:
            with woken_by(partial(self._socket.shutdown, socket.SHUT_RDWR)):
                answer, _ = self._receive()
        except BaseException:
            self._end()
            raise
        if "ready" not in answer:
            self._end()
            text = str(answer.get("error"))
            raise ConfigError(text) if answer.get("wrong") else VMError(text)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def fork(self, spec: VmSpec, default_name: str = "") -> ForkedMonitor:
        """A monitor of `spec`, which has begun; without a name in there its VM gets the first that
        is free of `default_name`, DEFAULT_NAME-2… Raises HostError, VMError."""
        check_owner(self._owner, "this pool")
        with ExitStack() as undoing, ExitStack() as theirs:
            fds, ours = [], []
            for number in range(template.OF_A_MONITOR):
                try:
                    reading, writing = os.pipe()
                except OSError as error:
                    raise HostError(error.errno or 0, "pipe") from None
                ends = (reading, writing) if number else (writing, reading)  # its input is first
                theirs.callback(os.close, ends[1])
                undoing.callback(os.close, ends[0])
                ours.append(ends[0])
                fds.append(ends[1])
            request = {"spec": to_json(spec), "default": default_name or spec.name}
            with self._lock:
                if self._closing:
                    raise VMError("the pool is closed")
                try:
                    socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
                except OSError as error:
                    raise VMError(f"the prepared process has gone: {error.strerror}") from None
                answer, process = self._receive()
                if process is None and "pid" in answer:  # there was no room for its descriptor
                    with suppress(ProcessLookupError):
                        os.kill(answer["pid"], signal.SIGKILL)
                    raise HostError(errno.EMFILE, "a descriptor of a process")
                if process is None:
                    raise VMError(str(answer.get("error")))
                undoing.pop_all()
                monitor = ForkedMonitor(spec, answer["pid"], process, ours)
                self._living.add(monitor)
        monitor.on_end(lambda: self._ended(monitor))
        return monitor

    def _receive(self) -> tuple[dict[str, Any], int | None]:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, template.MOST_REQUEST, 1)
        except OSError as error:
            raise HostError(error.errno or 0, "an answer of the prepared process") from None
        if not data:
            raise VMError("the prepared process has ended")
        found: dict[str, Any] = json.loads(data)
        return found, fds[0] if fds else None

    def _ended(self, monitor: ForkedMonitor) -> None:
        with self._lock:
            self._living.discard(monitor)
            over = self._closing and not self._living
        if over:
            self._end()

    def close(self) -> None:
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._closing = True
            over = self._outlives_us or not self._living
            if not over:  # its VMs have open what they need
                with suppress(OSError, PyvmmError):
                    self._socket.send(b'{"let_go": true}')
                    self._receive()
        if over:
            self._end()

    def _end(self) -> None:
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)


class ForkedMonitor(ProcessMonitor):
    """A monitor that a template has forked."""

    def __init__(self, spec: VmSpec, pid: int, process: int, fds: Sequence[int]) -> None:
        """`process` is a descriptor of it, `fds` are our ends of its standard streams, and what its
        name and its exit code can be read from."""
        super().__init__(spec.name)
        self.spec = spec
        self._process: int | None = process
        self._guard = Lock()
        stdin, stdout, stderr, name_fd, self._code = fds
        files = (os.fdopen(stdin, "wb", 0), os.fdopen(stdout, "rb", 0), os.fdopen(stderr, "rb", 0))
        self.begin(pid, files, os.fdopen(name_fd, "rb"))

    def signal(self, number: signal.Signals) -> None:
        with self._guard, suppress(ProcessLookupError):
            if self._process is not None:
                signal.pidfd_send_signal(self._process, number)

    def open_end(self) -> int:
        return os.dup(self._code)

    def exit_code(self) -> int | None:
        with os.fdopen(self._code, "rb") as file:
            said = file.read()
        with self._guard:
            process, self._process = self._process, None
        if process is not None:
            os.close(process)
        return int(said) if said else None
