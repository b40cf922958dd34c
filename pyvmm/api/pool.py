"""VMs that stand ready: each goes on from the same snapshot as soon as somebody takes it.

    with Pool("ready", 4) as pool:
        with pool.take() as vm:
            print(vm.run(["hostname"]).stdout)

A VM that waits is a process whose machine is put together and paused before its first instruction;
to take it is one request. `pyvmm.api.template` makes the processes.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from functools import partial
from threading import Condition, Thread
from typing import NamedTuple

from pyvmm.api.cancellation import check, woken_by
from pyvmm.api.clones import MOST, introduce
from pyvmm.api.errors import VMError, VMTimeout, check_owner
from pyvmm.api.monitor import START_SECONDS
from pyvmm.api.template import ForkedMonitor, Template
from pyvmm.api.vm import VM
from pyvmm.control.client import Client
from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.host.syscalls import Closable
from pyvmm.monitor import snapshots
from pyvmm.spec.names import check_name
from pyvmm.spec.options import own_row, read_own
from pyvmm.spec.surroundings import read_surroundings

_WHAT = "this pool"
_FAILURES = 3  # without one that was taken, after which no more are made until somebody asks
_TAKE_SECONDS = 10.0  # that a VM has to hear that it is wanted
_LEAST = 1.0  # of them, also for who does not want to wait for one that is not there
_END_SECONDS = 10.0  # and to end, if nobody wants it


class _Waiting(NamedTuple):
    """A VM that waits, and a connection to its monitor."""

    monitor: ForkedMonitor
    client: Client


def check_pool(snapshot: str, size: int, *, kvm: str = "auto", confine: str = "auto") -> None:
    """Raise ConfigError for a name, a number of VMs or another argument that cannot be."""
    if not 1 <= size <= MOST:
        raise ConfigError(f"a pool of {size} VMs cannot be had", cure=f"use 1 to {MOST}")
    check_name(snapshot, option="")
    for name, value in {"kvm": kvm, "confine": confine}.items():
        read_own(own_row(name), value)


class Pool(Closable):
    """Up to `size` VMs that wait at one snapshot; one that is taken is replaced. Any thread may use
    it. It is closed by `close`, or at the end of a `with` block."""

    def __init__(
        self,
        snapshot: str,
        size: int = 1,
        *,
        kvm: str = "auto",
        confine: str = "auto",
        refill: bool = True,
    ) -> None:
        """Begins to fill at once; without `refill` those that are taken are not replaced. Raises
        ConfigError for a snapshot that is not there or cannot be used, and for other arguments that
        cannot be; VMError, HostError."""
        check_pool(snapshot, size, kvm=kvm, confine=confine)
        self.snapshot, self.size = snapshot, size
        self._refill = refill
        self._taken = 0
        self._owner = os.getpid()
        self._changed = Condition()
        self._waiting: deque[_Waiting] = deque()
        self._making: list[ForkedMonitor] = []
        self._made = 0
        self._failures = 0
        self._failure: Exception | None = None
        self._closed = False
        with snapshots.kept(snapshot) as self._original:
            snapshots.copy_of(self._original, snapshot)  # or say why it cannot be copied
            self._template = Template(self._original, kvm, read_surroundings({"confine": confine}))
        self._thread = Thread(target=self._fill, name="pyvmm pool", daemon=True)
        self._thread.start()

    @property
    def is_elsewhere(self) -> bool:
        """True if it belongs to the process that this one was forked from."""
        return os.getpid() != self._owner

    @property
    def ready(self) -> int:
        """The number of VMs that wait."""
        return len(self._waiting)

    def take(self, timeout: float = START_SECONDS) -> VM:
        """A VM that runs from now on, and is the caller's: it ends with its `with` block, or by
        `stop`. It waits for one if there is none.

        Raises VMTimeout after `timeout` seconds, in which its guest has become a machine of its own
        as well, VMError if the pool is closed, and why none can be
        made if that is so.
        """
        deadline = time.monotonic() + timeout
        while True:
            monitor, client = self._next(deadline)
            try:
                with woken_by(partial(monitor.signal, signal.SIGKILL)):
                    left = max(_LEAST, deadline - time.monotonic())
                    if not _goes_on(client, min(left, _TAKE_SECONDS)):
                        monitor.end()  # it has ended while it waited
                        with self._changed:
                            self._taken -= 1
                            self._changed.notify_all()
                        continue
                    self._failures = 0
                    introduce(monitor, self._original, deadline)
                    check()
            except BaseException:
                monitor.end()
                raise
            return VM._copy(monitor)

    def wait_ready(self, timeout: float = START_SECONDS) -> None:
        """Wait until there is one that waits. Raises as `take` does."""
        self._next(time.monotonic() + timeout, taken=False)

    def _next(self, deadline: float, *, taken: bool = True) -> _Waiting:
        check_owner(self._owner, _WHAT)
        with woken_by(self._wake), self._changed:
            while True:
                if self._closed:
                    raise VMError("the pool is closed")
                if self._waiting:
                    if not taken:
                        return self._waiting[0]
                    self._changed.notify_all()
                    self._taken += 1
                    return self._waiting.popleft()
                if not (self._wanted or self._making):
                    raise VMError("all VMs of the pool have been taken")
                if self._failures >= _FAILURES and not self._making:
                    failure, self._failures = self._failure, 0
                    self._changed.notify_all()
                    raise failure or VMError("the VMs of the pool end while they wait")
                check()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise VMTimeout("no VM of the pool was ready in time")
                self._changed.wait(left)

    @property
    def _wanted(self) -> int:
        """The number of VMs that are missing."""
        taken = 0 if self._refill else self._taken
        return self.size - taken - len(self._waiting)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End all that wait, and their common process as soon as those have ended that were taken.
        In a forked process nothing happens."""
        if self.is_elsewhere:
            return
        with self._changed:
            self._closed = True
            waiting = [*self._waiting]
            self._waiting.clear()
            for monitor in self._making:
                monitor.signal(signal.SIGTERM)
            self._changed.notify_all()
        for one in waiting:
            one.client.close()
        _end([one.monitor for one in waiting])
        self._thread.join()
        self._template.close()

    # --- the thread that fills it -----------------------------------------------------------------

    def _fill(self) -> None:
        while self._wait_until_wanted():
            try:
                self._make()
            except Exception as error:
                with self._changed:
                    self._failures, self._failure = self._failures + 1, error
            finally:
                with self._changed:
                    self._making.clear()
                    self._changed.notify_all()

    def _wait_until_wanted(self) -> bool:
        """False once it is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._wanted > 0 and self._failures < _FAILURES)
            )
            return not self._closed

    def _make(self) -> None:
        """Those that are missing: first all begin, then each is waited for."""
        begun: list[ForkedMonitor] = []
        try:
            for _ in range(self._wanted):
                begun.append(monitor := self._begin())
                with self._changed:
                    self._making.append(monitor)
                    if self._closed:
                        return
            while begun:
                begun[0].await_start(START_SECONDS)
                client = Client.connect(begun[0].name)
                monitor = begun.pop(0)
                with self._changed:
                    self._making.remove(monitor)
                    if not self._closed:
                        self._waiting.append(_Waiting(monitor, client))
                        self._changed.notify_all()
                    else:
                        client.close()
                        begun.append(monitor)
                        return
                monitor.on_end(partial(self._has_ended, monitor))
        finally:
            _end(begun)

    def _begin(self) -> ForkedMonitor:
        self._made += 1
        name = f"{self.snapshot}-{self._made}"
        spec = snapshots.copy_of(self._original, name, waits=True)
        return self._template.fork(spec, name)

    def _has_ended(self, monitor: ForkedMonitor) -> None:
        with self._changed:
            gone = [one for one in self._waiting if one.monitor is monitor]
            for one in gone:
                self._waiting.remove(one)
                self._failures += 1
            self._changed.notify_all()
        for one in gone:
            one.client.close()


def _goes_on(client: Client, patience: float) -> bool:
    """False if the VM at the other end of `client`, which it closes, has ended."""
    try:
        client.call("resume", patience=patience)
    except PyvmmError:
        return False
    finally:
        client.close()
    return True


def _end(monitors: list[ForkedMonitor]) -> None:
    """Have them end, and wait until they have; one that does not is killed."""
    for monitor in monitors:
        monitor.signal(signal.SIGTERM)
    for monitor in monitors:
        try:
            monitor.wait(_END_SECONDS)
        except VMTimeout:
            monitor.end()
