"""The same VM for asyncio: methods of the same names, to be awaited.

    async with AsyncVM(kernel="vmlinuz", disks=["root.img,snapshot"]) as vm:
        await vm.console.expect("login:")

None of them blocks the event loop, and cancelling one ends what it was doing before CancelledError
goes on.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from pyvmm.agent import Clock, Completed, Copied, Info, Output
from pyvmm.api.cancellation import in_thread
from pyvmm.api.command import Command
from pyvmm.api.console import TIMEOUT_SECONDS, Console, Pattern
from pyvmm.api.errors import TAIL_LINES, Outcome
from pyvmm.api.events import Event
from pyvmm.api.in_guest import READY_SECONDS, Path
from pyvmm.api.vm import START_SECONDS, VM
from pyvmm.machine.outcome import STOP_SECONDS

T = TypeVar("T")


class AsyncVM:
    """A VM whose methods are coroutines. `vm` is the `VM` itself; what does not wait (`name`,
    `outcome`, `messages`, `console.text`) is as there."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Takes what `VM` takes."""
        self.vm = VM(*args, **options)

    @classmethod
    def from_config(
        cls, path: str | os.PathLike[str], *, allow_code: bool = False, **options: Any
    ) -> Self:
        """See `VM.from_config`."""
        new = cls.__new__(cls)
        new.vm = VM.from_config(path, allow_code=allow_code, **options)
        return new

    @classmethod
    async def attach(cls, name: str) -> Self:
        """See `VM.attach`."""
        new = cls.__new__(cls)
        new.vm = await in_thread(VM.attach, name)
        return new

    async def start(self, timeout: float = START_SECONDS, *, detached: bool = False) -> Self:
        """See `VM.start`. Cancelled, it leaves no VM behind."""
        await in_thread(self.vm.start, timeout, detached=detached)
        return self

    async def __aenter__(self) -> Self:
        await in_thread(self.vm.__enter__)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end(self.vm.__exit__, kind, error, trace)

    async def _end(self, call: Callable[..., T], *args: Any, **options: Any) -> T:
        # In a process that was forked it does nothing, and must not wait for that: the event loop
        # there shares its file descriptors with the one that runs on in the other process.
        if self.is_elsewhere:
            return call(*args, **options)
        return await in_thread(call, *args, **options)

    def detach(self) -> None:
        """See `VM.detach`."""
        self.vm.detach()

    async def stop(
        self, timeout: float = STOP_SECONDS, *, escalate: bool = True, now: bool = False
    ) -> Outcome:
        """See `VM.stop`."""
        return await self._end(self.vm.stop, timeout, escalate=escalate, now=now)

    async def close(self) -> Outcome:
        """See `VM.close`."""
        return await self._end(self.vm.close)

    async def kill(self) -> Outcome:
        """See `VM.kill`."""
        return await self._end(self.vm.kill)

    async def wait(self, timeout: float | None = None) -> Outcome:
        """See `VM.wait`."""
        return await in_thread(self.vm.wait, timeout)

    @property
    def is_elsewhere(self) -> bool:
        return self.vm.is_elsewhere

    @property
    def outcome(self) -> Outcome | None:
        return self.vm.outcome

    @property
    def name(self) -> str:
        return self.vm.name

    @property
    def pid(self) -> int:
        return self.vm.pid

    @property
    def messages(self) -> list[str]:
        return self.vm.messages

    @property
    def console(self) -> AsyncConsole:
        """See `VM.console`."""
        return AsyncConsole(self.vm.console)

    async def wait_ready(self, timeout: float | None = READY_SECONDS) -> Info:
        """See `VM.wait_ready`."""
        return await in_thread(self.vm.wait_ready, timeout)

    async def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        input: bytes | None = None,
        timeout: float | None = None,
        check: bool = False,
    ) -> Completed:
        """See `VM.run`. Cancelled, it ends the command."""
        options = {"env": env, "cwd": cwd, "user": user, "input": input}
        return await in_thread(self.vm.run, argv, timeout=timeout, check=check, **options)

    async def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: bool = False,
        tty: tuple[int, int] | None = None,
        timeout: float | None = None,
    ) -> AsyncCommand:
        """See `VM.popen`."""
        options = {"env": env, "cwd": cwd, "user": user, "stdin": stdin, "tty": tty}
        return AsyncCommand(await in_thread(self.vm.popen, argv, timeout=timeout, **options))

    async def push(self, local: Path, remote: str, *, timeout: float | None = None) -> Copied:
        """See `VM.push`."""
        return await in_thread(self.vm.push, local, remote, timeout=timeout)

    async def pull(self, remote: str, local: Path, *, timeout: float | None = None) -> Copied:
        """See `VM.pull`."""
        return await in_thread(self.vm.pull, remote, local, timeout=timeout)

    async def clock(self) -> Clock:
        """See `VM.clock`."""
        return await in_thread(self.vm.clock)

    async def set_clock(self) -> Clock:
        """See `VM.set_clock`."""
        return await in_thread(self.vm.set_clock)

    async def status(self) -> dict[str, Any]:
        """See `VM.status`."""
        return await in_thread(self.vm.status)

    async def stats(self) -> dict[str, Any]:
        """See `VM.stats`."""
        return await in_thread(self.vm.stats)

    async def pause(self) -> None:
        """See `VM.pause`."""
        await in_thread(self.vm.pause)

    async def resume(self) -> None:
        """See `VM.resume`."""
        await in_thread(self.vm.resume)

    async def resize_disk(
        self, disk: str, size: int | str | None = None, *, shrink: bool = False
    ) -> int:
        """See `VM.resize_disk`."""
        return await in_thread(self.vm.resize_disk, disk, size, shrink=shrink)

    async def events(self, *, history: bool = True) -> AsyncIterator[Event]:
        """See `VM.events`."""
        events = await in_thread(self.vm.events, history=history)
        while (event := await in_thread(next, events, None)) is not None:
            yield event

    @property
    def balloon(self) -> AsyncBalloonControl:
        """See `VM.balloon`."""
        return AsyncBalloonControl(self.vm)


