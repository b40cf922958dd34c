"""The virtio socket device: its queues, and one thread that serves them and the host's sockets.

Virtio 1.3, 5.10 Socket Device. Packets go between guest memory and Unix sockets without a copy of
ours, but for what a slow reader on the host has not taken yet.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from pyvmm.errors import DriverError, HostError
from pyvmm.host.log import RateLimited
from pyvmm.host.poller import Poller
from pyvmm.host.saved import Saved
from pyvmm.host.unix_sockets import Socket
from pyvmm.virtio.constants import VIRTIO_ID_VSOCK
from pyvmm.virtio.device import Activation, VirtioDevice
from pyvmm.virtio.features import RING_FEATURES, has, mask
from pyvmm.virtio.queue.chain import DescriptorChain
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.vsock.host_side import HostSide
from pyvmm.virtio.vsock.packet import HEADER, HEADER_BYTES, Counters, Header, PacketEvent
from pyvmm.virtio.vsock.switch import Switch
from pyvmm.virtio.vsock.uapi import (
    CONFIG,
    EVENT,
    FEATURE_NAMES,
    HIGHEST_GUEST_CID,
    LOWEST_GUEST_CID,
    VIRTIO_VSOCK_EVENT,
    VIRTIO_VSOCK_EVENT_TRANSPORT_RESET,
    VIRTIO_VSOCK_F_NO_IMPLIED_STREAM,
    VIRTIO_VSOCK_F_STREAM,
    VIRTIO_VSOCK_RX,
    VIRTIO_VSOCK_TX,
)
from pyvmm.virtio.worker import DeviceWorker

QUEUE_SIZES = (256, 256, 16)
# After so much the driver gets to see what has come, even if there is more.
_BATCH_BYTES = 256 << 10
# Receive buffers that get one stream's data at a time: 64 KiB, with those of Linux.
_TOGETHER = 16


class VsockDevice(VirtioDevice):
    """Sockets between the guest with `guest_cid` and the host's programs.

    `listener` takes the programs' connections; a guest's connection to port N goes to the listener
    at `path`_N. Without them there are only the connections of `call`.
    `trace` gets a `PacketEvent` for each packet; `log` one line for each thing that the guest did
    wrong, and is limited in rate unless given. The listener is not closed.
    """

    device_type = VIRTIO_ID_VSOCK
    queue_sizes = QUEUE_SIZES
    features = RING_FEATURES | mask(VIRTIO_VSOCK_F_STREAM, VIRTIO_VSOCK_F_NO_IMPLIED_STREAM)
    feature_names = FEATURE_NAMES

    def __init__(
        self,
        guest_cid: int,
        listener: Socket | None = None,
        path: str | None = None,
        *,
        name: str = "vsock",
        trace: Callable[[object], None] | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """Raises ValueError for a CID that a guest cannot have."""
        if not LOWEST_GUEST_CID <= guest_cid <= HIGHEST_GUEST_CID:
            raise ValueError(f"CID {guest_cid} is reserved")
        self.name = name
        self._cid = guest_cid
        self._config = CONFIG.pack(guest_cid)
        self._listener = listener
        self._path = path
        self._trace = trace
        self._log = RateLimited(prefix=f"{name}: ", device=name) if log is None else log
        self.counters = Counters()
        self._active: _Active | None = None
        self._interrupted = False
        self._calls: deque[tuple[Socket, int]] = deque()  # for the thread to take

    def read_config(self, offset: int, length: int) -> bytes:
        """struct virtio_vsock_config, zero past its end (5.10.4, 2.5)."""
        return self._config[offset : offset + length].ljust(length, b"\0")

    def stats(self) -> Mapping[str, object]:
        """Streams that are open; packets and bytes of payload, both ways, since the start."""
        active = self._active
        streams = 0 if active is None else active.stream_count
        return {"streams": streams, **asdict(self.counters)}

    def activate(self, activation: Activation) -> None:
        """Start the thread; from now on clients are let in. Raises HostError."""
        active = _Active(self, activation)
        active.worker.start()
        self._active = active

    def reset(self) -> None:
        """Stop the thread and close all streams. Clients that come now wait for the next driver."""
        active, self._active = self._active, None
        if active is not None:
            active.worker.request_stop()
            active.worker.join()

    def reset_queue(self, index: int) -> None:
        """See VirtioDevice. Streams go on; what they have for the guest waits."""
        if self._active is not None:
            self._active.worker.drop_queue(index)

    def start_queue(self, queue: Queue) -> None:
        """See VirtioDevice."""
        assert self._active is not None, "only a live device starts queues"
        self._active.worker.take_queue(queue)

    def save(self) -> dict[str, Any]:
        """See VirtioDevice. Streams are not in it: their other ends stay with this one."""
        return {"guest_cid": self._cid}

    def restore(self, saved: Saved) -> None:
        """See VirtioDevice. The driver is told that its streams have gone; it reads the CID anew
        then, which is another one for a copy (5.10.6.7 Device Events)."""
        saved.integer("guest_cid", HIGHEST_GUEST_CID, LOWEST_GUEST_CID)
        self.interrupt_streams()

    def interrupt_streams(self) -> None:
        """Streams of before are gone (the guest goes on from a saved state): tell the driver, now
        or when it has a buffer for events (5.10.6.7 Device Events). Any thread may call it."""
        self._interrupted = True
        if self._active is not None:
            self._active.worker.wake()

    def call(self, connection: Socket, port: int) -> None:
        """Make `connection` a stream to `port` of the guest, as CONNECT does for a client: it gets
        ``OK <host port>\\n`` first, or is closed. Any thread may call it.

        Raises HostError, ECONNREFUSED, as long as the guest has no driver; then the connection is
        the caller's still.
        """
        active = self._active
        if active is None:
            raise HostError(errno.ECONNREFUSED, f"vsock port {port}: the guest has no driver yet")
        self._calls.append((connection, port))
        active.worker.wake()

    @property
    def has_driver(self) -> bool:
        """True if there is somebody for `call`."""
        return self._active is not None

    # What the thread of an activation asks.

    def warn(self, line: str) -> None:
        """One line about the guest."""
        self._log(line)

    def take_interruption(self) -> bool:
        """True if a transport reset is to be told, which is then no longer so."""
        told, self._interrupted = self._interrupted, False
        return told

    def packet_hook(self) -> Callable[[Header], None] | None:
        """The trace's function for packet headers, or None."""
        trace, name = self._trace, self.name
        return None if trace is None else lambda header: trace(PacketEvent(name, header))

    @property
    def guest_cid(self) -> int:
        return self._cid

    def open_host_side(self, poller: Poller) -> HostSide:
        """The host's programs, as long as a driver is there."""
        return HostSide(self._listener, self._path, poller, self._calls)


