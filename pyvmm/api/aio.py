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
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

from pyvmm.agent import Output
from pyvmm.api.cancellation import in_thread, made_in_thread
from pyvmm.api.command import Command
from pyvmm.api.console import Console
from pyvmm.api.errors import TAIL_LINES, Outcome
from pyvmm.api.events import Event
from pyvmm.api.in_monitor import BalloonControl
from pyvmm.api.signatures import (
    Asynchronous,
    OfAllOptions,
    awaited,
    awaited_for_itself,
    signature_of,
)
from pyvmm.api.vm import VM

P = ParamSpec("P")
T = TypeVar("T")


class Owned(Protocol):
    """What belongs to the process that has made it."""

    @property
    def is_elsewhere(self) -> bool: ...


Own = TypeVar("Own", bound=Owned)


async def end(
    call: Callable[Concatenate[Own, P], T], owned: Own, *args: P.args, **options: P.kwargs
) -> T:
    """The result of `call`, which ends something that a forked process has no business with."""
    # There it does nothing, and must not wait for that: the event loop shares its file descriptors
    # with the one that runs on in the other process.
    if owned.is_elsewhere:
        return call(owned, *args, **options)
    return await in_thread(call, owned, *args, **options)


def _leave(vm: VM) -> None:
    vm.__exit__(None, None, None)


def _kill_all(vms: list[VM]) -> None:
    for vm in vms:
        vm.kill()


