"""`AsyncVM` as a type checker, and so an editor, sees it. Nothing here runs: mypy reads it, and
complains of a type that is not this one, and of a comment that silences no error."""

from __future__ import annotations

from typing import Any, assert_type

from pyvmm import AsyncPool, AsyncVM, Clock, Completed, Copied, Info, Outcome
from pyvmm.agent import Output
from pyvmm.api.aio import AsyncBalloonControl, AsyncCommand, AsyncConsole
from pyvmm.api.events import Event


class Mine(AsyncVM):
    """A user's own."""


async def main() -> None:
    vm = AsyncVM("debian", kernel="vmlinuz", cpus=2)
    AsyncVM(kernal="vmlinuz")  # type: ignore[call-arg]
    AsyncVM(cpus="two")  # type: ignore[arg-type]
    async with Mine() as mine:
        assert_type(mine, Mine)
    assert_type(await Mine().start(1.0, detached=True), Mine)
    assert_type(await Mine.attach("vm"), Mine)
    await vm.start(detach=True)  # type: ignore[call-arg]

    assert_type(await vm.run(["ls"], user="nobody", input=b"", check=True), Completed)
    await vm.run(["ls"], users="nobody")  # type: ignore[call-arg]
    await vm.run(["ls"], timeout="1 s")  # type: ignore[arg-type]
    vm.vm.run(["ls"], users="nobody")  # type: ignore[call-arg]
    assert_type(vm.vm.run(["ls"]), Completed)
    async with await vm.popen(["ls"], stdin=True, tty=(24, 80)) as command:
        assert_type(command, AsyncCommand)
        assert_type(await command.write(b"x"), int)
        await command.kill("SIGKILL")  # type: ignore[arg-type]
        async for piece in command.events():
            assert_type(piece, Output)
    await vm.popen(["ls"], check=True)  # type: ignore[call-arg]

    assert_type(await vm.stop(1.0, now=True), Outcome)
    assert_type(await vm.close(), Outcome)
    assert_type(await vm.wait(), Outcome)
    assert_type(await vm.wait_ready(None), Info)
    assert_type(await vm.push("here", "there", timeout=1), Copied)
    assert_type(await vm.set_clock(), Clock)
    assert_type(await vm.status(), dict[str, Any])
    assert_type(await vm.resize_disk("disk0", "1G", shrink=True), int)
    await vm.pause(1)  # type: ignore[call-arg]
    async for event in vm.events(history=False):
        assert_type(event, Event)

    AsyncPool("ready", sizes=2)  # type: ignore[call-arg]
    AsyncPool("ready", kvm=True)  # type: ignore[arg-type]
    async with AsyncPool("ready", 2, kvm="host") as pool:
        assert_type(pool, AsyncPool)
        assert_type(await pool.take(timeout=1.0), AsyncVM)
        await pool.take(time=1.0)  # type: ignore[call-arg]
    await pool.close(1)  # type: ignore[call-arg]

    assert_type(vm.balloon, AsyncBalloonControl)
    await vm.balloon.set(1.5)  # type: ignore[arg-type]
    assert_type(vm.console, AsyncConsole)
    assert_type(await vm.console.expect("login:", timeout=None), int)
    await vm.console.sendline(1)  # type: ignore[arg-type]
