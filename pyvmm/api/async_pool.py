"""The same pool for asyncio.

async with AsyncPool("ready", 4) as pool:
    async with await pool.take() as vm:
        print((await vm.run(["hostname"])).stdout)
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

from pyvmm.api.aio import AsyncVM, end
from pyvmm.api.cancellation import in_thread, made_in_thread
from pyvmm.api.errors import VMError
from pyvmm.api.pool import Pool, check_pool
from pyvmm.api.signatures import signature_of
from pyvmm.api.vm import VM


class AsyncPool:
    """A `Pool` whose methods are coroutines; the VMs that it gives are `AsyncVM`s. It is opened by
    `open` or by entering an `async with` block, at whose end it is closed."""

    @signature_of(Pool.__init__)
    def __init__(self, snapshot: str, size: int = 1, **options: Any) -> None:
        """Takes what `Pool` takes, and does nothing yet. Raises ConfigError for arguments that
        cannot be."""
        check_pool(
            snapshot,
            size,
            kvm=options.get("kvm", "auto"),
            confine=options.get("confine", "auto"),
        )
        self.snapshot, self.size = snapshot, size
        self._options = options
        self._pool: Pool | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def open(self) -> Self:
        """Begin to fill it. Raises as `Pool` does, VMError for one that has been open before."""
        async with self._opening:
            if self._pool is not None or self._closed:
                raise VMError("the pool has been opened before")
            self._pool = await made_in_thread(
                Pool.close, Pool, self.snapshot, self.size, **self._options
            )
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def pool(self) -> Pool:
        """The pool itself. Raises VMError before it is opened."""
        if self._pool is None:
            raise VMError("the pool is closed" if self._closed else "the pool is not open yet")
        return self._pool

    @property
    def is_elsewhere(self) -> bool:
        return self._pool is not None and self._pool.is_elsewhere

    @property
    def ready(self) -> int:
        """See `Pool.ready`; 0 before it is opened."""
        return 0 if self._pool is None else self._pool.ready

    @signature_of(Pool.wait_ready)
    async def wait_ready(self, *args: Any, **options: Any) -> None:
        """See `Pool.wait_ready`."""
        await in_thread(self.pool.wait_ready, *args, **options)

    @signature_of(Pool.take)
    async def take(self, *args: Any, **options: Any) -> AsyncVM:
        """See `Pool.take`. If it is cancelled, no VM is left of it."""
        return AsyncVM.of(await made_in_thread(VM.kill, self.pool.take, *args, **options))

    async def close(self) -> None:
        """See `Pool.close`. One that is being opened is closed as soon as it is open."""
        if self.is_elsewhere:
            return
        async with self._opening:
            self._closed = True
            if self._pool is not None:
                await end(Pool.close, self._pool)
