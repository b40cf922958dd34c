"""A machine that stands still: vCPUs parked, queues held, no byte of guest memory changing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from pyvmm.errors import ConfigError
from pyvmm.machine.vcpu_runner import ENDING, VcpuRunner
from pyvmm.transport.base import Transport
from pyvmm.virtio.queue.protocol import Queue

PATIENCE = 2.0  # seconds in which everything comes to rest, or the pause is called off


class Pauser:
    """Pauses and resumes a machine; any thread may ask, and the last one wins.

    The order matters: parked vCPUs change no device's state, so its queues stay what they are while
    they are held. Whoever touches guest memory for a queue holds its lock.
    """

    def __init__(self, runners: Sequence[VcpuRunner], transports: Sequence[Transport]) -> None:
        self._runners = runners
        self._transports = transports
        self._lock = Lock()
        self._held: list[Queue] = []
        self._ended = False
        self.ending = False  # soon, by `end`
        self.before_first: Callable[[], None] | None = None  # called when it first goes on
        self.paused = False

    def pause(self) -> None:
        """Have the machine stand still, and return when it does; a paused one stays as it is.

        Raises ConfigError if something is busy for too long; the machine then runs on.
        """
        with self._lock:
            if self._ended:
                raise ConfigError(ENDING)
            if not self.paused:
                self._stand_still()

    def _stand_still(self) -> None:
        deadline = time.monotonic() + PATIENCE
        try:
            self._park(deadline)
            self._hold(deadline)
        except BaseException:
            self._go_on()
            raise
        self.paused = True

    @contextmanager
    def still(self) -> Iterator[None]:
        """The machine stands still inside, whoever asks for what meanwhile; then it is as it was:
        it runs, or is paused, unless it is `ending`: then it never runs again, and whoever holds it
        still is to be quick. Raises ConfigError as `pause` does."""
        with self._lock:
            if self._ended or self.ending:
                raise ConfigError(ENDING)
            was = self.paused
            if not was:
                self._stand_still()
            try:
                yield
            finally:
                if not was and not self.ending:
                    self._go_on()

    def exchange(self, transports: Sequence[Transport]) -> None:
        """These are the machine's from now on."""
        with self._lock:
            self._transports = transports

    def resume(self) -> None:
        """Have the machine go on; one that runs goes on in any case."""
        with self._lock:
            self._go_on()

    def end(self) -> None:
        """Let go of everything, so that it can be stopped, and never pause again."""
        with self._lock:
            self._ended = True
            self._release()

    def _park(self, deadline: float) -> None:
        for runner in self._runners:
            runner.request_pause()
        for runner in self._runners:
            if not runner.wait_parked(deadline - time.monotonic()):
                raise ConfigError(
                    f"vCPU {runner.id} does not come to rest",
                    cure="does anybody read the guest's console?",
                )

    def _hold(self, deadline: float) -> None:
        for transport in self._transports:
            # The last first: it may be a control queue, whose commands start and stop the others
            # and take their locks for that.
            for queue in reversed(transport.negotiation.active_queues):
                if not queue.claim(max(0.0, deadline - time.monotonic())):
                    raise ConfigError(
                        f"{transport.device.name} does not come to rest",
                        cure="its storage or network takes long",
                    )
                self._held.append(queue)

    def _go_on(self) -> None:
        before, self.before_first = self.before_first, None
        if before is not None:
            before()
        self._release()
        for runner in self._runners:
            runner.resume()

    def _release(self) -> None:
        while self._held:
            queue = self._held.pop()
            queue.lock.release()
            queue.kick.signal()  # its worker may have left something in the ring
        self.paused = False
