"""A process that monitors are forked from: what all VMs of one snapshot need alike is done once.

It has imported what a monitor imports, has read the snapshot's state and knows whether this
machine's KVM can go on with it. It opens nothing of any VM, has one thread, and never sees what a
guest says. `pyvmm.api.template` is the other end of its socket:

    it says first     {"ready": true}, or {"error": message, "wrong": bool}
    a request         {"spec": as `to_json` has it, "default": name}, with five descriptors: the
                      monitor's standard streams, where it tells its VM's name, and where we tell
                      its exit code
    the answer        {"pid": number} with a descriptor of the process, or {"error": message}
    {"let_go": true}  nothing more begins with the snapshot, which may go: {} is the answer

A forked monitor closes all descriptors but its own. It ends when this process does, which ends when
its socket is closed, unless it is to outlive us.
"""

from __future__ import annotations

import _socket
import errno
import json
import os
import select
import signal
import struct
import sys
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NoReturn

from pyvmm import monitor

MOST_REQUEST = 128 << 10  # bytes
OF_A_MONITOR = 5  # descriptors with a request
_FD = struct.Struct("=i")


def main() -> int:
    """Serve the socket that argv[1] is a descriptor of. argv[2] is one of a JSON object: `spec`,
    `kvm`, `surroundings` (the values of their options), and `outlives`, whether monitors go on when
    this process ends."""
    monitor.collect_garbage_rarely()
    from pyvmm.errors import ConfigError, PyvmmError

    socket = _socket.socket(fileno=int(sys.argv[1]))
    with ExitStack() as closing:
        try:
            with open(int(sys.argv[2]), "rb") as file:
                serving = _Template(socket, json.loads(file.read()), closing)
        except PyvmmError as error:
            wrong = isinstance(error, ConfigError)
            _say(socket, {"error": str(error), "wrong": wrong})
            return 1
        _say(socket, {"ready": True})
        serving.run()
    return 0


def _say(socket: _socket.socket, values: dict[str, object], fd: int = -1) -> None:
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _FD.pack(fd))] if fd >= 0 else []
    with suppress(OSError):  # nobody is there any more: that is seen next
        socket.sendmsg([json.dumps(values).encode()], rights)


