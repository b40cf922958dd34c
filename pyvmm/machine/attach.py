"""Plugs a virtio device into a machine: its window, its doorbells and its interrupt.

One sequence for every device, so that none can be half attached: the bus answers the registers,
an ioeventfd per queue catches its doorbell in the kernel, an irqfd raises the GSI.
"""

from __future__ import annotations

from contextlib import ExitStack

from pyvmm.bus import Bus
from pyvmm.host import log
from pyvmm.host.syscalls import EventFd
from pyvmm.kvm.vm import Vm
from pyvmm.machine.board.board import VirtioSlot
from pyvmm.machine.trace import Hook, Trace
from pyvmm.memory import GuestMemory
from pyvmm.transport.base import Transport
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.device import VirtioDevice


def attach_virtio(
    device: VirtioDevice,
    slot: VirtioSlot,
    *,
    vm_name: str,
    vm: Vm,
    memory: GuestMemory,
    bus: Bus,
    trace: Trace,
    closing: ExitStack,
) -> Transport:
    """Give `device` the window and the interrupt of `slot`; `closing` undoes it in reverse order.

    Raises HostError if KVM refuses.
    """
    interrupt = EventFd()
    closing.callback(interrupt.close)
    transport = MmioTransport(
        device,
        memory,
        interrupt.signal,
        irq_eventfd=interrupt,
        log=log.of_vm(vm_name),  # the transport limits the rate
        trace=_virtio_hook(trace),
    )
    closing.callback(transport.close)
    bus.register(slot.base, slot.size, transport.registers)
    vm.irqfd(interrupt.fd, slot.gsi)
    closing.callback(vm.irqfd, interrupt.fd, slot.gsi, deassign=True)
    for bell in transport.doorbells:
        vm.ioeventfd(bell.kick.fd, slot.base + bell.offset, bell.size, datamatch=bell.match)
    return transport


def _virtio_hook(trace: Trace) -> Hook | None:
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