class AsyncVM(Asynchronous[VM]):
    """A VM whose methods are coroutines. `vm` is the `VM` itself; what does not wait (`name`,
    `outcome`, `messages`, `console.text`) is as there."""

    __signature__ = OfAllOptions(vsock=True)

    @signature_of(VM.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        """Takes what `VM` takes."""
        super().__init__(VM(*args, **options))

    @classmethod
    def of(cls, vm: VM) -> Self:
        """The same VM."""
        new = cls.__new__(cls)
        Asynchronous.__init__(new, vm)
        return new

    @classmethod
    def from_config(
        cls, path: str | os.PathLike[str], *, allow_code: bool = False, **options: Any
    ) -> Self:
        """See `VM.from_config`."""
        return cls.of(VM.from_config(path, allow_code=allow_code, **options))

    @classmethod
    async def attach(cls, name: str) -> Self:
        """See `VM.attach`."""
        return cls.of(await made_in_thread(VM.detach, VM.attach, name))

    @classmethod
    async def restore(cls, snapshot: str, *, name: str = "", kvm: str = "auto") -> Self:
        """See `VM.restore`."""
        return cls.of(await in_thread(VM.restore, snapshot, name=name, kvm=kvm))

    @signature_of(VM.clone)
    async def clone(self, *args: Any, **options: Any) -> Self:
        """See `VM.clone`."""
        return self.of(await made_in_thread(VM.kill, self.vm.clone, *args, **options))

    @signature_of(VM.clones)
    async def clones(self, *args: Any, **options: Any) -> list[Self]:
        """See `VM.clones`."""
        made = await made_in_thread(_kill_all, self.vm.clones, *args, **options)
        return [self.of(vm) for vm in made]

    @property
    def vm(self) -> VM:
        """The VM itself."""
        return self._held

    # --- its life: each leaves no VM behind when it is cancelled ----------------------------------

    start = awaited_for_itself(VM.start, VM.kill)

    async def __aenter__(self) -> Self:
        await made_in_thread(_leave, self.vm.__enter__)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await end(VM.__exit__, self.vm, kind, error, trace)

    def detach(self) -> None:
        """See `VM.detach`."""
        self.vm.detach()

    stop = awaited(VM.stop, end)
    close = awaited(VM.close, end)
    kill = awaited(VM.kill, end)
    wait = awaited(VM.wait)

    @property
    def is_elsewhere(self) -> bool:
        return self.vm.is_elsewhere

    @property
    def outcome(self) -> Outcome | None:
        return self.vm.outcome

    # --- what it is -------------------------------------------------------------------------------

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

    # --- what is asked of its guest: a command ends when it is cancelled --------------------------

    wait_ready = awaited(VM.wait_ready)
    run = awaited(VM.run)

    @signature_of(VM.popen)
    async def popen(self, *args: Any, **options: Any) -> AsyncCommand:
        """See `VM.popen`."""
        return AsyncCommand(await made_in_thread(Command.close, self.vm.popen, *args, **options))

    push = awaited(VM.push)
    pull = awaited(VM.pull)
    clock = awaited(VM.clock)
    set_clock = awaited(VM.set_clock)

    # --- what is asked of its monitor -------------------------------------------------------------

    status = awaited(VM.status)
    stats = awaited(VM.stats)
    pause = awaited(VM.pause)
    resume = awaited(VM.resume)
    snapshot = awaited(VM.snapshot)
    learn = awaited(VM.learn)
    resize_disk = awaited(VM.resize_disk)
    add_disk = awaited(VM.add_disk)
    add_net = awaited(VM.add_net)
    add_rng = awaited(VM.add_rng)
    share = awaited(VM.share)
    unshare = awaited(VM.unshare)
    remove_disk = awaited(VM.remove_disk)
    remove_net = awaited(VM.remove_net)
    remove_rng = awaited(VM.remove_rng)
    wait_for_driver = awaited(VM.wait_for_driver)

    @signature_of(VM.events)
    async def events(self, *args: Any, **options: Any) -> AsyncIterator[Event]:
        """See `VM.events`."""
        events = await in_thread(self.vm.events, *args, **options)
        while (event := await in_thread(next, events, None)) is not None:
            yield event

    @property
    def balloon(self) -> AsyncBalloonControl:
        """See `VM.balloon`."""
        return AsyncBalloonControl(self.vm.balloon)


class AsyncCommand(Asynchronous[Command]):
    """A `Command`, with coroutines. Cancelling `read` or `wait` does not end the command; leaving
    its `async with` block does."""

    def __init__(self, command: Command) -> None:
        """`AsyncVM.popen` makes one."""
        super().__init__(command)
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
        return self._held.args

    @property
    def returncode(self) -> int | None:
        return self._held.returncode

    @property
    def pid(self) -> int | None:
        return self._held.pid

    async def read(self, timeout: float | None = None) -> Output | None:
        """See `Command.read`; after `timeout` seconds it raises TimeoutError."""
        async with asyncio.timeout(timeout):
            while not self._pending:
                if self.returncode is not None:
                    return None
                await _readable(self._held.fileno(), self._held.deadline)
                self._pending = await in_thread(self._held.receive)
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

    write = awaited(Command.write)
    close_stdin = awaited(Command.close_stdin)
    kill = awaited(Command.kill)
    resize = awaited(Command.resize)

    def close(self) -> None:
        """See `Command.close`."""
        self._held.close()


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


class AsyncBalloonControl(Asynchronous[BalloonControl]):
    """`VM.balloon`, with coroutines."""

    set = awaited(BalloonControl.set)
    stats = awaited(BalloonControl.stats)


class AsyncConsole(Asynchronous[Console]):
    """`VM.console`, with coroutines."""

    expect = awaited(Console.expect)
    expect_exact = awaited(Console.expect_exact)
    send = awaited(Console.send)
    sendline = awaited(Console.sendline)
    sendcontrol = awaited(Console.sendcontrol)

    @property
    def before(self) -> Any:
        return self._held.before

    @property
    def after(self) -> Any:
        return self._held.after

    @property
    def match(self) -> Any:
        return self._held.match

    @property
    def text(self) -> str:
        return self._held.text

    def tail(self, lines: int = TAIL_LINES) -> str:
        """See `Console.tail`."""
        return self._held.tail(lines)
