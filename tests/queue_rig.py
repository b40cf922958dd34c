"""A queue of either layout and the mock driver at its other end."""

from __future__ import annotations

from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing import MockPackedDriver, MockSplitDriver, Used
from pyvmm.virtio.features import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
    mask,
)
from pyvmm.virtio.queue.build import build_queue, restore_queue
from pyvmm.virtio.queue.state import QueueConfig, QueueState

MIB = 1 << 20
RAM = MIB
HOLE_END = 4 * MIB  # a second region of RAM follows the hole
LAYOUTS = ("split", "packed")


class Rig:
    """`driver` and `queue` share `memory`: 1 MiB at 0, a hole, 64 KiB at 4 MiB.

    `start` is where both sides begin, as QueueState counts, if not where a fresh queue does.
    """

    layout = "split"

    def __init__(
        self,
        size: int = 8,
        *,
        event_idx: bool = False,
        indirect: bool = True,
        in_order: bool = False,
        start: int | None = None,
        layout: str | None = None,
    ) -> None:
        self.memory = GuestMemory([(0, RAM), (HOLE_END, 0x10000)])
        self.packed = (layout or self.layout) == "packed"
        options = {"event_idx": event_idx, "in_order": in_order}
        if start is not None:
            options["start_index"] = start
        make = MockPackedDriver if self.packed else MockSplitDriver
        self.driver = driver = make(self.memory, size, **options)
        self.config = QueueConfig(
            max_size=max(size, 256),
            size=size,
            desc_addr=driver.desc_addr,
            avail_addr=driver.driver_addr,
            used_addr=driver.device_addr,
            ready=True,
        )
        self.features = mask(
            *((VIRTIO_F_EVENT_IDX,) if event_idx else ()),
            *((VIRTIO_F_INDIRECT_DESC,) if indirect else ()),
            *((VIRTIO_F_IN_ORDER,) if in_order else ()),
            *((VIRTIO_F_RING_PACKED,) if self.packed else ()),
        )
        self.kick = EventFd()
        if start is not None:
            config = self.config
            state = QueueState(
                config.max_size, size, config.desc_addr, config.avail_addr, config.used_addr,
                start, start, packed=self.packed,
            )  # fmt: skip
            self.queue = self.restored(state)
        else:
            self.queue = self.built()

    def built(self):
        """Another queue on the same rings."""
        return build_queue(self.memory, self.config, self.features, 0, self.kick)

    def restored(self, state: QueueState):
        """Another queue on the same rings that goes on from `state`."""
        return restore_queue(self.memory, state, self.features, 0, self.kick)

    def snapshot(self) -> bytes:
        return b"".join(bytes(region.view) for region in self.memory.regions)

    def serve(self, written: int = 0) -> int:
        """Return everything available; how many chains that was."""
        count = 0
        for chain in self.queue:
            self.queue.add_used(chain, written)
            count += 1
        return count

    def all_used(self) -> list[Used]:
        """The buffers that the driver finds returned."""
        return list(iter(self.driver.pop_used, None))

    def close(self) -> None:
        self.kick.close()
        self.memory.close()


class PackedRig(Rig):
    """The same with a packed ring."""

    layout = "packed"
