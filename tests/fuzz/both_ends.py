"""Our vhost-user front end before a back end that serves: ours in a thread, or a scripted one with
a state of its own. Connections end at any moment, drivers begin anew, queues are reset, the device
is saved and goes on as another one.

What happens first in two threads is not drawn from the case's random numbers, so a case need not
go the same way twice. It raises AssertionError, with the steps so far, if a request is neither
answered rightly nor refused, if anything hangs, or if a thread is left.
"""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any

import front_end_rig as rig
from vhost_user_rig import Echo

from pyvmm.errors import PyvmmError
from pyvmm.host.saved import Saved
from pyvmm.testing.mmio_driver import NEEDS_RESET, SAFETY_TIMEOUT, Ring
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.vhost_user.device import VhostUserDevice
from pyvmm.virtio.vhost_user.served import Served

SIZE = 13  # of the configuration
REFUSED = b"refused!"


def _refuse(queue: Queue) -> None:
    for chain in queue:
        writer = chain.writer()
        writer.write(REFUSED[: writer.available])
        queue.add_used(chain, writer.written)


class _Case:
    """A driver, the device of our front end, and a place where back ends are."""

    def __init__(self, rng: Random, ring: Ring, closing: ExitStack) -> None:
        self.rng, self.ring, self.closing = rng, ring, closing
        self.steps: list[str] = []
        folder = closing.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        self.path = Path(folder) / "s"
        self.served = Served(
            42,
            2,
            features=0xFF,
            config_size=SIZE,
            needs_config=rng.random() < 0.5,
            resumes=rng.random() < 0.8,
            refuse=_refuse if rng.random() < 0.7 else None,
            is_stateless=True,
        )
        self.reconnect = rng.choice((0.0, 0.05, SAFETY_TIMEOUT))
        packed = ring == "packed"
        self.connections: list[Any] = closing.enter_context(
            rig.in_thread(lambda: Echo((16, 16), packed=packed), self.path)
        )
        self.front = closing.enter_context(
            rig.front(self.path, self.served, reconnect=self.reconnect, ring=ring)
        )
        self.device: VhostUserDevice = self.front.device
        self.driver = self.front.driver

    def note(self, step: str) -> None:
        self.steps.append(step)

    @property
    def has_failed(self) -> bool:
        return bool(self.driver.mmio.status & NEEDS_RESET)

    def ask(self) -> None:
        """Some requests, of which each is answered."""
        queue = self.rng.randrange(2)
        data = self.rng.randbytes(8)
        driver = self.driver.mmio
        count = self.rng.choice((1, 1, 4))
        self.note(f"{count} requests in queue {queue}")
        if self.has_failed or not driver.queues:
            return
        with suppress(RuntimeError, MemoryError):
            chains = [driver.submit(queue, [data], [8]) for _ in range(count)]
            if self.rng.random() < 0.5:
                self.cut()
            ring = driver.queues[queue]
            for chain in chains:
                rig.until(lambda: ring.has_used() or self.has_failed, lambda: str(self.steps))
                if self.has_failed:
                    return
                used = ring.pop_used()
                assert used is not None and used.written == 8
                assert ring.contents(chain)[:8] in (data, REFUSED)

    def cut(self) -> None:
        """The back end takes it that its front end has gone: it stops its rings, and goes."""
        self.note("cut")
        for connection in self.connections[-1:]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
            # Until then it takes kicks, which nobody else hears of.
            rig.until(lambda ended=connection: ended.fileno() < 0)

    def write_config(self) -> None:
        if not self.has_failed:
            self.note("the configuration")
            self.device.write_config(self.rng.randrange(SIZE + 2), self.rng.randbytes(1))
            self.device.read_config(self.rng.randrange(SIZE), 4)

    def begin(self) -> None:
        self.note("begun anew")
        self.driver.mmio.reset()
        with suppress(AssertionError):  # where no back end is left
            self.driver.mmio.start()

    def renew(self) -> None:
        if self.has_failed or not self.driver.mmio.queues:
            return
        self.note("a queue is reset")
        try:
            self.driver.mmio.reset_queue(self.rng.randrange(2), self.rng.choice((4, 8)))
        except AssertionError:
            assert self.has_failed

    def look(self) -> None:
        self.device.look()
        self.device.stats()
        with suppress(PyvmmError):
            self.driver.transport.negotiation.memory_changed()

    def save(self) -> None:
        """It is saved, and goes on as another one in front of the same driver."""
        self.note("saved")
        try:
            state = rig.saved_of(self.driver)
        except PyvmmError:
            return
        if self.rng.random() < 0.3:
            return
        self.driver.transport.close()
        self.device.close()
        assert self.driver._irqfd is not None
        try:
            self.device = VhostUserDevice(
                str(self.path), self.served, name="front", queue_size=16,
                reconnect=self.reconnect, patience=SAFETY_TIMEOUT, log=self.front.lines.append,
            )  # fmt: skip
            if self.ring == "packed":
                self.device.features |= 1 << 34
        except PyvmmError as error:  # nobody listens any more
            raise _Ended(str(error)) from None
        self.closing.callback(self.device.close)
        transport = MmioTransport(
            self.device, self.driver.memory, self.driver.irq,
            irq_eventfd=self.driver._irqfd.eventfd, log=self.driver.log.append,
        )  # fmt: skip
        self.closing.callback(transport.close)
        self.driver.transport = transport
        self.driver.mmio.registers = transport.registers
        try:
            transport.restore(Saved(state, "front"))
        except PyvmmError as error:
            assert "\n" not in str(error)
            self.begin()

    def run(self) -> None:
        ways: tuple[Callable[[], None], ...] = (
            self.ask, self.ask, self.ask, self.cut, self.write_config, self.begin, self.renew,
            self.look, self.save,
        )  # fmt: skip
        for _ in range(self.rng.randint(1, 8)):
            self.rng.choice(ways)()
        self.driver.mmio.reset()
        assert self.driver.mmio.status == 0


class _Ended(Exception):
    """There is nothing left to try."""


def both_ends_case(rng: Random, ring: Ring) -> int:
    """One front end and its back ends; how many steps there were."""
    threads = threading.active_count()
    with ExitStack() as closing:
        case = _Case(rng, ring, closing)
        try:
            case.run()
        except _Ended:
            pass
        except BaseException as error:
            error.add_note("\n".join([*case.steps, *case.front.lines, *case.driver.log]))
            raise
    rig.until(lambda: threading.active_count() <= threads, lambda: str(threading.enumerate()))
    return len(case.steps)
