"""`AsyncPool` on a guest that echoes, on real KVM: as a `Pool`, and what is cancelled leaves
nothing."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from echo_guest import echo_kernel, stop_process

from pyvmm import VM, AsyncPool, AsyncVM
from pyvmm.api import cancellation
from pyvmm.api.errors import VMError, VMTimeout
from pyvmm.api.pool import Pool
from pyvmm.control import registry
from pyvmm.control import snapshot_store as store
from pyvmm.errors import ConfigError
from pyvmm.kvm.system import Kvm

SAFETY_TIMEOUT = 120


@pytest.fixture
def ready(kvm: Kvm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a snapshot, whose VM has gone."""
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    kernel = echo_kernel(tmp_path)
    with VM(kernel=kernel, name="one", kvm="host", memory="64M", vsock=False) as vm:
        vm.console.expect_exact("ready", timeout=SAFETY_TIMEOUT)
        vm.snapshot("ready", stop=True)
        vm.wait(SAFETY_TIMEOUT)
    return "ready"


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(SAFETY_TIMEOUT):
            await test()

    asyncio.run(limited())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def nothing_is_left(ready: str) -> None:
    assert registry.running() == []
    deadline = time.monotonic() + SAFETY_TIMEOUT
    while True:  # a process that ends holds the snapshot for moments after it has told its end
        try:
            store.remove(ready)
            return
        except ConfigError:
            assert time.monotonic() < deadline, "somebody holds the snapshot"
            time.sleep(0.01)


def test_it_is_taken_from_by_several_at_once_and_fills_again(ready: str) -> None:
    async def use(pool: AsyncPool, word: str) -> str:
        async with await pool.take() as vm:
            assert isinstance(vm, AsyncVM)
            await vm.console.send(word)
            await vm.console.expect_exact(word)
            return vm.name

    async def main() -> None:
        pool = AsyncPool(ready, 2, kvm="host")
        assert (pool.snapshot, pool.size, pool.ready) == (ready, 2, 0)
        with pytest.raises(VMError, match="not open yet"):
            await pool.take()
        async with pool:
            names = await asyncio.gather(*(use(pool, word) for word in ("one", "two", "three")))
            assert len(set(names)) == 3
            await until(lambda: pool.ready == 2)
            assert isinstance(pool.pool, Pool) and len(registry.running()) == 2
            with pytest.raises(VMError, match="opened before"):
                await pool.open()
        with pytest.raises(VMError, match="the pool is closed"):
            await pool.take()
        await pool.close()

    run(main)
    nothing_is_left(ready)


def test_one_that_is_waited_for_in_vain_or_cancelled(ready: str) -> None:
    async def main() -> None:
        async with AsyncPool(ready, 1, kvm="host") as pool:
            await until(lambda: pool.ready == 1)
            # Nothing more can be made.
            stop_process(pool.pool._template.pid)
            async with await pool.take():
                with pytest.raises(VMTimeout):
                    await pool.take(timeout=0.05)
                waiting = asyncio.create_task(pool.take())
                await asyncio.sleep(0.05)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            os.kill(pool.pool._template.pid, 9)

    run(main)
    nothing_is_left(ready)


def test_a_take_that_is_cancelled_leaves_no_vm(ready: str) -> None:
    """Whenever it is cancelled: also when the VM goes on already, and when it is handed over."""

    async def main() -> None:
        async with AsyncPool(ready, 1, kvm="host") as pool:
            for turns in (0, 1, 2, 5, 20, 100, 500):
                await until(lambda: pool.ready == 1)
                waiting = set(registry.running())
                taking = asyncio.create_task(pool.take())
                for _ in range(turns):
                    await asyncio.sleep(0)
                taking.cancel()
                try:
                    vm = await taking
                except asyncio.CancelledError:
                    await until(lambda: pool.ready == 1)
                else:  # it was quick
                    waiting.discard(vm.name)
                    await vm.stop(now=True)
                    await until(lambda: pool.ready == 1)
                assert len(registry.running()) == 1

    run(main)
    nothing_is_left(ready)


def test_what_is_there_when_its_call_is_cancelled_is_undone(
    ready: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst moment: the VM is there, and the event loop has not heard of it yet."""
    is_there, go_on = threading.Event(), threading.Event()
    take, given = Pool.take, []

    def slow(pool: Pool, *args: float) -> VM:
        given.append(take(pool, *args))
        is_there.set()
        assert go_on.wait(SAFETY_TIMEOUT)
        return given[0]

    async def main() -> None:
        async with AsyncPool(ready, 1, kvm="host") as pool:
            monkeypatch.setattr(Pool, "take", slow)
            taking = asyncio.create_task(pool.take())
            await until(is_there.is_set)
            for _ in range(2):  # whoever asks twice does not wait, and leaves no more
                taking.cancel()
                await asyncio.sleep(0.01)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await taking
            await until(lambda: given[0].outcome is not None)
            await until(lambda: not cancellation._undoing)

    run(main)
    nothing_is_left(ready)


def test_an_opening_and_clones_that_are_cancelled_leave_nothing(ready: str) -> None:
    async def main() -> None:
        for pause in (0.0, 0.05, 0.15, 0.3):
            pool = AsyncPool(ready, 2, kvm="host")
            opening = asyncio.create_task(pool.open())
            await asyncio.sleep(pause)
            opening.cancel()
            try:
                await opening
            except asyncio.CancelledError:
                assert pool.ready == 0
                assert registry.running() == []
            await pool.close()
        async with await AsyncVM.restore(ready, kvm="host") as vm:
            for pause in (0.0, 0.1, 0.3, 0.5):
                cloning = asyncio.create_task(vm.clones(2))
                await asyncio.sleep(pause)
                cloning.cancel()
                try:
                    for one in await cloning:  # it was quick
                        await one.close()
                except asyncio.CancelledError:
                    pass
                assert registry.running() == [vm.name]

    run(main)
    nothing_is_left(ready)


def test_what_cannot_be_is_refused_and_a_forked_process_closes_nothing(ready: str) -> None:
    for size in (0, 257):
        with pytest.raises(ConfigError, match="1 to 256"):
            AsyncPool(ready, size)
    with pytest.raises(ConfigError, match="has a slash"):
        AsyncPool("../ready")
    for kind in (AsyncPool, Pool):
        with pytest.raises(ConfigError, match="kvm cannot be 'hos'; choose from auto, host"):
            kind(ready, kvm="hos")
        with pytest.raises(ConfigError, match="confine cannot be 'strcit'; choose from auto, str"):
            kind(ready, kvm="host", confine="strcit")

    async def main() -> None:
        with pytest.raises(ConfigError, match="no snapshot 'other'"):
            await AsyncPool("other").open()
        async with AsyncPool(ready, 1, kvm="host") as pool:
            await until(lambda: pool.ready == 1)
            if (pid := os.fork()) == 0:
                closing = pool.close()
                try:
                    closing.send(None)
                except StopIteration:  # at once, without the event loop
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(pid, 0)[1] == 0
            assert pool.ready == 1 and len(registry.running()) == 1

    run(main)
    nothing_is_left(ready)