class _Active:
    """All that lives from DRIVER_OK to the reset."""

    def __init__(self, device: VsockDevice, activation: Activation) -> None:
        """Raises HostError."""
        self._device = device
        self._starved = False  # a packet waits for a receive buffer
        self._event_due = False
        poller = Poller()
        try:
            self._host = device.open_host_side(poller)
            self._switch = self._make_switch(activation.features, poller)
            self.worker = DeviceWorker(device.name, activation, poller, self.work, self._end)
        except BaseException:
            poller.close()
            raise
        self._queues = self.worker.queues

    def _make_switch(self, features: int, poller: Poller) -> Switch:
        device = self._device
        return Switch(
            device.guest_cid,
            self._host,
            poller,
            # 5.10.3.2 Device Requirements: Feature bits
            stream_type_agreed=has(features, VIRTIO_VSOCK_F_STREAM)
            or not has(features, VIRTIO_VSOCK_F_NO_IMPLIED_STREAM),
            counters=device.counters,
            warn=device.warn,
            trace=device.packet_hook(),
        )

    @property
    def stream_count(self) -> int:
        """The number of streams that are open."""
        return len(self._switch)

    def _end(self) -> None:
        self._switch.close()
        self._host.close()

    def work(self) -> float | None:
        """Everything that can be done now; seconds until there is something to do again."""
        worker, switch = self.worker, self._switch
        receive, transmit = self._queues.get(VIRTIO_VSOCK_RX), self._queues.get(VIRTIO_VSOCK_TX)
        again = True
        while again and worker.may_go_on:
            if self._device.take_interruption():
                switch.close()
                self._event_due = True
            switch.attend()
            worker.batch(transmit, self._take_packets)
            self._starved = True  # also where the driver has no such queue
            worker.batch(receive, self._give_packets)
            self._send_event()
            again = worker.ask_for_kicks(transmit) if switch.takes_packets else False
            if self._starved:
                again |= worker.ask_for_kicks(receive)
            again |= switch.wants_attention or (switch.has_packets and not self._starved)
        return switch.patience()

    def _take_packets(self, queue: Queue) -> None:
        """5.10.6.1: goes on while the receive queue is full, as long as replies have a place."""
        switch = self._switch
        if not switch.takes_packets:
            return
        for chain in queue:
            reader = chain.reader()
            try:
                header = Header._make(reader.unpack(HEADER))
                switch.take_packet(header, reader)
            except DriverError as error:
                self._device.warn(f"a packet was dropped: {error}")
            queue.add_used(chain, 0)
            if not switch.takes_packets:
                return

    def _give_packets(self, queue: Queue) -> None:
        self._starved = give_packets(self._switch, queue, self._device.warn)

    def _send_event(self) -> None:
        queue = self._queues.get(VIRTIO_VSOCK_EVENT)
        if self._event_due:
            self.worker.batch(queue, self._give_event)
            if self._event_due and self.worker.ask_for_kicks(queue):
                self.worker.wake()

    def _give_event(self, queue: Queue) -> None:
        for chain in queue:
            writer = chain.writer()
            try:
                writer.write(EVENT.pack(VIRTIO_VSOCK_EVENT_TRANSPORT_RESET))
            except DriverError as error:
                self._device.warn(f"an event buffer is not used: {error}")
                queue.add_used(chain, 0)
                continue
            queue.add_used(chain, writer.written)
            self._event_due = False
            return