class _Template:
    def __init__(self, socket: _socket.socket, request: dict[str, Any], closing: ExitStack) -> None:
        """Raises ConfigError, HostError."""
        import gc

        from pyvmm.control import snapshot_store
        from pyvmm.kinds.vm_spec import from_json
        from pyvmm.monitor.run_spec import which_kvm
        from pyvmm.spec.surroundings import read_surroundings

        self._socket = socket
        self._outlives = bool(request["outlives"])
        self._surroundings = read_surroundings(request["surroundings"])
        self._closing = closing
        self._children: dict[int, tuple[int, int]] = {}  # by pidfd: process, where its code goes
        spec = from_json(str(request["spec"]))
        closing.enter_context(snapshot_store.held(spec.restored_from))
        self._kvm, self._because = which_kvm(spec, str(request["kvm"]))
        if self._kvm == "host":
            from pyvmm.monitor import restored

            _import_all({part.kind for part in spec.parts})
            restored.read_once(spec)
        # What is here by now stays: nobody looks through it for garbage, which would copy its pages
        # in each monitor.
        gc.collect()
        gc.freeze()

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd != self._socket.fileno():
                    poll.unregister(fd)
                    self._ended(fd)
                elif (made := self._serve()) is None:
                    return
                elif made >= 0:
                    poll.register(made, select.POLLIN)

    def _serve(self) -> int | None:
        """Answer a request: the descriptor of a new process, -1 if there is none, None when nobody
        asks any more."""
        room = _socket.CMSG_SPACE(OF_A_MONITOR * _FD.size)
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                MOST_REQUEST, room, _socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return None
        if not data:
            return None
        fds = [
            _FD.unpack_from(content, at)[0]
            for _, _, content in ancillary
            for at in range(0, len(content) - _FD.size + 1, _FD.size)
        ]
        if not fds and not flags & _socket.MSG_CTRUNC:
            self._closing.close()
            _say(self._socket, {})
            return -1
        try:
            if len(fds) != OF_A_MONITOR:  # there was no room for them
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            child, process = self._fork(data, fds)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            _say(self._socket, {"error": f"no process can be made: {error.strerror}"})
            return -1
        *of_child, code = fds
        for fd in of_child:
            os.close(fd)
        self._children[process] = child, code
        _say(self._socket, {"pid": child}, process)
        return process

    def _fork(self, data: bytes, fds: Sequence[int]) -> tuple[int, int]:
        """A monitor's process, and a descriptor of it. Raises OSError."""
        child = os.fork()
        if not child:
            self._be_monitor(data, fds)
        try:
            return child, os.pidfd_open(child)
        except OSError:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise

    def _ended(self, process: int) -> None:
        child, code = self._children.pop(process)
        _, status = os.waitpid(child, 0)
        with suppress(OSError):  # it outlives those who wanted to know
            os.write(code, b"%d" % os.waitstatus_to_exitcode(status))
        os.close(code)
        os.close(process)

    # --- in the child -----------------------------------------------------------------------------

    def _be_monitor(self, data: bytes, fds: Sequence[int]) -> NoReturn:
        code = 70
        try:
            parent = os.getppid()
            self._socket.detach()
            _keep_only(fds[:4])
            os.setsid()
            code = self._run(data, parent)
        except KeyboardInterrupt:
            code = 130
        except BaseException as error:
            from pyvmm.monitor.exit_code import explain

            code = explain(error) if isinstance(error, Exception) else code
        finally:
            from pyvmm.monitor.exit_code import flush_or_drop

            os._exit(flush_or_drop(code))

    def _run(self, data: bytes, parent: int) -> int:
        from pyvmm.host import log
        from pyvmm.kinds.vm_spec import from_json
        from pyvmm.monitor.process import end_with
        from pyvmm.monitor.run_spec import run_spec

        if not self._outlives:
            end_with(parent, self._surroundings.stop_timeout)
        if self._because is not None:
            log.to_stderr(f"{self._because}; running in an emulated KVM host")
        request = json.loads(data)

        def tell(name: str) -> None:
            os.write(_NAME, name.encode() + b"\n")
            os.close(_NAME)

        return run_spec(
            from_json(request["spec"]),
            self._kvm,
            surroundings=self._surroundings,
            default_name=request["default"],
            on_name=tell,
            cut_if_nothing_kept=True,
        )


_NAME = 3  # where a monitor tells its name


def _keep_only(fds: Sequence[int]) -> None:
    """Make `fds` the descriptors 0, 1, 2, … and close all others."""
    high = [os.dup(fd) for fd in fds]  # above those that are to be replaced
    while min(high) < len(fds):
        high = [os.dup(fd) for fd in high]
    for number, fd in enumerate(high):
        os.dup2(fd, number, inheritable=number < _NAME)
    os.closerange(len(fds), os.sysconf("SC_OPEN_MAX"))


def _import_all(kinds: Collection[str]) -> None:
    """The modules that a monitor of a VM with devices of these kinds imports, now or soon."""
    from pyvmm.boot import image_file  # noqa: F401
    from pyvmm.control import server, vm_log  # noqa: F401
    from pyvmm.host import other_user, refusals  # noqa: F401
    from pyvmm.kinds import registry
    from pyvmm.machine import pci_host  # noqa: F401
    from pyvmm.machine.board.registry import board_of_host
    from pyvmm.monitor import (  # noqa: F401
        confine,
        control,
        exit_code,
        keeper,
        phases,
        process,
        run_spec,
        watch,
    )
    from pyvmm.virtio.queue import split  # noqa: F401

    board_of_host().import_restoring()
    for kind in kinds:
        registry.load(kind)
    if "disk" in kinds:
        from pyvmm.virtio.blk import device, overlay, saved_overlay  # noqa: F401
    if "vsock" in kinds:
        from pyvmm.virtio.vsock import device as vsock  # noqa: F401
    if "net" in kinds:
        from pyvmm.host import passt  # noqa: F401
        from pyvmm.virtio.net import device as net  # noqa: F401
        from pyvmm.virtio.net import stream  # noqa: F401


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
