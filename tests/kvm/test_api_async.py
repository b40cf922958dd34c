"""`AsyncVM` on a guest that echoes, on real KVM: nothing blocks, and cancelling is honest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from echo_guest import echo_kernel, stop_process

from pyvmm import AsyncVM, GuestPanic
from pyvmm.control import registry
from pyvmm.kvm.system import Kvm
from pyvmm.machine.outcome import Ending

SAFETY_TIMEOUT = 60


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    return tmp_path


@pytest.fixture
def kernel(kvm: Kvm, tmp_path: Path) -> str:
    return echo_kernel(tmp_path)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(SAFETY_TIMEOUT):
            await test()

    asyncio.run(limited())


def test_two_start_and_are_talked_to_at_the_same_time(kernel):
    async def main() -> None:
        async def talk(word: str) -> str:
            async with AsyncVM(kernel=kernel, kvm="host") as vm:
                await vm.console.expect("ready")
                await both_are_ready.wait()
                await vm.console.sendline(word)
                await vm.console.expect_exact(word)
                return vm.name

        both_are_ready = asyncio.Barrier(2)
        assert set(await asyncio.gather(talk("first"), talk("second"))) == {"vm", "vm-2"}

    run(main)
    assert registry.running() == []


def test_what_is_cancelled_has_ended_then(kernel):
    async def main() -> None:
        async with AsyncVM(kernel=kernel, kvm="host") as vm:
            await vm.console.expect("ready")
            waiting = [
                asyncio.create_task(vm.console.expect("never", timeout=None)),
                asyncio.create_task(vm.wait()),
            ]
            await asyncio.sleep(0.05)
            for task in waiting:
                task.cancel()
            assert all(
                isinstance(one, asyncio.CancelledError)
                for one in await asyncio.gather(*waiting, return_exceptions=True)
            )
            # Nothing that the cancelled one would have read is lost, and nobody holds the console.
            await vm.console.send("go on")
            await vm.console.expect("go on")
            assert vm.outcome is None

    run(main)


def test_a_start_that_is_cancelled_leaves_nothing(kernel):
    async def main() -> None:
        for pause in (0.0, 0.05, 0.15, 0.25):
            vm = AsyncVM(kernel=kernel, kvm="host")
            starting = asyncio.create_task(vm.start())
            await asyncio.sleep(pause)
            starting.cancel()
            try:
                await starting
                await vm.stop()  # it was quick
            except asyncio.CancelledError:
                pass
            assert vm.outcome is not None or vm.vm._monitor is None
            assert registry.running() == []

    run(main)


def test_the_loop_goes_on_while_a_vm_is_waited_for(kernel):
    async def main() -> None:
        async with AsyncVM(kernel=kernel, kvm="host") as vm:
            await vm.console.expect("ready")
            turns = 0

            async def turn() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            turning = asyncio.create_task(turn())
            waiting = asyncio.create_task(vm.wait())
            await vm.pause()
            assert (await vm.status())["state"] == "paused"
            await vm.resume()
            await vm.console.send("O")
            assert (await waiting).ending is Ending.POWEROFF
            assert turns > 100
            turning.cancel()

    run(main)


def test_errors_are_those_of_a_vm(kernel):
    async def main() -> None:
        async with AsyncVM(kernel=kernel, kvm="host") as vm:
            await vm.console.expect("ready")
            await vm.console.send("P")
            with pytest.raises(GuestPanic):
                await vm.console.expect("never")
            with pytest.raises(GuestPanic):
                await vm.pause()

    run(main)


def test_events_are_iterated_and_cancelled(kernel):
    async def main() -> None:
        async with AsyncVM(kernel=kernel, kvm="host") as vm:
            seen = []

            async def look() -> None:
                async for event in vm.events():
                    seen.append(event.kind)

            cancelled = asyncio.create_task(look())
            while not seen:
                await asyncio.sleep(0.01)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            looking = asyncio.create_task(look())
            while len(seen) < 2:
                await asyncio.sleep(0.01)
            await vm.pause()
            await vm.stop()
            await looking
            assert seen == ["started", "started", "paused", "ended"]

    run(main)


def test_attaching(kernel):
    async def main() -> None:
        async with AsyncVM(kernel=kernel, kvm="host") as vm:
            await vm.console.expect("ready")
            async with await AsyncVM.attach(vm.name) as same:
                await same.console.expect("ready")
            assert (await vm.status())["state"] == "running"

    run(main)


def test_a_monitor_that_stands_still_does_not_hold_up_a_cancellation(kernel):
    async def main() -> None:
        async with AsyncVM(kernel=kernel, kvm="host") as vm:
            stop_process(vm.pid)
            for ask in (lambda: vm.run(["true"]), vm.wait_ready, vm.status, vm.clock):
                begin = time.monotonic()
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await ask()
                assert time.monotonic() - begin < 15, "it waited for the monitor"
            await vm.kill()

    run(main)
