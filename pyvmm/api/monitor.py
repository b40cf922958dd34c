"""The process that runs a VM, seen from the program that uses it.

A VM of one's own has a monitor that is a child: this program's threads and locks stay apart from
the guest's processors, and a crash of one does not take the other along. The child ends when this
process does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from threading import Event, Lock, Thread
from typing import IO

from pyvmm.api.cancellation import check, woken_by
from pyvmm.api.errors import TAIL_LINES, Outcome, VMError, VMTimeout, check_owner, ended
from pyvmm.api.transcript import Transcript
from pyvmm.control.client import Client, NoAnswer
from pyvmm.errors import ConfigError
from pyvmm.host import own_python
from pyvmm.kinds.vm_spec import to_json
from pyvmm.monitor import process
from pyvmm.spec.surroundings import USUAL, Surroundings
from pyvmm.spec.vm import VmSpec

START_SECONDS = 300.0  # until the first instruction; an emulated host on a busy machine takes long
PIECE = 1 << 16  # bytes read or written at once
_DRAIN_SECONDS = 1.0  # for output of a process that has ended: others may hold its pipe
_TYPE_SECONDS = 30.0
_KILL_SECONDS = 10.0
_ENDING_SECONDS = 2.0  # between what a guest's end breaks, and the monitor's end
_MOST_MESSAGES = 1000
_FAILURES = (1, 2, 70)  # of `pyvmm run`: the host, the options, a defect


class Monitor(ABC):
    """A monitor: what its guest has said, and whether it has ended. `messages` are its own lines,
    such as diagnoses."""

    pid: int

    def __init__(self, name: str) -> None:
        self.name = name
        self.owner = os.getpid()
        self.transcript = Transcript()
        self.messages: list[str] = []
        self._outcome: Outcome | None = None
        self._ended = Event()
        self._on_end: list[Callable[[], object]] = []
        self._typing = Lock()

    @property
    def is_elsewhere(self) -> bool:
        """True if it is the monitor of the process that this one was forked from. Its thread is
        there, its locks may be held for ever here, and what it does is not for us to end."""
        return os.getpid() != self.owner

    @abstractmethod
    def type(self, data: bytes) -> None:
        """Give `data` to the guest's console. Raises VMTimeout if the guest does not read it,
        VMError if it has ended."""

    @abstractmethod
    def signal(self, number: signal.Signals) -> None:
        """Send its process a signal."""

    def wait(self, timeout: float | None) -> Outcome:
        """Wait for its end, and return it. Raises VMTimeout after `timeout` seconds."""
        woken = Event()
        self.on_end(woken.set)
        with woken_by(woken.set):
            woken.wait(timeout)
            check()
        if not self._ended.is_set():
            raise VMTimeout(f"{self.name} still runs", console=self.transcript.tail(TAIL_LINES))
        assert self._outcome is not None
        return self._outcome

    def ends_soon(self) -> bool:
        """True if it ends within moments, or has."""
        try:
            self.wait(_ENDING_SECONDS)
        except VMTimeout:
            return False
        return True

    def on_end(self, call: Callable[[], object]) -> None:
        """Call `call`, from another thread, once it has ended; now, if it has."""
        with self._typing:
            if not self._ended.is_set():
                self._on_end.append(call)
                return
        call()

    @property
    def outcome(self) -> Outcome | None:
        """Its end; None while it runs."""
        return self._outcome if self._ended.is_set() else None

    def end(self) -> Outcome:
        """Kill it, and wait until it is gone; how it ended."""
        self.signal(signal.SIGKILL)
        self._ended.wait(_KILL_SECONDS)
        return self._outcome or Outcome(None)

    def write(self, fd: int, data: bytes) -> None:
        """Write all of `data` to the non-blocking `fd`, which the guest reads from. Raises as
        `type` does."""
        check_owner(self.owner, self.name)
        with self._typing:
            if self.outcome is not None:
                raise self.why_ended()
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            deadline = time.monotonic() + _TYPE_SECONDS
            while data:
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise VMTimeout(f"the guest of {self.name} does not read from its console")
                try:
                    data = data[os.write(fd, data[:PIECE]) :]
                except BlockingIOError:
                    continue
                except OSError:
                    break
            else:
                return
        raise self.why_ended()

    def note(self, line: str) -> None:
        """Add a line of ours to its messages."""
        self.messages.append(line)

    def why_ended(self) -> VMError:
        """The error for a VM that has ended, or is just ending."""
        self._ended.wait(_KILL_SECONDS)
        outcome = self._outcome or Outcome(None, "its monitor does not answer")
        return ended(self.name, outcome, self.transcript.tail(TAIL_LINES))

    def finish(self, outcome: Outcome, close: Callable[[], object]) -> None:
        """It has ended; `close` what it was reached by."""
        with self._typing:
            self._outcome = outcome
            close()
            self._ended.set()
        self.transcript.end()
        for call in self._on_end:
            call()


class ProcessMonitor(Monitor):
    """A monitor whose standard streams we have."""

    def begin(self, pid: int, streams: Sequence[IO[bytes]], name_pipe: IO[bytes]) -> None:
        """It is the process `pid`, with these ends of its standard input, output and error, and
        tells its name through `name_pipe`."""
        self.pid = pid
        self._streams = streams
        # Not for `_close`, which another thread calls: whoever asks for the name reads it to its
        # end, also after the process has ended.
        self._name_pipe = name_pipe
        self._stdin, *outputs = (stream.fileno() for stream in streams)
        os.set_blocking(self._stdin, False)
        self._outputs = outputs
        Thread(target=self._pump, name="pyvmm console", daemon=True).start()

    @abstractmethod
    def open_end(self) -> int:
        """A descriptor that is readable when the process has ended; the caller closes it."""

    @abstractmethod
    def exit_code(self) -> int | None:
        """The exit code of the process, once that has ended; None if nobody knows it."""

    def await_start(self, timeout: float) -> None:
        """Return once its vCPUs run, or wait paused. Raises ConfigError for what is wrong with its
        options, VMError if it cannot be started otherwise, and ends it after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        try:
            with (
                woken_by(partial(self.signal, signal.SIGKILL)),
                Client.connect(self.wait_for_name(timeout)) as client,
            ):
                client.call("status", patience=max(0.0, deadline - time.monotonic()))
        except (NoAnswer, ConfigError):
            if self.ends_soon():
                raise self.failure() from None
            console = self.transcript.tail(TAIL_LINES)
            self.end()
            raise VMTimeout(
                f"{self.name or 'vm'} did not start within {timeout:g} s", console=console
            ) from None
        except BaseException:
            self.end()
            raise

    def wait_for_name(self, timeout: float) -> str:
        """The name under which the VM runs; to be asked for once. Raises the error for one that
        does not come so far, and NoAnswer after `timeout` seconds."""
        poll = select.poll()
        poll.register(self._name_pipe, select.POLLIN)
        if not poll.poll(timeout * 1000):
            raise NoAnswer(f"the monitor (PID {self.pid}) does not come up")
        with self._name_pipe as pipe:
            name = pipe.readline()
        if not name:
            self.wait(None)
            raise self.failure()
        self.name = name.decode().removesuffix("\n")
        return self.name

    def failure(self) -> Exception:
        """The error of its failed start, by its own last line."""
        outcome = self._outcome or Outcome(None)
        if outcome.exit_code == 2:
            return ConfigError(outcome.line)
        line = outcome.line or f"exit code {outcome.exit_code}"
        return VMError(f"the VM did not start: {line}", console=self.transcript.tail(TAIL_LINES))

    def type(self, data: bytes) -> None:
        self.write(self._stdin, data)

    # --- the thread that reads --------------------------------------------------------------------

    def _pump(self) -> None:
        stdout, stderr = self._outputs
        rest = b""
        poll = select.poll()
        process = self.open_end()
        for fd in (stdout, stderr, process):
            poll.register(fd, select.POLLIN)
        open_fds, end_by = {stdout, stderr}, None
        while open_fds:
            left = None if end_by is None else max(0.0, end_by - time.monotonic())
            ready = poll.poll(None if left is None else left * 1000)
            if not ready and left is not None:
                break
            for fd, _ in ready:
                if fd == process:
                    poll.unregister(process)
                    end_by = time.monotonic() + _DRAIN_SECONDS
                elif not (data := os.read(fd, PIECE)):
                    poll.unregister(fd)
                    open_fds.discard(fd)
                elif fd == stdout:
                    self.transcript.append(data)
                else:
                    *lines, rest = (rest + data).split(b"\n")
                    self._take_messages(lines)
        os.close(process)
        self._take_messages([rest] if rest else [])
        self._finish(self.exit_code())

    def _take_messages(self, lines: list[bytes]) -> None:
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            self.messages.append(text.removeprefix("pyvmm: "))
        del self.messages[:-_MOST_MESSAGES]

    def _finish(self, code: int | None) -> None:
        self.finish(Outcome(code, self._last_line(code)), self._close)

    def _close(self) -> None:
        for stream in self._streams:
            stream.close()

    def _last_line(self, code: int | None) -> str:
        """Its last message about this VM; why it failed may not name the VM."""
        about = [line for line in self.messages if line.startswith(f"{self.name}: ")]
        found = about or (self.messages if code in _FAILURES else [])
        return found[-1].removeprefix(f"{self.name}: ") if found else ""


