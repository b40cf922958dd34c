"""Frames from the driver to the backend: one transmit queue.

Virtio 1.3, 5.1.6.2 Packet Transmission. The payload is never copied; the header is, so that what is
checked is what is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pyvmm.errors import DriverError, HostError
from pyvmm.virtio.net.backend import Channel
from pyvmm.virtio.net.counters import Counters
from pyvmm.virtio.net.header import HEADER_SIZE, TransmitCheck
from pyvmm.virtio.queue.chain import DescriptorChain
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.worker import FOR_SOURCE, Rest

if TYPE_CHECKING:
    from pyvmm.virtio.net.limits import Limits


# After so many the driver gets to see that they are sent, and it is looked whether something came.
BATCH_BYTES = 128 << 10


class Transmitter:
    """One transmit queue. `link_up` says whether frames go anywhere."""

    def __init__(
        self,
        channel: Channel,
        check: TransmitCheck,
        link_up: Callable[[], bool],
        counters: Counters,
        note: Callable[[int, str], None] | None,
        limits: Limits | None = None,
    ) -> None:
        self._channel = channel
        self._send = channel.send
        self._check = check
        self._link_up = link_up
        self._counters = counters
        self._note = note
        self._limits = limits

    def serve(self, queue: Queue) -> Rest | None:
        """Send what is in the ring. Raises LinkLost; the frame at hand is then back in the ring."""
        channel = self._channel
        if channel.unsent:
            channel.flush()
            if channel.unsent:
                return FOR_SOURCE
        budget = BATCH_BYTES
        counters, note, limits = self._counters, self._note, self._limits
        for chain in queue:
            length = chain.readable_size - HEADER_SIZE
            if limits is not None and (wait := limits.take(length)):
                queue.step_back()
                return Rest(kicks=False, seconds=wait, sources=False)
            why = None
            try:
                why = self._carry_out(queue, chain, length)
            finally:
                if why is None and limits is not None:
                    limits.give_back(length)
            if why is None:
                return FOR_SOURCE
            queue.add_used(chain, 0)
            if why:
                counters.drop(why)
            else:
                counters.frames += 1
                counters.bytes += length
            if note is not None:
                note(length, why)
            budget -= length
            if budget <= 0:
                break
        # The frame that is kept back goes out first, so no kick is needed until then.
        return FOR_SOURCE if channel.unsent else None

    def _carry_out(self, queue: Queue, chain: DescriptorChain, length: int) -> str | None:
        """Send the frame. Return "", why it went nowhere, or None if it has to wait in the ring."""
        if not self._link_up():
            return "the link is down"
        try:
            header, frame = _split(chain)
        except DriverError:
            return "no whole header, or not in RAM"
        checked = self._check(header, length)
        if isinstance(checked, str):
            return checked
        try:
            if self._send(checked, frame, length):
                return ""
        except HostError:
            return "the host did not take it"
        except BaseException:
            queue.step_back()
            raise
        queue.step_back()
        return None


def _split(chain: DescriptorChain) -> tuple[bytes, list[memoryview]]:
    """A copy of the header, and the frame in place. Raises DriverError."""
    ram = chain.ram
    parts = chain.readable
    if parts and parts[0][1] == HEADER_SIZE:  # Linux's driver, where it has no headroom
        header = bytes(ram.readable(parts[0]))
        return header, [ram.readable(part) for part in parts[1:]]
    if parts and parts[0][1] > HEADER_SIZE:  # and where it has
        first = ram.readable(parts[0])
        frame = [first[HEADER_SIZE:]]
        if len(parts) > 1:
            frame += [ram.readable(part) for part in parts[1:]]
        return bytes(first[:HEADER_SIZE]), frame
    reader = chain.reader()
    return reader.read(HEADER_SIZE), reader.take(reader.available)
