"""A monitor in a process of its own: a Python program's, or one in the background.

`pyvmm.VM` starts the first kind as a child, by ``python -m``. It takes what to run from a file
descriptor, tells its name on another, and ends with its parent.

`pyvmm run --detach` forks the second kind, with its options read and checked; it has no terminal.
Whoever started it waits until its control socket answers, which is when the guest runs, and shows
till then what it has to say.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING

from pyvmm import monitor
from pyvmm.errors import HostError, PyvmmError

if TYPE_CHECKING:
    from pyvmm.control.client import Client

_GRACE = 15.0  # seconds that a monitor has to end beyond what its guest has
_PIECE = 4096


def main() -> int:
    """Run the request that sys.argv names; the exit code is as `pyvmm run`'s.

    argv[1] is a descriptor with a JSON object: `spec` (as `to_json` has it), `kvm`, `image`,
    `rm` (as `run_spec` has them), `surroundings` (the values of their options) and `parent` (a
    process, or null); argv[2] is one that the VM's name is written to.
    """
    monitor.collect_garbage_rarely()
    from pyvmm.monitor.exit_code import explain

    try:
        return _run(int(sys.argv[1]), int(sys.argv[2]))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return explain(error)


def _run(request_fd: int, name_fd: int) -> int:
    import json

    from pyvmm.kinds.vm_spec import from_json
    from pyvmm.monitor.run_spec import run_spec
    from pyvmm.spec.surroundings import read_surroundings

    with open(request_fd, "rb") as file:
        request = json.loads(file.read())
    surroundings = read_surroundings(request["surroundings"])
    if request["parent"] is not None:
        end_with(request["parent"], surroundings.stop_timeout)

    def tell(name: str) -> None:
        os.write(name_fd, name.encode() + b"\n")
        os.close(name_fd)

    return run_spec(
        from_json(request["spec"]),
        request["kvm"],
        surroundings=surroundings,
        image=request["image"],
        rm=request["rm"],
        on_name=tell,
        cut_if_nothing_kept=True,
    )


def end_with(parent: int, stop_timeout: float) -> None:
    """Once the process `parent`, which has started this one, is gone, end as by SIGTERM, or else,
    when a guest has had its `stop_timeout` seconds, by SIGKILL. (PR_SET_PDEATHSIG looks at the
    thread that started us only.)"""
    from pyvmm.host.pausing import Watcher

    def heard() -> bool:
        if os.getppid() == parent:
            return True
        _end(stop_timeout)
        return False

    try:
        Watcher(os.pidfd_open(parent), "parent", heard)
    except OSError:  # it was gone before we looked
        Thread(target=_end, args=(stop_timeout,), name="parent", daemon=True).start()


def _end(stop_timeout: float) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(stop_timeout + _GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


# --- in the background ----------------------------------------------------------------------------

Run = Callable[[Callable[[str], None]], int]


def run_detached(run: Run) -> int:
    """Have `run` do its work in the background; the exit code.

    `run` gets a callable to tell the VM's name with, and this returns when a VM of that name
    answers, or with the exit code of `run` if that comes first. In the process in the background
    this returns what `run` returns. Raises HostError, or ConfigError if the VM could not be found.
    """
    from pyvmm.control import registry

    registry.folder()
    name, messages = os.pipe(), os.pipe()
    _flush()
    try:
        child = os.fork()
    except OSError as error:
        raise HostError(error.errno or 0, "fork") from None
    if child:
        os.close(name[1])
        os.close(messages[1])
        return _Starter(child, name[0], messages[0]).wait()
    os.close(name[0])
    os.close(messages[0])
    _leave_terminal(messages[1])

    def tell(text: str) -> None:
        os.write(name[1], text.encode() + b"\n")
        os.close(name[1])

    return run(tell)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _leave_terminal(messages: int) -> None:
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    # A file that the user has chosen for messages gets all of them.
    if not stat.S_ISREG(os.fstat(2).st_mode):
        os.dup2(messages, 2)
    os.close(null)
    os.close(messages)


class _Starter:
    """The process in the foreground, until the one in the background is on its own."""

    def __init__(self, child: int, name: int, messages: int) -> None:
        self._child = child
        self._name_pipe = name
        self._messages = messages
        self._process = os.pidfd_open(child)
        self._name = b""
        self._vm: Client | None = None

    def wait(self) -> int:
        """0 once the guest runs, or how the process ended before."""
        poll = select.poll()
        for fd in (self._name_pipe, self._messages, self._process):
            poll.register(fd, select.POLLIN)
        try:
            while True:
                for fd, _ in poll.poll():
                    if fd == self._messages:
                        if not self._pass_on():
                            poll.unregister(fd)
                    elif fd == self._name_pipe:
                        if not self._hear_name():
                            poll.unregister(fd)
                            self._ask(poll)
                    elif fd == self._process:
                        return self._ended()
                    elif self._answered():
                        print(self._name.decode().strip())
                        return 0
                    else:
                        poll.unregister(fd)
        except KeyboardInterrupt:
            signal.pidfd_send_signal(self._process, signal.SIGTERM)
            return self._ended()

    def _pass_on(self) -> bool:
        """Show what the background has to say; False at its end."""
        data = os.read(self._messages, _PIECE)
        if sys.stderr is not None and data:
            with suppress(OSError):  # nobody reads any more, which is not a reason not to run
                os.write(2, data)
        return bool(data)

    def _hear_name(self) -> bool:
        data = os.read(self._name_pipe, _PIECE)
        self._name += data
        return bool(data)

    def _ask(self, poll: select.poll) -> None:
        if not self._name.endswith(b"\n"):
            return  # it has ended: that is seen next
        from pyvmm.control.client import Client
        from pyvmm.control.protocol import request_line

        # It listens already, and answers once the guest runs. If it has ended meanwhile, that shows
        # at the process.
        with suppress(PyvmmError, OSError):
            self._vm = Client.connect(self._name.decode().strip())
            self._vm.connection.send(request_line(1, "status", {}))
            poll.register(self._vm.connection.fileno(), select.POLLIN)

    def _answered(self) -> bool:
        assert self._vm is not None
        try:
            return bool(self._vm.connection.recv(_PIECE))
        except OSError:
            return False

    def _ended(self) -> int:
        _, status = os.waitpid(self._child, 0)
        while self._pass_on():
            pass
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code


if __name__ == "__main__":
    from pyvmm.monitor.exit_code import flush_or_drop

    os._exit(flush_or_drop(main()))
