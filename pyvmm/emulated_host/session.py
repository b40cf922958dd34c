"""One run of an emulated host, from QEMU's start to its end: relays bytes and control messages."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence

from pyvmm.emulated_host import initramfs
from pyvmm.emulated_host.launch import Launched
from pyvmm.emulated_host.pumps import InputPump, OutputPump
from pyvmm.emulated_host.spec import EmulatedHostError
from pyvmm.host.syscalls import EventFd

_Handler = Callable[[], None]
_TAIL = 4096  # bytes of console output and of QEMU's messages kept for an error's text
_IN, _OUT = select.POLLIN, select.POLLOUT
_OF_OTHERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # these QEMU does not send itself


class Tail:
    """Takes what comes from a socket and keeps its end; `copy` also gets all of it."""

    def __init__(self, source: socket.socket, copy: int | None = None) -> None:
        self.source = source
        self.open = True
        self._copy = copy
        self._data = b""

    def receive(self) -> None:
        try:
            data = self.source.recv(_TAIL)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        self.open = bool(data)
        self._data = (self._data + data)[-_TAIL:]
        if self._copy is not None and data:
            os.write(self._copy, data)

    def last_words(self) -> str:
        """The last line that tells something: a kernel's panic, else one that is not empty."""
        lines = [line.strip() for line in self._data.decode(errors="replace").splitlines()]
        panics = [line for line in lines if "Kernel panic" in line]
        return next((line for line in (*panics[:1], *reversed(lines)) if line), "nothing")


