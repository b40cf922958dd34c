"""Plugs a virtio device into a machine: its window, its doorbells and its interrupt.

One sequence for every device, so that none can be half attached: the bus answers the registers,
an ioeventfd per queue catches its doorbell in the kernel, an irqfd raises the GSI.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pyvmm.bus import Bus
from pyvmm.host.log import Sink
from pyvmm.host.syscalls import EventFd
from pyvmm.kvm.vm import Vm
from pyvmm.machine.board.board import VirtioSlot
from pyvmm.machine.trace import Hook, Trace
from pyvmm.memory import GuestMemory
from pyvmm.transport.base import Transport
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.device import VirtioDevice

if TYPE_CHECKING:  # as a Protocol costs a start 0.1 ms
    from typing import Protocol

    class Plug(Protocol):
        """A bus into which virtio devices are plugged, one after the other."""

        def attach(
            self,
            device: VirtioDevice,
            *,
            memory: GuestMemory,
            log: Sink,
            trace: Hook | None,
            closing: ExitStack,
        ) -> Transport:
            """Plug `device` in at the next place; `closing` undoes it in reverse order.

            Raises HostError if KVM refuses.
            """


class MmioSlots:
    """See Plug: windows and interrupt lines that a board has for virtio-mmio."""

    def __init__(self, slots: Sequence[VirtioSlot], vm: Vm, bus: Bus) -> None:
        self._slots = iter(slots)
        self._vm = vm
        self._bus = bus

    def attach(
        self,
        device: VirtioDevice,
        *,
        memory: GuestMemory,
        log: Sink,
        trace: Hook | None,
        closing: ExitStack,
    ) -> Transport:
        """See Plug."""
        slot, vm = next(self._slots), self._vm
        interrupt = EventFd()
        closing.callback(interrupt.close)
        transport = MmioTransport(
            device, memory, interrupt.signal, irq_eventfd=interrupt, log=log, trace=trace
        )
        closing.callback(transport.close)
        self._bus.register(slot.base, slot.size, transport.registers)
        vm.irqfd(interrupt.fd, slot.gsi)
        closing.callback(vm.irqfd, interrupt.fd, slot.gsi, deassign=True)
        for bell in transport.doorbells:
            vm.ioeventfd(bell.kick.fd, slot.base + bell.offset, bell.size, datamatch=bell.match)
        return transport


def virtio_hook(trace: Trace) -> Hook | None:
    """One hook for what a transport tells: register accesses, and all that follows from them."""
    registers, status = trace.hook("registers"), trace.hook("status")
    if registers is None and status is None:
        return None
    from pyvmm.transport.events import BadAccess, RegisterAccess

    def dispatch(event: object) -> None:
        hook = registers if isinstance(event, (RegisterAccess, BadAccess)) else status
        if hook is not None:
            hook(event)

    return dispatch