def give_packets(switch: Switch, queue: Queue, warn: Callable[[str], None]) -> bool:
    """Give the guest a batch of the packets that `switch` has for it; True if there are more and no
    buffers for them. `warn` gets a line for each buffer that is not used."""
    budget = _BATCH_BYTES
    while switch.has_packets and budget > 0:
        chain = queue.pop()
        if chain is None:
            return True
        if switch.has_much_data:
            budget -= _give_data(switch, queue, chain, warn)
            continue
        try:
            size = switch.give_packet(chain)
        except DriverError as error:
            warn(f"a receive buffer is not used: {error}")
            queue.add_used(chain, 0)
            budget -= HEADER_BYTES
            continue
        if not size:
            queue.step_back()
            return False
        queue.add_used(chain, size)
        budget -= size
    return False


def _give_data(
    switch: Switch, queue: Queue, first: DescriptorChain, warn: Callable[[str], None]
) -> int:
    """Fill `first` and the chains behind it, as far as there are some and data for them; with how
    many bytes."""
    chains = [first]
    while len(chains) < _TOGETHER and (chain := queue.pop()) is not None:
        chains.append(chain)
    try:
        sizes = switch.give_data(chains)
    except DriverError as error:
        warn(f"a receive buffer is not used: {error}")
        sizes = [0]
    for chain in reversed(chains[len(sizes) :]):
        queue.step_back(chain)
    for chain, size in zip(chains, sizes, strict=False):
        queue.add_used(chain, size)
    return sum(sizes) or HEADER_BYTES
