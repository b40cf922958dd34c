"""The virtio network device: frames between the driver's queues and a backend.

Virtio 1.3, 5.1 Network Device. Each pair of queues has a thread of its own, and so has the control
queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pyvmm.host.log import RateLimited
from pyvmm.host.poller import Source
from pyvmm.host.saved import Saved
from pyvmm.virtio.constants import VIRTIO_ID_NET
from pyvmm.virtio.device import Activation
from pyvmm.virtio.features import RING_FEATURES, has, mask
from pyvmm.virtio.net.backend import Backend, LinkLost
from pyvmm.virtio.net.config import NetConfig
from pyvmm.virtio.net.control import GUEST_OFFLOADS, NEEDED_OFFLOADS, Control
from pyvmm.virtio.net.counters import Counters, NetEvent
from pyvmm.virtio.net.filter import ReceiveFilter, filter_from
from pyvmm.virtio.net.header import ETH_HEADER, HEADER_SIZE, TransmitCheck
from pyvmm.virtio.net.receive import Receiver, Rules
from pyvmm.virtio.net.transmit import Transmitter
from pyvmm.virtio.net.uapi import (
    FEATURE_NAMES,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
)
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.worker import QueueDevice, QueueWorker, Rest

if TYPE_CHECKING:
    from pyvmm.virtio.net.limits import Limits


QUEUE_SIZE = 256
CONTROL_QUEUE_SIZE = 64


class PairWorker(Protocol):
    """A server of a pair of queues, from `start` until `request_stop`; see `QueueWorker`."""

    def start(self) -> None: ...

    def request_stop(self) -> None: ...

    def join(self) -> None: ...


class _Settings(NamedTuple):
    """The settings that a driver makes by its control queue."""

    filter: ReceiveFilter
    pairs: int
    offloads: int


class NetDevice(QueueDevice):
    """A network card. `name` stands in messages; `mac` is what it starts out with, 6 bytes.

    `received` and `sent` have the `Counters` of each pair of queues since the device was made.
    """

    device_type = VIRTIO_ID_NET
    feature_names = FEATURE_NAMES

    def __init__(
        self,
        backend: Backend,
        *,
        name: str,
        mac: bytes,
        queue_size: int = QUEUE_SIZE,
        trace: Callable[[object], None] | None = None,
        log: Callable[[str], None] | None = None,
        receive_limits: Limits | None = None,
        send_limits: Limits | None = None,
    ) -> None:
        """Put a device in front of `backend`, which it does not close. The limits are those of all
        its pairs together.

        `trace` gets a `NetEvent` for each frame; `log` a line when the link is lost, and is
        limited in rate unless given.
        """
        self.name = name
        self._backend = backend
        self._pairs = pairs = len(backend.channels)
        self.queue_sizes = (queue_size,) * (2 * pairs) + (CONTROL_QUEUE_SIZE,)
        self.features = (
            backend.offloads
            | RING_FEATURES
            | mask(
                VIRTIO_NET_F_MAC,
                VIRTIO_NET_F_MTU,
                VIRTIO_NET_F_STATUS,
                VIRTIO_NET_F_MRG_RXBUF,
                VIRTIO_NET_F_CTRL_VQ,
                VIRTIO_NET_F_CTRL_RX,
                VIRTIO_NET_F_CTRL_RX_EXTRA,
                VIRTIO_NET_F_CTRL_MAC_ADDR,
                *((VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,) if backend.offloads & GUEST_OFFLOADS else ()),
                *((VIRTIO_NET_F_MQ,) if pairs > 1 else ()),
            )
        )
        self.received = tuple(Counters() for _ in range(pairs))
        self.sent = tuple(Counters() for _ in range(pairs))
        self._first_mac = mac
        self._filter = ReceiveFilter(mac)
        self._link_up = True
        self._lost = False  # the backend gives and takes no more, whatever happens
        self._active_pairs = 1
        self._offloads = 0
        self._restored: _Settings | None = None  # what the next driver has set before
        self._control_index = 2 * pairs
        self._receivers: list[Receiver] = []
        self._transmitters: list[Transmitter] = []
        self._control: Control | None = None
        self._live: dict[int, Queue] = {}  # queues of pairs that are served, by index
        self._serving: Activation | None = None  # of the pairs
        self._workers_of_pairs: dict[int, PairWorker] = {}  # by pair
        self._receive_limits, self._send_limits = receive_limits, send_limits
        self._trace = trace
        self._log = RateLimited(prefix=f"{name}: ", device=name) if log is None else log

    def stats(self) -> Mapping[str, object]:
        """Frames and bytes both ways, and why frames went nowhere, since the start."""
        dropped: dict[str, int] = {}
        for counters in (*self.received, *self.sent):
            for why, count in list(counters.dropped.items()):
                dropped[why] = dropped.get(why, 0) + count
        return {
            "frames_to_guest": sum(counters.frames for counters in self.received),
            "bytes_to_guest": sum(counters.bytes for counters in self.received),
            "frames_from_guest": sum(counters.frames for counters in self.sent),
            "bytes_from_guest": sum(counters.bytes for counters in self.sent),
            "dropped": dropped,
        }

    # --- what the user may do --------------------------------------------------------------------

    @property
    def mac(self) -> bytes:
        """The card's address now; the driver may change it until the next reset."""
        return self._filter.mac

    @property
    def link_up(self) -> bool:
        """True if the cable is plugged in."""
        return self._link_up

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it out, and tell the driver. Any thread may call it. A link
        that was lost stays down."""
        up = up and not self._lost
        if up == self._link_up:
            return
        self._link_up = up
        self.signal_config_change()

    # --- VirtioDevice ----------------------------------------------------------------------------

    def read_config(self, offset: int, length: int) -> bytes:
        """struct virtio_net_config, zero past its end (5.1.4, 2.5)."""
        encoded = NetConfig(
            mac=self._filter.mac,
            status=VIRTIO_NET_S_LINK_UP if self._link_up else 0,
            mtu=self._backend.mtu,
            max_virtqueue_pairs=self._pairs if self._pairs > 1 else 0,
        ).encode()
        return encoded[offset : offset + length].ljust(length, b"\0")

    def activate(self, activation: Activation) -> None:
        features = activation.features
        # 5.1.2 Virtqueues: without MQ there is one pair, and the control queue comes right after.
        pairs = self._pairs if has(features, VIRTIO_NET_F_MQ) else 1
        self._control_index = 2 * pairs if has(features, VIRTIO_NET_F_CTRL_VQ) else -1
        # A driver that cannot choose gets all there is; one that can begins with its own address.
        promisc = not has(features, VIRTIO_NET_F_CTRL_RX)
        self._filter = ReceiveFilter(self._first_mac, promisc=promisc)
        settings, self._restored = self._restored, None
        if settings is None:
            settings = _Settings(self._filter, 1, _usable(features & GUEST_OFFLOADS))
        self._filter = settings.filter
        self._control = Control(self, features, self._filter, pairs)
        self.set_offloads(settings.offloads & features)
        self._active_pairs = min(settings.pairs, pairs)
        if not self._lost:
            self._backend.set_active(self._active_pairs)
        self._make_paths(features, pairs)
        self._live = {
            queue.index: queue
            for queue in activation.queues[: 2 * pairs]
            if queue is not None and queue.index != self._control_index
        }
        self._activation = self._serving = activation
        try:
            for pair in range(pairs):
                self._start_pair(pair)
            if 0 <= self._control_index < len(activation.queues):
                control = activation.queues[self._control_index]
                if control is not None:
                    super().start_queue(control)
        except BaseException:
            self.reset()
            raise

    def save(self) -> dict[str, Any]:
        """See VirtioDevice: what the driver has set by its control queue, and the link."""
        return {
            "link_up": self._link_up,
            "filter": self._filter.save(),
            "pairs": self._active_pairs,
            "offloads": self._offloads,
        }

    def restore(self, saved: Saved) -> None:
        """See VirtioDevice. The other end of the cable is another one: what was on its way is
        lost, as on any network."""
        self._link_up = saved.flag("link_up") and not self._lost
        self._filter = filter_from(saved.table("filter"))
        pairs = saved.integer("pairs", self._pairs, 1)
        self._restored = _Settings(self._filter, pairs, saved.bits("offloads", 64))

    def start_queue(self, queue: Queue) -> None:
        """See VirtioDevice."""
        if queue.index // 2 >= len(self._receivers):
            super().start_queue(queue)
        else:
            self._change_pair(queue.index, queue)

    def reset_queue(self, index: int) -> None:
        """See VirtioDevice. A receive queue's buffers are forgotten, and a frame in them."""
        if index // 2 >= len(self._receivers):
            super().reset_queue(index)
        else:
            self._change_pair(index, None)

    def _change_pair(self, index: int, queue: Queue | None) -> None:
        """Serve the pair of queue `index` with `queue` in its place, or without it."""
        pair, sends = divmod(index, 2)
        self._stop_pairs([pair])
        if queue is not None:
            self._live[index] = queue
        else:
            self._live.pop(index, None)
            if not sends:
                self._receivers[pair] = self._receiver(pair)
        self._start_pair(pair)

    def _start_pair(self, pair: int) -> None:
        # Sending comes first: what is sent may be answered at once.
        order = (2 * pair + 1, 2 * pair)
        queues = [self._live[index] for index in order if index in self._live]
        if not queues:
            return
        assert self._serving is not None, "only a live device starts queues"
        worker = self._worker(pair, queues, self._serving)
        worker.start()
        self._workers_of_pairs[pair] = worker

    def _worker(self, pair: int, queues: Sequence[Queue], activation: Activation) -> PairWorker:
        sources = [self.sources(queue.index) for queue in queues]
        return QueueWorker(f"{self.name}-p{pair}", queues, self.serve, activation, sources)

    def _stop_pairs(self, pairs: Iterable[int]) -> None:
        running = self._workers_of_pairs
        workers = [running.pop(pair) for pair in pairs if pair in running]
        for worker in workers:
            worker.request_stop()
        for worker in workers:
            worker.join()

    def _make_paths(self, features: int, pairs: int) -> None:
        self._rules = Rules(
            mergeable=has(features, VIRTIO_NET_F_MRG_RXBUF),
            guest_csum=has(features, VIRTIO_NET_F_GUEST_CSUM),
            largest=HEADER_SIZE + ETH_HEADER + self._backend.mtu
            if has(features, VIRTIO_NET_F_MTU)
            else 0,
        )
        check = TransmitCheck(features)
        self._receivers = [self._receiver(pair) for pair in range(pairs)]
        self._transmitters = [
            Transmitter(
                channel,
                check,
                lambda: self._link_up,
                self.sent[pair],
                self._noting("sent"),
                self._send_limits,
            )
            for pair, channel in enumerate(self._backend.channels[:pairs])
        ]

    def _receiver(self, pair: int) -> Receiver:
        return Receiver(
            self._backend.channels[pair],
            self._rules,
            self._filter_of(pair),
            self.received[pair],
            self._noting("received"),
            self._receive_limits,
        )

    def _filter_of(self, pair: int) -> Callable[[], ReceiveFilter | None]:
        def in_force() -> ReceiveFilter | None:
            return self._filter if self._link_up and pair < self._active_pairs else None

        return in_force

    def _noting(self, direction: str) -> Callable[[int, str], None] | None:
        trace = self._trace
        if trace is None:
            return None
        return lambda size, why: trace(NetEvent(self.name, direction, size, why))

    def sources(self, index: int) -> Sequence[Source]:
        """Receiving waits for frames, sending for room where there was none."""
        pair, sends = divmod(index, 2)
        if index == self._control_index or pair >= len(self._receivers) or self._lost:
            return ()
        channel = self._backend.channels[pair]
        return (channel.writable if sends else channel.readable,)

    def serve(self, queue: Queue) -> Rest | None:
        """Receive, send or carry out commands, as the queue is for."""
        index = queue.index
        if index == self._control_index:
            self._serve_control(queue)
            return None
        pair, sends = divmod(index, 2)
        if pair >= len(self._receivers):
            return None  # a queue that the features leave without a purpose
        try:
            if sends:
                return self._transmitters[pair].serve(queue)
            return None if self._lost else self._receivers[pair].serve(queue)
        except LinkLost as lost:
            self._lose_link(str(lost))
            # Frames in a transmit queue must not wait for ever.
            return self._transmitters[pair].serve(queue) if sends else None

    def _lose_link(self, why: str) -> None:
        if not self._lost:
            self._lost = True
            self._log(f"the link is down: {why}")
            self.set_link(False)

    def _serve_control(self, queue: Queue) -> None:
        control = self._control
        assert control is not None
        for chain in queue:
            queue.add_used(chain, control.answer(chain))

    def reset(self) -> None:
        self._restored = None  # the driver that it is about is not there any more
        super().reset()  # the control queue goes first: its commands are about the pairs
        self._end_pairs()

    def _end_pairs(self) -> None:
        self._stop_pairs(list(self._workers_of_pairs))
        for queue in self._live.values():
            queue.ready = False
        self._live, self._serving = {}, None
        self._filter = ReceiveFilter(self._first_mac)
        self._receivers, self._transmitters, self._control = [], [], None

    # --- what the control queue changes ----------------------------------------------------------

    def set_filter(self, filter: ReceiveFilter) -> None:
        """See control.Target."""
        self._filter = filter

    def set_mac(self, mac: bytes) -> None:
        """See control.Target; the filter has the address already."""
        self.signal_config_change()

    def set_pairs(self, pairs: int) -> None:
        """See control.Target."""
        self._backend.set_active(pairs)
        self._active_pairs = pairs
        # Once each receive thread has let go of its batch, none uses a queue that is no longer in
        # use (5.1.6.5.6 Automatic receive steering in multiqueue mode).
        for index in range(2 * pairs, 2 * len(self._receivers), 2):
            queue = self._live.get(index)
            if queue is not None:
                with queue.lock:
                    pass

    def set_offloads(self, offloads: int) -> None:
        """See control.Target."""
        self._offloads = offloads
        try:
            if not self._lost:
                self._backend.set_offloads(offloads)
        except LinkLost as lost:
            self._lose_link(str(lost))


def _usable(offloads: int) -> int:
    """`offloads` without those whose requirements were not negotiated (5.1.3.1)."""
    for features, needed in NEEDED_OFFLOADS:
        if not offloads & needed:
            offloads &= ~features
    return offloads
