"""The same VM for asyncio: methods of the same names, to be awaited.

    async with AsyncVM(kernel="vmlinuz", disks=["root.img,snapshot"]) as vm:
        await vm.console.expect("login:")

None of them blocks the event loop, and cancelling one ends what it was doing before CancelledError
goes on.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

from pyvmm.api.cancellation import in_thread
from pyvmm.api.console import TIMEOUT_SECONDS, Console, Pattern
from pyvmm.api.errors import Outcome
from pyvmm.api.events import Event
from pyvmm.api.vm import START_SECONDS, STOP_SECONDS, VM


class AsyncVM:
    """A VM whose methods are coroutines. `vm` is the `VM` itself; what does not wait (`name`,
    `outcome`, `messages`, `console.text`) is as there."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Takes what `VM` takes."""
        self.vm = VM(*args, **options)

    @classmethod
    def from_config(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """See `VM.from_config`."""
        new = cls.__new__(cls)
        new.vm = VM.from_config(path, **options)
        return new

    @classmethod
    async def attach(cls, name: str) -> Self:
        """See `VM.attach`."""
        new = cls.__new__(cls)
        new.vm = await in_thread(VM.attach, name)
        return new

    async def start(self, timeout: float = START_SECONDS) -> Self:
        """See `VM.start`. Cancelled, it leaves no VM behind."""
        await in_thread(self.vm.start, timeout)
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
        await in_thread(self.vm.__exit__, kind, error, trace)

    def detach(self) -> None:
        """See `VM.detach`."""
        self.vm.detach()

    async def stop(self, timeout: float = STOP_SECONDS, *, escalate: bool = True) -> Outcome:
        """See `VM.stop`."""
        return await in_thread(self.vm.stop, timeout, escalate=escalate)

    async def kill(self) -> Outcome:
        """See `VM.kill`."""
        return await in_thread(self.vm.kill)

    async def wait(self, timeout: float | None = None) -> Outcome:
        """See `VM.wait`."""
        return await in_thread(self.vm.wait, timeout)

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

    def tail(self, lines: int = 20) -> str:
        """See `Console.tail`."""
        return self._console.tail(lines)
