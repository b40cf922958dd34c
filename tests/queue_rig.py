"""A split queue and the mock driver at its other end."""

from __future__ import annotations

from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing import MockSplitDriver
from pyvmm.virtio.features import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, mask
from pyvmm.virtio.queue_state import QueueConfig, QueueState
from pyvmm.virtio.split_queue import SplitQueue

MIB = 1 << 20
RAM = MIB
HOLE_END = 4 * MIB  # a second region of RAM follows the hole


class Rig:
    """`driver` and `queue` share `memory`: 1 MiB at 0, a hole, 64 KiB at 4 MiB."""

    def __init__(
        self, size: int = 8, *, event_idx: bool = False, indirect: bool = True, start: int = 0
    ) -> None:
        self.memory = GuestMemory([(0, RAM), (HOLE_END, 0x10000)])
        self.driver = MockSplitDriver(self.memory, size, event_idx=event_idx, start_index=start)
        self.config = QueueConfig(
            max_size=256,
            size=size,
            desc_addr=self.driver.desc_addr,
            avail_addr=self.driver.avail_addr,
            used_addr=self.driver.used_addr,
            ready=True,
        )
        self.features = mask(
            *((VIRTIO_F_EVENT_IDX,) if event_idx else ()),
            *((VIRTIO_F_INDIRECT_DESC,) if indirect else ()),
        )
        self.kick = EventFd()
        if start:
            state = QueueState(
                256, size, self.config.desc_addr, self.config.avail_addr, self.config.used_addr,
                start, start,
            )  # fmt: skip
            self.queue = SplitQueue.from_state(self.memory, state, self.features, 0, self.kick)
        else:
            self.queue = SplitQueue(self.memory, self.config, self.features, 0, self.kick)

    def snapshot(self) -> bytes:
        return b"".join(bytes(region.view) for region in self.memory.regions)

    def serve(self, written: int = 0) -> int:
        """Return everything available; how many chains that was."""
        count = 0
        for chain in self.queue:
            self.queue.add_used(chain, written)
            count += 1
        return count

    def close(self) -> None:
        self.kick.close()
        self.memory.close()