class Session:
    """Relays between the user's descriptors and a launched QEMU until the command has ended."""

    def __init__(
        self,
        launched: Launched,
        *,
        stdin: int | None,
        outputs: list[int],
        on_input: Callable[[bytes], bytes],
        on_output: Sequence[Callable[[bytes], None]] = (),
        requests: deque[str],
        wake: EventFd,
        console_copy: int | None,
        start_timeout: float,
    ) -> None:
        assert launched.settings is not None
        self._settings = launched.settings
        self._process = launched.process
        self._control = launched.port("control")
        self._input = InputPump(stdin, launched.port("stdin"), on_input)
        names = ["stdout", "stderr", *(f"sink{n}" for n in range(len(launched.settings.sinks)))]
        mark = launched.settings.mark.encode()
        self._outputs = {
            name: OutputPump(launched.port(name), target, mark)
            for name, target in zip(names, outputs, strict=False)
        }
        for pump, see in zip(self._outputs.values(), on_output, strict=False):
            pump.see = see
        self._console = Tail(launched.console, console_copy)
        self._messages = Tail(launched.messages)
        self._requests = requests
        self._wake = wake
        self._control_in, self._control_out = b"", b"go\n"
        self._control_open = True
        self._early = b""  # what is to be said once the settings have gone
        self._asked: list[str] = []  # the requests until it is up
        self._is_awake = self._is_up = False
        self._waits_for_restore = launched.restored
        self._start_by: float | None = time.monotonic() + start_timeout
        self._told_broken: set[str] = set()
        self._exit_code: int | None = None
        self.killed = False

    def run(self) -> int:
        """Relay until the end; the command's exit code. Raises EmulatedHostError."""
        while not self._finished():
            self._step()
        if self._exit_code is None:
            raise EmulatedHostError(self._what_happened())
        return self._exit_code

    def came_up(self, patience: float) -> bool:
        """For a machine that goes on from a saved state: wait until it does. False if QEMU or the
        kernel in it could not within `patience` seconds; then nothing of the run has happened, and
        another machine may have it, with the requests that came for this one. Raises
        EmulatedHostError if somebody has ended QEMU."""
        give_up_at = time.monotonic() + patience
        while not (self._is_up or self.killed):
            ended = not self._messages.open
            if ended and -self._process.wait() in _OF_OTHERS:
                raise EmulatedHostError(self._what_happened())
            if ended or time.monotonic() > give_up_at:
                self._give_back_requests()
                return False
            self._step(give_up_at)
        self._waits_for_restore = False
        return True

    def _give_back_requests(self) -> None:
        if self._asked:
            self._requests.extendleft(reversed(self._asked))
            self._wake.signal()

    def _finished(self) -> bool:
        outputs_done = all(pump.done for pump in self._outputs.values())
        if self.killed or (self._exit_code is not None and outputs_done):
            return True
        return not self._control_open and outputs_done and not self._messages.open

    def _step(self, until: float | None = None) -> None:
        interests = self._interests()
        poll = select.poll()
        masks: dict[int, int] = {}
        for fd, mask, _ in interests:
            masks[fd] = masks.get(fd, 0) | mask
        for fd, mask in masks.items():
            poll.register(fd, mask)
        ready = {fd for fd, _ in poll.poll(self._timeout_ms(until))}
        for fd, _, handler in interests:
            if fd in ready:
                handler()
        self._check_start()

    def _interests(self) -> list[tuple[int, int, _Handler]]:
        found: list[tuple[int, int, _Handler]] = [(self._wake.fd, _IN, self._take_requests)]
        pump = self._input
        if pump.wants_input and not self._waits_for_restore:
            assert pump.source is not None
            found.append((pump.source, _IN, pump.receive))
        if pump.pending:
            found.append((pump.port.fileno(), _OUT, pump.send))
        for name, output in self._outputs.items():
            if output.wants_output:
                found.append((output.target, _OUT, self._sender(name, output)))
            elif not output.ended:
                found.append((output.port.fileno(), _IN, output.receive))
        for tail in (self._console, self._messages):
            if tail.open:
                found.append((tail.source.fileno(), _IN, tail.receive))
        if self._control_open:
            found.append((self._control.fileno(), _IN, self._receive_control))
            if self._control_out:
                found.append((self._control.fileno(), _OUT, self._send_control))
        return found

    def _sender(self, name: str, output: OutputPump) -> _Handler:
        def send() -> None:
            output.send()
            if output.broken and name not in self._told_broken:
                # Inside, the next write is to fail as it would have here (EPIPE).
                self._told_broken.add(name)
                self._request(f"close {name}")

        return send

    def _take_requests(self) -> None:
        self._wake.drain()
        while self._requests:
            request = self._requests.popleft()
            if request == "kill":
                self.killed = True
            else:
                if not self._is_up:
                    self._asked.append(request)
                self._request(request)

    def _request(self, line: str) -> None:
        if self._is_awake:
            self._control_out += line.encode() + b"\n"
        else:
            self._early += line.encode() + b"\n"

    def _send_control(self) -> None:
        with contextlib.suppress(OSError):  # Its end shows when we read.
            self._control_out = self._control_out[self._control.send(self._control_out) :]

    def _receive_control(self) -> None:
        try:
            data = self._control.recv(_TAIL)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        self._control_open = bool(data)
        *lines, rest = (self._control_in + data).split(b"\n")
        self._control_in = rest[-_TAIL:]  # no line of ours is that long
        for line in lines:
            if line == b"awake" and not self._is_awake:
                self._is_awake = True
                self._control_out += initramfs.message(self._settings, time.time()) + self._early
            elif line == b"up":
                self._is_up = True
            elif line == b"started":
                self._start_by = None
            elif line.startswith(b"exit ") and line[5:].isdigit():
                self._exit_code = int(line[5:8])

    def _timeout_ms(self, until: float | None) -> int | None:
        times = [moment for moment in (until, self._start_by) if moment is not None]
        return max(0, int((min(times) - time.monotonic()) * 1000) + 1) if times else None

    def _check_start(self) -> None:
        if self._start_by is not None and time.monotonic() >= self._start_by:
            line = self._console.last_words()
            raise EmulatedHostError(
                f"the emulated KVM host did not start in time; its console said last: {line}"
            )

    def _what_happened(self) -> str:
        if self.killed:
            return "the emulated KVM host was killed"
        status = self._process.wait()
        if status > 0:
            return f"the emulated KVM host failed: {self._messages.last_words()}"
        if status < 0:
            return f"the emulated KVM host's QEMU was killed by signal {-status}"
        line = self._console.last_words()
        return f"the emulated KVM host stopped; its console said last: {line}"
