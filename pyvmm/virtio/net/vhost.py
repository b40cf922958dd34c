"""A pair of queues in the kernel's hands: vhost-net moves frames between their rings and a tap.

The kernel's thread wakes by the driver's kicks and interrupts it; nothing of a frame passes through
this process. docs/decisions/0152-vhost-net.md says what does.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from threading import Thread

from pyvmm.errors import DriverError, HostError, PyvmmError
from pyvmm.host import tap
from pyvmm.host.poller import READABLE, Poller
from pyvmm.host.syscalls import EventFd
from pyvmm.host.vhost import MappedRegion, Ring, VhostNet
from pyvmm.virtio.device import Activation
from pyvmm.virtio.features import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
    mask,
)
from pyvmm.virtio.net.uapi import VIRTIO_NET_F_MRG_RXBUF
from pyvmm.virtio.offload import serve
from pyvmm.virtio.queue.protocol import Queue

# The features of a driver that the kernel must know. The others concern the tap, or only us.
KERNEL_FEATURES = mask(
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF
)
USED_IDX_AT = 2  # 2.7.8 The Virtqueue Used Ring: after the flags
# The kernel does not say what it is.
_BROKEN = DriverError("vhost found a broken ring or descriptor", section="2.7 Split Virtqueues")


class VhostPair:
    """Has the kernel serve `queues`, those of a pair that the driver set up, from `start` until
    `request_stop`. Its thread sleeps until the kernel finds a ring broken or the tap is gone.
    """

    def __init__(
        self,
        name: str,
        vhost: VhostNet,
        interface: tap.Interface,
        fd: int,
        queues: Sequence[Queue],
        activation: Activation,
        lost: Callable[[str], None],
    ) -> None:
        """`name` is the thread's, `fd` the pair's queue of the tap `interface`; `lost` is told why
        that gives no more frames. Raises HostError."""
        self._name = name
        self._vhost = vhost
        self._tap = fd
        self._queues = tuple(queues)
        self._activation = activation
        self._lost = lost
        self._stopping = False
        with ExitStack() as opened:
            self._broken = opened.enter_context(EventFd())
            self._stop = opened.enter_context(EventFd())
            self._changes = opened.enter_context(interface.changes())
            self._poller = opened.enter_context(Poller())
            for readable in (self._broken, self._stop, self._changes):
                self._poller.add(readable.fileno(), lambda _: None, READABLE)
            self._opened = opened.pop_all()
        self._thread = Thread(target=self._watch, name=name, daemon=True)

    def start(self) -> None:
        """Let the kernel begin with what is available already. Raises HostError."""
        try:
            self._vhost.set_memory(
                MappedRegion(region.guest_addr, region.size, region.host_addr)
                for region in self._activation.memory.regions
            )
            self._vhost.negotiate(self._activation.features & KERNEL_FEATURES)
            self._thread.start()
        except (HostError, RuntimeError) as error:
            self._opened.close()
            if isinstance(error, HostError):
                raise
            # All that Python says of pthread_create's EAGAIN.
            raise HostError(errno.EAGAIN, f"thread for {self._name}") from None
        for queue in self._queues:
            queue.begin_serving()
            serve(queue, self)

    def request_stop(self) -> None:
        """Have the kernel serve them no more; their rings are as any queue's when this returns."""
        for queue in self._queues:
            serve(queue, None)
        self._stopping = True
        self._stop.signal()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()
        self._opened.close()

    # --- for the rings ---------------------------------------------------------------------------

    def hand_over(self, queue: Queue) -> None:
        """The kernel serves `queue`, if anybody is to. The device fails if it cannot."""
        if not queue.ready:
            return
        try:
            self._vhost.start(
                queue.index & 1,
                self._ring(queue),
                self._tap,
                kick=queue.kick,
                call=self._activation.interrupt.eventfd(queue.index),
                error=self._broken,
            )
        except PyvmmError as error:
            self._activation.fail(error)
        if not queue.ready:  # the device has failed meanwhile
            self.halt()
        # For what the driver made available when nobody looked.
        queue.kick.signal()

    def _ring(self, queue: Queue) -> Ring:
        state = queue.state()
        where = self._activation.memory.host_addr
        return Ring(
            state.size,
            state.next_avail,
            desc=where(state.desc_addr),
            avail=where(state.avail_addr),
            used=where(state.used_addr),
        )

    def take_back(self, queue: Queue) -> None:
        """The kernel lets go of `queue`, which is as if we had served it."""
        try:
            self._vhost.stop(queue.index & 1)
            if queue.ready:
                queue.served_to(self._used_idx(queue))
        except PyvmmError as error:
            self._activation.fail(error)

    def _used_idx(self, queue: Queue) -> int:
        # Not VHOST_GET_VRING_BASE: what the kernel took and could not send, because the tap had
        # gone, it does not return. A driver that writes here fools itself, and served_to sees it.
        idx = self._activation.memory.read(queue.state().used_addr + USED_IDX_AT, 2)
        return int.from_bytes(idx, "little")

    def halt(self) -> None:
        """The device has failed: the kernel is to touch no ring. Whoever holds what lock."""
        for queue in self._queues:
            with suppress(HostError):  # it could not be started either
                self._vhost.stop(queue.index & 1)

    # --- what the thread sleeps for --------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopping:
            self._poller.wait()
            broken, changed = self._broken.drain(), tap.drain_changes(self._changes)
            if self._stopping or not (broken or changed):
                continue
            if not tap.is_attached(self._tap):
                self._lost("the tap gives no more frames")
            elif broken:
                self._activation.fail(_BROKEN)
