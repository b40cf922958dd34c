"""The common part of the transports: a device, its doorbells, and what it agrees on with a driver.

The rest of the monitor knows a transport by this interface. How its driver reaches it is told by a
module for each: `pyvmm.transport.mmio` (virtio 1.3, 4.2 Virtio Over MMIO).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from pyvmm.host.log import Sink, to_stderr
from pyvmm.host.saved import Saved
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.virtio import status
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.lifecycle import CONFIG_CHANGED, Trace
from pyvmm.virtio.negotiation import Negotiation


class Doorbell(NamedTuple):
    """A write by which the driver notifies the device of a queue's new buffers.

    It is `size` bytes wide (0: however many), `offset` bytes into the transport's window, and has
    the value `match` (None: whichever). Whoever catches the write in place of the transport signals
    `kick`.
    """

    kick: EventFd
    offset: int
    size: int
    match: int | None


class Transport(ABC):
    """One virtio device as its driver reaches it; also the `Notifier` of its negotiation.

    `kicks` has one eventfd for each queue; a signal of it says that the driver made buffers
    available. `negotiation` is what driver and device agree on, the same on every transport.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        *,
        log: Sink = to_stderr,
        trace: Trace | None = None,
    ) -> None:
        """Raises HostError without file descriptors, ValueError for a device that offers features
        which do not exist here."""
        self.device = device
        self.kicks = [EventFd() for _ in device.queue_sizes]
        self.negotiation = Negotiation(device, memory, self, self.kicks, log=log, trace=trace)

    def close(self) -> None:
        """Reset the device and give its doorbells back; the guest must be stopped. A second time
        changes nothing."""
        if any(kick.fd < 0 for kick in self.kicks):
            return
        with self.negotiation.lock:
            self.negotiation.reset()
        for kick in self.kicks:
            kick.close()

    # --- saved and restored ----------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """The device, what it has agreed on with its driver, and the transport's own registers, as
        plain data. The machine stands still. Raises ConfigError for a device that cannot be saved,
        DriverError for one that is busy."""
        return {
            "device_type": self.device.device_type,
            "device": self.device.save(),
            "negotiation": self.negotiation.save(),
            "transport": self._save(),
        }

    def restore(self, saved: Saved) -> None:
        """Restore what `save` gave, to a device that is new; it works from then on if it did.
        Raises ConfigError for state that cannot be, HostError."""
        if saved.bits("device_type", 32) != self.device.device_type:
            raise saved.wrong(f"it is not of type {self.device.device_type}")
        self._restore(saved.table("transport"))
        with self.negotiation.lock:
            self.negotiation.restore(saved.table("negotiation"), saved.table("device"))
        if self.negotiation.state.status & status.DRIVER_OK:
            # A worker shows what it has used, lets go of the queue and then interrupts: the state
            # may have been saved in between. One interrupt too many is harmless.
            self.negotiation.remind()
            self.used_buffer(*range(len(self.kicks)))
            if self.negotiation.state.interrupt_status & CONFIG_CHANGED:
                self.config_changed()

    @abstractmethod
    def _save(self) -> dict[str, Any]:
        """The registers that this transport alone has."""

    @abstractmethod
    def _restore(self, saved: Saved) -> None:
        """Restore what `_save` gave."""

    # --- from the driver to the device: 2.9 Driver Notifications ---------------------------------

    @property
    @abstractmethod
    def doorbells(self) -> Sequence[Doorbell]:
        """The writes that KVM may catch, each by an ioeventfd. One that reaches the transport all
        the same has the same effect."""

    def write_queue_notify(self, value: int) -> None:
        """Queue `value` has new buffers. The warnings are here, because no lock is taken on the
        way: a notification never waits for a reset."""
        gate_mask, gate_value, _ = status.NOTIFY_GATE
        if self.negotiation.state.status & gate_mask != gate_value:
            self.negotiation.warn(
                f"kick of queue {value:#x} ignored before DRIVER_OK or after an error"
            )
        elif value < len(self.kicks):
            self.kicks[value].signal()
        else:
            self.negotiation.warn(f"kick of queue {value:#x} ignored: no such queue")

    # --- from the device to the driver: 2.3 Notifications ----------------------------------------

    @abstractmethod
    def used_buffer(self, *queue_indexes: int) -> None:
        """Tell the driver that the device used a buffer of each of these queues. Any thread calls
        it, after the interrupt status has its bit."""

    @abstractmethod
    def config_changed(self) -> None:
        """Tell the driver that the configuration changed or the device needs a reset; likewise."""

    @abstractmethod
    def used_eventfd(self, index: int) -> EventFd | None:
        """The eventfd that does so for queue `index` when another signals it; None while the driver
        wants no interrupt for it. Raises HostError if there is no such thing."""
