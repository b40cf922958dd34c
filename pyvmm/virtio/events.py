"""Events of a device's negotiation for a trace: one value per event, one line each."""

from __future__ import annotations

from typing import NamedTuple

from pyvmm.virtio import status


class StatusChanged(NamedTuple):
    """The device status went from `before` to `after`."""

    device: str
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.device}: status {self._name(self.before)} -> {self._name(self.after)}"

    @staticmethod
    def _name(value: int) -> str:
        return status.describe(value)


class Activated(NamedTuple):
    """The device went live with these features, by name; size of each queue, 0 for one not
    enabled."""

    device: str
    features: tuple[str, ...]
    queue_sizes: tuple[int, ...]

    def __str__(self) -> str:
        names = " ".join(self.features)
        sizes = ", ".join(str(size) for size in self.queue_sizes)
        return f"{self.device}: active, queue sizes [{sizes}], features {names}"


class DeviceReset(NamedTuple):
    """The device was reset by its driver: nothing is in flight any more."""

    device: str

    def __str__(self) -> str:
        return f"{self.device}: reset"


class QueueReset(NamedTuple):
    """The driver reset one queue: nothing of it is in flight any more."""

    device: str
    queue: int

    def __str__(self) -> str:
        return f"{self.device}: queue {self.queue} reset"


class QueueStarted(NamedTuple):
    """The driver set a queue up anew after its reset, with `size` entries."""

    device: str
    queue: int
    size: int

    def __str__(self) -> str:
        return f"{self.device}: queue {self.queue} started again, size {self.size}"


class NeedsReset(NamedTuple):
    """The device gave up until it is reset; `error` says why."""

    device: str
    error: str

    def __str__(self) -> str:
        return f"{self.device}: needs reset: {self.error}"
