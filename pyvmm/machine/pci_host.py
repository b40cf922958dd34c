"""The PCI host bridge of a machine: bus 0, where it answers, and how virtio devices are plugged in.

A driver moves BARs and turns decoding and bus mastering on and off; KVM follows: doorbells are
ioeventfds at the BAR's address of the moment, interrupts are messages.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pyvmm.bus import Bus
from pyvmm.host.log import Sink
from pyvmm.kvm.vm import Vm
from pyvmm.machine.board.board import PciPlaces
from pyvmm.machine.trace import Hook
from pyvmm.memory import GuestMemory
from pyvmm.pci.bus import ECAM_SIZE, ConfigPorts, PciBus
from pyvmm.pci.function import Bar, Function
from pyvmm.virtio.device import VirtioDevice

if TYPE_CHECKING:  # a machine with nothing on its bus starts without them
    from pyvmm.machine.messages import Messages
    from pyvmm.transport.pci import PciTransport

_INTEL, _BRIDGE, _HOST_BRIDGE_CLASS = 0x8086, 0x0D57, 0x060000


class PciHost:
    """Bus 0, and what has been plugged into it."""

    def __init__(
        self,
        places: PciPlaces,
        vm: Vm,
        make_messages: Callable[[], Messages],
        *,
        ports: Bus,
        mmio: Bus,
    ) -> None:
        """`make_messages` is called once, for the first device."""
        self._vm = vm
        self._make_messages = make_messages
        self._messages: Messages | None = None
        self._next = places.window
        self.bus = PciBus(places.window, places.window_size)
        self.bus.add(0, Function(_INTEL, _BRIDGE, _HOST_BRIDGE_CLASS))
        if places.config_port is not None:
            ports.register(places.config_port, ConfigPorts.SIZE, self.bus.ports)
        mmio.register(places.ecam, ECAM_SIZE, self.bus.ecam)
        mmio.register(places.window, places.window_size, self.bus.window)

    def attach(
        self,
        device: VirtioDevice,
        *,
        memory: GuestMemory,
        log: Sink,
        trace: Hook | None,
        closing: ExitStack,
    ) -> PciTransport:
        """See pyvmm.machine.attach.Plug."""
        from pyvmm.transport.pci import PciTransport, vectors_for

        if self._messages is None:
            self._messages = self._make_messages()
        lines = []
        for _ in range(vectors_for(device)):
            lines.append(self._messages.line())
            closing.callback(lines[-1].close)
        transport = PciTransport(device, memory, lines, log=log, trace=trace)
        closing.callback(transport.close)
        bar = transport.bar
        self._next = -(-self._next // bar.size) * bar.size
        transport.function.place(bar, self._next)
        self._next += bar.size
        transport.function.placement = _Place(transport, self._vm)
        number = 1 + max(self.bus.functions)
        self.bus.add(number, transport.function)
        closing.callback(self.bus.remove, number)
        return transport


class _Place:
    """Keeps the doorbells of one device where its BAR is."""

    def __init__(self, transport: PciTransport, vm: Vm) -> None:
        self._transport = transport
        self._vm = vm
        self._at: int | None = None

    def bar_moved(self, bar: Bar, address: int | None) -> None:
        if self._at is not None:
            self._bind(self._at, deassign=True)
        self._at = address
        if address is not None:
            self._bind(address, deassign=False)

    def _bind(self, address: int, *, deassign: bool) -> None:
        for bell in self._transport.doorbells:
            at = address + bell.offset
            self._vm.ioeventfd(bell.kick.fd, at, bell.size, datamatch=bell.match, deassign=deassign)

    def bus_master_changed(self, on: bool) -> None:
        self._transport.bus_master_changed(on)