class AsyncCommand:
    """A `Command`, with coroutines. Cancelling `read` or `wait` does not end the command; leaving
    its `async with` block does."""

    def __init__(self, command: Command) -> None:
        """`AsyncVM.popen` makes one."""
        self._command = command
        self._pending: list[Output] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def args(self) -> list[str]:
        return self._command.args

    @property
    def returncode(self) -> int | None:
        return self._command.returncode

    @property
    def pid(self) -> int | None:
        return self._command.pid

    async def read(self, timeout: float | None = None) -> Output | None:
        """See `Command.read`; after `timeout` seconds it raises TimeoutError."""
        async with asyncio.timeout(timeout):
            while not self._pending:
                if self.returncode is not None:
                    return None
                await _readable(self._command.fileno(), self._command.deadline)
                self._pending = await in_thread(self._command.receive)
        return self._pending.pop(0)

    async def events(self) -> AsyncIterator[Output]:
        """See `Command.events`."""
        while (piece := await self.read()) is not None:
            yield piece

    async def wait(self, timeout: float | None = None) -> int:
        """See `Command.wait`; after `timeout` seconds it raises TimeoutError."""
        async with asyncio.timeout(timeout):
            while await self.read() is not None:
                pass
        assert self.returncode is not None
        return self.returncode

    async def write(self, data: bytes) -> int:
        """See `Command.write`."""
        return await in_thread(self._command.write, data)

    async def close_stdin(self) -> None:
        """See `Command.close_stdin`."""
        await in_thread(self._command.close_stdin)

    async def kill(self, signal: int) -> None:
        """See `Command.kill`."""
        await in_thread(self._command.kill, signal)

    async def resize(self, rows: int, columns: int) -> None:
        """See `Command.resize`."""
        await in_thread(self._command.resize, rows, columns)

    def close(self) -> None:
        """See `Command.close`."""
        self._command.close()


async def _readable(fd: int, deadline: float | None) -> None:
    """Wait until `fd` has something, or for `deadline`, a time of time.monotonic()."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def set() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, set)
    try:
        await asyncio.wait([ready], timeout=deadline and max(0.0, deadline - time.monotonic()))
    finally:
        loop.remove_reader(fd)


class AsyncBalloonControl:
    """`VM.balloon`, with coroutines."""

    def __init__(self, vm: VM) -> None:
        self._balloon = vm.balloon

    async def set(self, size: int | str) -> None:
        """See `BalloonControl.set`."""
        await in_thread(self._balloon.set, size)

    async def stats(self) -> dict[str, Any]:
        """See `BalloonControl.stats`."""
        return await in_thread(self._balloon.stats)


class AsyncConsole:
    """`VM.console`, with coroutines."""

    def __init__(self, console: Console) -> None:
        self._console = console

    async def expect(
        self, pattern: Pattern | Sequence[Pattern], timeout: float | None = TIMEOUT_SECONDS
    ) -> int:
        """See `Console.expect`."""
        return await in_thread(self._console.expect, pattern, timeout)

    async def expect_exact(
        self, pattern: Pattern | Sequence[Pattern], timeout: float | None = TIMEOUT_SECONDS
    ) -> int:
        """See `Console.expect_exact`."""
        return await in_thread(self._console.expect_exact, pattern, timeout)

    async def send(self, text: str | bytes) -> None:
        """See `Console.send`."""
        await in_thread(self._console.send, text)

    async def sendline(self, text: str | bytes = "") -> None:
        """See `Console.sendline`."""
        await in_thread(self._console.sendline, text)

    async def sendcontrol(self, key: str) -> None:
        """See `Console.sendcontrol`."""
        await in_thread(self._console.sendcontrol, key)

    @property
    def before(self) -> Any:
        return self._console.before

    @property
    def after(self) -> Any:
        return self._console.after

    @property
    def match(self) -> Any:
        return self._console.match

    @property
    def text(self) -> str:
        return self._console.text

    def tail(self, lines: int = TAIL_LINES) -> str:
        """See `Console.tail`."""
        return self._console.tail(lines)
