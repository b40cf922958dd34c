"""Run a command on an emulated KVM host as if it ran on the machine itself."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from pyvmm.emulated_host.launch import Launched, launch
from pyvmm.emulated_host.limits import available_mib, check_memory
from pyvmm.emulated_host.qmp import Qmp
from pyvmm.emulated_host.saved_state import saved_state
from pyvmm.emulated_host.session import Session
from pyvmm.emulated_host.sockets import outside_end
from pyvmm.emulated_host.spec import EmulatedHostSpec
from pyvmm.errors import PyvmmError
from pyvmm.host.syscalls import EventFd

START_TIMEOUT = 180.0  # seconds; it takes three on an idle machine
RESTORE_TIMEOUT = 60.0  # seconds for a saved state to go on, in place of that; it takes a half
GRACE = 10.0  # seconds from a request to stop until QEMU is killed
_MOST_REQUESTS = 2  # to stop; the next kills
_MEMORY_STEP = 256  # MiB
_RELAY_PATIENCE = 1.0  # seconds; the relay ends by itself, now that QEMU has
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


Seen = Callable[[bytes], None]


class EmulatedHost:
    """One emulated host that runs one command.

    `stdin` is a descriptor to read or None for no input; `stdout`, `stderr` descriptors to write.
    None of them is closed or changed. `on_input` sees all input first; what it returns goes in.
    `on_output` see what comes out for stdout and stderr, in that order.
    `console` is a descriptor that gets the emulated kernel's own console output.
    """

    def __init__(
        self,
        spec: EmulatedHostSpec,
        argv: Sequence[str],
        *,
        stdin: int | None = 0,
        stdout: int = 1,
        stderr: int = 2,
        on_input: Callable[[bytes], bytes] | None = None,
        on_output: tuple[Seen, Seen] | None = None,
        console: int | None = None,
        start_timeout: float = START_TIMEOUT,
    ) -> None:
        self._spec, self._argv = spec, list(argv)
        self._stdin = stdin if stdin is None or _is_open(stdin) else None
        self._outputs = [stdout, stderr, *(sink.fd for sink in spec.sinks)]
        self._on_output = on_output or ()
        self._on_input = on_input or (lambda data: data)
        self._console = console
        self._start_timeout = start_timeout
        self._requests: deque[str] = deque()
        self._wake = EventFd()
        self._started = threading.Event()
        # QEMU lives as long as the thread that starts it (PR_SET_PDEATHSIG), so one of our own.
        self._thread = threading.Thread(target=self._main, name="emulated-host", daemon=True)
        self._exit_code = 128 + signal.SIGKILL
        self._error: BaseException | None = None
        self._timer: threading.Timer | None = None
        self.stop_requests = 0
        self._is_to_end = False
        self.pid: int | None = None  # QEMU's, while it runs

    def start(self) -> None:
        """Start QEMU. Raises ConfigError for what is missing or wrong, EmulatedHostError."""
        self._thread.start()
        self._started.wait()
        if self.pid is None:
            self._thread.join()
            self._raise()

    def wait(self) -> int:
        """The command's exit code (128 + N if signal N ended it), once all its output is out.

        Raises EmulatedHostError if the emulated host failed before the command ended.
        """
        self._thread.join()
        if self._timer is not None:
            self._timer.cancel()
        self._wake.close()
        self._raise()
        return self._exit_code

    def send_signal(self, number: int) -> None:
        """Send signal `number` to the command."""
        self._ask(f"signal {number}")

    def request_stop(self, number: int = signal.SIGTERM, grace: float = GRACE) -> None:
        """Send the command signal `number`; after `grace` seconds more, kill everything.

        `wait` returns 128 + `number` if it comes to that. A second request sends its signal too,
        and its `grace` counts; a third kills at once.
        """
        self._exit_code = 128 + number
        self.stop_requests += 1
        self._is_to_end = True
        if self.stop_requests > _MOST_REQUESTS:
            self.kill()
            return
        self.send_signal(number)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(grace, self.kill)
        self._timer.daemon = True
        self._timer.start()

    def kill(self) -> None:
        """End QEMU at once. What the command had flushed to its disks is safe."""
        self._is_to_end = True
        self._ask("kill")

    def _ask(self, request: str) -> None:
        self._requests.append(request)
        if self._wake.fd >= 0:  # else it has ended already
            self._wake.signal()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _main(self) -> None:
        try:
            self._run()
        except BaseException as error:  # raised again in the thread that waits
            self._error = error
        finally:
            self._started.set()

    def _run(self) -> None:
        begun = self._launch()
        if begun is None:
            return
        launched, session = begun
        try:
            relay = outside_end(self._spec, launched.ports, Qmp(launched.qmp))
            if relay is not None:
                relay.start()
            try:
                self._exit_code = session.run()
            except PyvmmError:
                if not session.killed:
                    raise
            finally:
                # This loses no data: the init inside has synced.
                launched.kill()
                if relay is not None:
                    # The relay still carries the last bytes to the clients that wait for them.
                    relay.stop(patience=_RELAY_PATIENCE)
        finally:
            launched.kill()
            launched.close()

    def _launch(self) -> tuple[Launched, Session] | None:
        """From a saved state, or else by booting; None if it is to end before either."""
        check_memory(self._spec.memory_mib)
        spec = replace(self._spec, memory_mib=_rounded(self._spec.memory_mib))
        state = None if spec.boots else saved_state(spec, self._wake.fd)
        if self._is_to_end:
            if state is not None:
                state.close()
            return None
        if state is not None:
            try:
                launched, session = self._begin(spec, state.fd)
                try:
                    if not state.fits(spec):
                        state.remove()
                    elif session.came_up(RESTORE_TIMEOUT):
                        return launched, session
                    else:
                        state.refuse()
                except BaseException:
                    launched.kill()
                    launched.close()
                    raise
                launched.kill()
                launched.close()
            finally:
                state.close()
        return self._begin(self._spec)

    def _begin(
        self, spec: EmulatedHostSpec, state_fd: int | None = None
    ) -> tuple[Launched, Session]:
        launched = launch(spec, self._argv, state_fd=state_fd)
        self.pid = launched.process.pid
        self._started.set()
        session = Session(
            launched,
            stdin=self._stdin,
            outputs=self._outputs,
            on_input=self._on_input,
            on_output=self._on_output,
            requests=self._requests,
            wake=self._wake,
            console_copy=self._console,
            start_timeout=self._start_timeout,
        )
        return launched, session


def _rounded(memory_mib: int) -> int:
    """Somewhat more memory, so that machines of many sizes are one, if this machine has that."""
    rounded = -(-memory_mib // _MEMORY_STEP) * _MEMORY_STEP
    available = available_mib()
    return memory_mib if available is None or available < rounded else rounded


def run(
    spec: EmulatedHostSpec,
    argv: Sequence[str],
    *,
    stdin: int | None = 0,
    stdout: int = 1,
    stderr: int = 2,
    on_input: Callable[[bytes], bytes] | None = None,
    console: int | None = None,
) -> int:
    """Run `argv` on an emulated host; its exit code. Signals that ask us to end are passed on.

    Raises ConfigError and EmulatedHostError like `EmulatedHost`.
    """
    host = EmulatedHost(
        spec, argv, stdin=stdin, stdout=stdout, stderr=stderr, on_input=on_input, console=console
    )
    if threading.current_thread() is not threading.main_thread():
        host.start()
        return host.wait()  # Only the main thread may set signal handlers.
    old = {
        number: signal.signal(number, lambda number, _: host.request_stop(number))
        for number in _PASSED_ON
    }
    try:
        host.start()
        return host.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