class OwnMonitor(ProcessMonitor):
    """A monitor that was started for `spec`."""

    def __init__(
        self,
        spec: VmSpec,
        kvm: str,
        *,
        surroundings: Surroundings = USUAL,
        image: str | None = None,
        rm: bool = True,
        outlives_us: bool = False,
    ) -> None:
        """Starts it; with `image` its first disk is that image's, and without `rm` its changes are
        kept; with `outlives_us` it goes on when this process ends."""
        super().__init__(spec.name)
        request = {
            "spec": to_json(spec),
            "kvm": kvm,
            "surroundings": surroundings.as_values(),
            "image": image,
            "rm": rm,
            "parent": None if outlives_us else os.getpid(),
        }
        self._start(json.dumps(request).encode())

    def _start(self, request: bytes) -> None:
        request_fd = os.memfd_create("pyvmm-request", 0)
        name_fd, their_name_fd = os.pipe()
        name_pipe = os.fdopen(name_fd, "rb")
        try:
            os.write(request_fd, request)
            os.lseek(request_fd, 0, os.SEEK_SET)
            self._process = subprocess.Popen(
                own_python.command(process.__name__, str(request_fd), str(their_name_fd)),
                env=own_python.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(request_fd, their_name_fd),
                start_new_session=True,  # Ctrl-C is this program's
            )
        finally:
            os.close(request_fd)
            os.close(their_name_fd)
        stdin, stdout, stderr = (
            *(self._process.stdin, self._process.stdout, self._process.stderr),
        )
        assert stdin and stdout and stderr
        self.begin(self._process.pid, (stdin, stdout, stderr), name_pipe)

    def signal(self, number: signal.Signals) -> None:
        # Popen knows whether the process has been waited for: its number may be another's by now.
        self._process.send_signal(number)

    def open_end(self) -> int:
        return os.pidfd_open(self.pid)

    def exit_code(self) -> int:
        return self._process.wait()
