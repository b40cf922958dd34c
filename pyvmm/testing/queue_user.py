"""The part of a mock driver that uses queues which are set up, over any transport."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pyvmm.testing.ring import Buffer, Chain, MockDriver, Used


class QueueUser(ABC):
    """Sends requests through `queues` and waits for them; how to notify and to wait is the
    transport's."""

    def __init__(self) -> None:
        self.queues: list[MockDriver] = []
        # Returned while somebody waited for another chain: by queue and head.
        self._early: dict[tuple[int, int], Used] = {}

    @abstractmethod
    def kick(self, index: int = 0) -> None:
        """Notify the device that queue `index` has new buffers."""

    @abstractmethod
    def _wait_for_buffer(self, index: int) -> None:
        """Wait until the device has returned a buffer in queue `index`. Raises DriverTimeout."""

    def submit(
        self,
        index: int,
        readable: Sequence[bytes | Buffer] = (),
        writable: Sequence[int | Buffer] = (),
        *,
        indirect: bool = False,
    ) -> Chain:
        """Make one chain available in queue `index`, and kick if the device wants to know."""
        chain = self.queues[index].add(readable, writable, indirect=indirect)
        self._early.pop((index, chain.head), None)  # of an earlier chain with the same head
        if self.queues[index].publish():
            self.kick(index)
        return chain

    def request(
        self,
        index: int,
        readable: Sequence[bytes | Buffer] = (),
        writable: Sequence[int | Buffer] = (),
        *,
        indirect: bool = False,
    ) -> tuple[int, bytes]:
        """Submit a chain and wait for it: (used length, contents of the writable buffers)."""
        chain = self.submit(index, readable, writable, indirect=indirect)
        used = self.wait_used(index, chain)
        return used.written, self.queues[index].contents(chain)

    def wait_used(self, index: int, chain: Chain | None = None) -> Used:
        """The next element that the device returns in queue `index`; the one of `chain` if given.

        Raises DriverTimeout with a dump of the state if there is none for a minute, or at once if
        the transport can tell that there will be none.
        """
        queue = self.queues[index]
        while True:
            if chain is not None and (index, chain.head) in self._early:
                return self._early.pop((index, chain.head))
            self._wait_for_buffer(index)
            used = queue.pop_used()
            assert used is not None
            if chain is None or used.head == chain.head:
                return used
            self._early[index, used.head] = used
