"""The virtio network device with vhost-net between its rings and a tap.

Negotiation, the configuration space, the control queue and the link are `NetDevice`'s. While the
link is down `NetDevice` serves what is sent as well, for it is to go nowhere.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from threading import RLock, Thread

from pyvmm.errors import HostError, PyvmmError
from pyvmm.host import tap
from pyvmm.host.vhost import VhostNet
from pyvmm.virtio.device import Activation
from pyvmm.virtio.features import RING_FEATURES, VIRTIO_F_RING_RESET, mask
from pyvmm.virtio.net.backend import LinkLost
from pyvmm.virtio.net.device import NetDevice, PairWorker
from pyvmm.virtio.net.tap import TapBackend
from pyvmm.virtio.net.uapi import (
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_MRG_RXBUF,
)
from pyvmm.virtio.net.vhost import VhostPair
from pyvmm.virtio.offload import OffloadLock
from pyvmm.virtio.queue.protocol import Queue, QueueLock


class VhostNetDevice(NetDevice):
    """A network card on the tap `interface`, each of whose pairs has a `VhostNet`.

    Every frame reaches the driver, whatever its address: the kernel has no filter of ours, so none
    is offered. Frames are counted by the interface, and not traced.

    It is saved as any card is: whoever holds a queue's lock has taken its ring back from the
    kernel, which has returned all that it took.
    """

    def __init__(
        self,
        backend: TapBackend,
        vhosts: Sequence[VhostNet],
        interface: tap.Interface,
        *,
        name: str,
        mac: bytes,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """Put a device in front of `backend`, with one of `vhosts` for each of its channels. It
        closes neither. Raises HostError."""
        super().__init__(backend, name=name, mac=mac, log=log)
        self._tap = backend
        self._vhosts = tuple(vhosts)
        self._interface = interface
        kernels = vhosts[0].features
        self.features &= ~mask(VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA)
        self.features &= ~(RING_FEATURES | mask(VIRTIO_NET_F_MRG_RXBUF)) | kernels
        self.features |= mask(VIRTIO_F_RING_RESET)  # which is ours to do
        # Pairs are started and stopped by the driver's vCPU, by the control queue's thread and by
        # whoever plugs the cable. Taken before any queue's lock.
        self._switching = RLock()
        self._before = self._counted = interface.counters()

    def stats(self) -> Mapping[str, object]:
        """Frames and bytes both ways since the start, as the interface counts them."""
        with suppress(HostError):  # it is gone; what was counted stays
            self._counted = self._interface.counters()
        since = {key: self._counted[key] - before for key, before in self._before.items()}
        dropped = since.pop("dropped_to_guest")
        drops = {"the tap's queue was full": dropped} if dropped else {}
        return {**since, "dropped": drops, "served_by": "vhost-net"}

    def activate(self, activation: Activation) -> None:
        def fail(error: PyvmmError) -> None:
            # Before, as the driver may look at its rings as soon as it sees DEVICE_NEEDS_RESET. And
            # after, for a ring that was handed over in between.
            self._halt()
            activation.fail(error)
            self._halt()

        with self._switching:
            super().activate(activation._replace(fail=fail))

    def queue_lock(self) -> QueueLock:
        """See VirtioDevice: the kernel serves the queues while nobody holds it."""
        return OffloadLock()

    def _worker(self, pair: int, queues: Sequence[Queue], activation: Activation) -> PairWorker:
        if not self._link_up:
            # The driver is to get no frames: they stay in the tap until the link is up.
            sending = [queue for queue in queues if queue.index & 1]
            return super()._worker(pair, sending or queues, activation)
        name, end = f"{self.name}-p{pair}", self._tap.channels[pair].readable.fd
        served = self._vhosts[pair], self._interface, end
        return VhostPair(name, *served, queues, activation, self._lose_link)

    def _start_pair(self, pair: int) -> None:
        if pair < self._active_pairs:  # the tap has let go of the others' ends
            super()._start_pair(pair)

    def _change_pair(self, index: int, queue: Queue | None) -> None:
        with self._switching:
            try:
                super()._change_pair(index, queue)
            except BaseException:
                self._halt()
                raise

    def _end_pairs(self) -> None:
        with self._switching:
            super()._end_pairs()

    def _halt(self) -> None:
        """The device has failed: the kernel is to touch no ring."""
        for worker in list(self._workers_of_pairs.values()):
            if isinstance(worker, VhostPair):
                worker.halt()

    def set_pairs(self, pairs: int) -> None:
        """See control.Target."""
        with self._switching:
            self._stop_pairs(range(pairs, len(self._receivers)))
            try:
                self._backend.set_active(pairs)
                self._active_pairs = pairs
            finally:
                for pair in range(self._active_pairs):
                    if pair not in self._workers_of_pairs:
                        self._start_pair(pair)

    def set_link(self, up: bool) -> None:
        """See NetDevice."""
        super().set_link(up)
        if self._lost:
            # It is a pair's own thread that noticed, and whoever stops a pair waits for that.
            other = Thread(target=self._change_servers, name=f"{self.name}-lost", daemon=True)
            try:
                other.start()
            except RuntimeError:  # all that Python says of pthread_create's EAGAIN
                activation = self._serving
                if activation is not None:
                    activation.fail(HostError(errno.EAGAIN, f"thread for {self.name}"))
        else:
            self._change_servers()

    def _change_servers(self) -> None:
        with self._switching:
            activation = self._serving
            if activation is None:
                return
            up = self._link_up
            others = [
                pair
                for pair, worker in self._workers_of_pairs.items()
                if isinstance(worker, VhostPair) != up
            ]
            self._stop_pairs(others)
            try:
                for pair in others:
                    if up:
                        with suppress(LinkLost):  # its worker will notice
                            self._tap.channels[pair].discard()
                    self._start_pair(pair)
            except HostError as error:
                activation.fail(error)
