"""The PCI host bridge of a machine: bus 0, where it answers, and how virtio devices are plugged in
and taken out, also while the guest runs.

A driver moves BARs and turns decoding and bus mastering on and off; KVM follows: doorbells are
ioeventfds at the BAR's address of the moment, shared memory is a memory slot there, interrupts are
messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm.bus import Bus
from pyvmm.errors import ConfigError, HostError
from pyvmm.host.log import Sink
from pyvmm.host.saved import CURE, Saved
from pyvmm.kvm.vm import Vm
from pyvmm.machine.board.board import PciPlaces
from pyvmm.machine.trace import Hook
from pyvmm.memory import GuestMemory
from pyvmm.pci import slots
from pyvmm.pci.bus import DEVICES, ECAM_SIZE, ConfigPorts, PciBus
from pyvmm.pci.function import Bar, Function
from pyvmm.virtio.device import SharedMemory, VirtioDevice

if TYPE_CHECKING:  # a machine with nothing on its bus starts without them
    from pyvmm.machine.mapped_files import FileSlot
    from pyvmm.machine.messages import Messages
    from pyvmm.transport.base import Doorbell
    from pyvmm.transport.pci import PciTransport

_FUNCTION_BITS = 3  # of a requester id: bus, device, function (PCIe Base 4.0, 2.2.4.2)
_INTEL, _BRIDGE, _HOST_BRIDGE_CLASS = 0x8086, 0x0D57, 0x060000


class _Plugged(NamedTuple):
    """The transport in a slot, its place in the window, and what unplugs it."""

    transport: PciTransport
    start: int
    closing: ExitStack


class PciHost:
    """Bus 0, and what has been plugged into it.

    `on_eject` hears of a device number that the guest gives up, in a vCPU's thread: whoever sets it
    takes the device out, or does not.
    """

    def __init__(
        self,
        places: PciPlaces,
        vm: Vm,
        make_messages: Callable[[], Messages],
        *,
        ports: Bus,
        mmio: Bus,
        memory_window: range = range(0),
        files: Sequence[FileSlot] = (),
    ) -> None:
        """`make_messages` is called once, for the first device. `files` are those that devices have
        as shared memory, within `memory_window`."""
        self._vm = vm
        self._make_messages = make_messages
        self._messages: Messages | None = None
        self._window_start = places.window
        self._window_end = places.window + places.window_size
        self._plugged: dict[int, _Plugged] = {}  # replaced as a whole, as any thread looks
        self._expected: Mapping[VirtioDevice, tuple[int, int] | None] = {}
        # Where functions were that were pulled away, by device numbers; the latest last.
        self._pulled: dict[int, tuple[int, int]] = {}
        self.on_eject: Callable[[int], None] = lambda number: None
        self.bus = PciBus(places.window, places.window_size)
        self.bus.add(0, Function(_INTEL, _BRIDGE, _HOST_BRIDGE_CLASS))
        if places.config_port is not None:
            ports.register(places.config_port, ConfigPorts.SIZE, self.bus.ports)
        mmio.register(places.ecam, ECAM_SIZE, self.bus.ecam)
        mmio.register(places.window, places.window_size, self.bus.window)
        self._files = {slot.file.guest_addr: slot for slot in files}
        if memory_window:
            start, size = memory_window.start, len(memory_window)
            mmio.register(start, size, self.bus.add_window(start, size))
        self.slots: slots.Slots | None = None
        if places.slots_port is not None:
            self._slots_gsi = places.slots_gsi
            self.slots = slots.Slots(self._interrupt, lambda number: self.on_eject(number))
            ports.register(places.slots_port, slots.SIZE, self.slots)

    def _interrupt(self) -> None:
        for level in (True, False):
            self._vm.irq_line(self._slots_gsi, level)

    def attach(
        self,
        device: VirtioDevice,
        *,
        memory: GuestMemory,
        log: Sink,
        trace: Hook | None,
        closing: ExitStack,
    ) -> PciTransport:
        """See pyvmm.machine.attach.Plug; raises ConfigError if every slot is taken."""
        number, transport = self._plug(device, memory, log, trace)
        closing.callback(self.unplug, number, transport)
        return transport

    def _plug(
        self, device: VirtioDevice, memory: GuestMemory, log: Sink, trace: Hook | None
    ) -> tuple[int, PciTransport]:
        place = self._expected.get(device)
        number = self._free_number() if place is None else place[0]
        from pyvmm.transport.pci import PciTransport, vectors_for

        if self._messages is None:
            self._messages = self._make_messages()
        with ExitStack() as closing:
            lines = []
            for _ in range(vectors_for(device)):
                lines.append(self._messages.line(number << _FUNCTION_BITS))
                closing.callback(lines[-1].close)
            file = next(map(self._file_of, device.shared_memory.values()), None)
            transport = PciTransport(device, memory, lines, shared=file, log=log, trace=trace)
            closing.callback(transport.close)
            size = transport.bar.size
            start = self._room_for(size) if place is None else place[1]
            if place is not None and not self._can_be(number, start, size):
                raise ConfigError(
                    f"the saved state of {device.name} cannot be: device {number} at {start:#x}",
                    cure=CURE,
                )
            transport.function.place(transport.bar, start)
            placement = _Place(transport, self._vm, file, transport.negotiation.warn)
            transport.function.placement = placement
            self.bus.add(number, transport.function)
            plugged = _Plugged(transport, start, closing.pop_all())
            self._plugged = {**self._plugged, number: plugged}
            self._pulled.pop(number, None)
        return number, transport

    def expect(self, places: Mapping[VirtioDevice, tuple[int, int] | None]) -> None:
        """These devices come to those places, which other ones of their machine had left free:
        see `place_of`. `attach` raises ConfigError for one that cannot be."""
        self._expected = places

    def _can_be(self, number: int, start: int, size: int) -> bool:
        is_free = 0 < number < DEVICES and number not in self.bus.functions
        is_inside = self._window_start <= start and start + size <= self._window_end
        others = (start < other_end and other < start + size for other, other_end in self._taken())
        return is_free and is_inside and not start % size and not any(others)

    def place_of(self, transport: object) -> tuple[int, int] | None:
        """The device number of `transport`, and the guest-physical address at which its BAR began;
        None if it is not plugged in here."""
        places = {id(one.transport): (n, one.start) for n, one in self._plugged.items()}
        return places.get(id(transport))

    def _free_number(self) -> int:
        """One from which no function was pulled away, or else as long ago as can be: the guest may
        not have seen yet that it has gone, and would take what comes for the same one."""
        free = [n for n in range(1, DEVICES) if n not in self.bus.functions]
        if not free:
            raise ConfigError(f"a PCI bus has {DEVICES - 1} devices at most", cure="remove one")
        pulled = list(self._pulled)
        return min(free, key=lambda n: (pulled.index(n) if n in pulled else -1, n))

    def _file_of(self, region: SharedMemory) -> FileSlot | None:
        return self._files.get(region.base)

    def _room_for(self, size: int) -> int:
        """An address for a BAR of `size` bytes: no other BAR is there, and none returns there by a
        reset. A driver whose function was pulled away may still write to where that was."""
        taken = list(self._taken())
        for avoided in ((*taken, *self._pulled.values()), taken):
            start = self._window_start
            for other_start, other_end in sorted(avoided):
                if start + size <= other_start:
                    break
                start = -(-max(start, other_end) // size) * size
            if start + size <= self._window_end:
                return start
        raise ConfigError("the PCI bus has no room for another device", cure="remove one")

    def _taken(self) -> Iterator[tuple[int, int]]:
        for transport, start, _ in self._plugged.values():
            places = [(start, transport.bar.size)]
            function = transport.function
            places += [(function.address_of(bar), bar.size) for bar in function.bars]
            for at, size in places:
                if self._window_start <= at < self._window_end:
                    yield at, at + size

    # --- saved and restored -----------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """The bus and the news of its slots; its devices' transports are saved by themselves.
        Raises ConfigError for a device that is about to go."""
        for number, one in self._plugged.items():
            if self.bus.functions.get(number) is not one.transport.function:
                name = one.transport.device.name
                raise ConfigError(f"the guest gives {name} up just now", cure="try again")
        saved: dict[str, Any] = {
            "bus": self.bus.save(),
            "slots": None if self.slots is None else self.slots.save(),
        }
        if self._pulled:
            saved["pulled"] = [
                {"device": number, "start": start, "end": end}
                for number, (start, end) in self._pulled.items()
            ]
        return saved

    def restore(self, saved: Saved) -> None:
        """Restore what `save` gave, to a bus with the same devices. Raises ConfigError."""
        self.bus.restore(saved.table("bus"))
        if self.slots is not None:
            self.slots.restore(saved.table("slots"))
        for one in saved.tables("pulled", DEVICES) if saved.has("pulled") else ():
            start, end = (one.integer(name, self._window_end) for name in ("start", "end"))
            self._pulled[one.integer("device", DEVICES - 1)] = start, end

    # --- devices that come and go -----------------------------------------------------------------

    def arrive(
        self, device: VirtioDevice, *, memory: GuestMemory, log: Sink, trace: Hook | None
    ) -> tuple[int, PciTransport]:
        """Plug `device` in and tell the guest; its device number. Raises ConfigError without a
        place, HostError if KVM refuses."""
        number, transport = self._plug(device, memory, log, trace)
        self.withdraw(number)  # else the guest would eject this one in place of a former one
        self.tell(slots.ARRIVED, number)
        return number, transport

    def tell(self, what: int, number: int) -> None:
        """Have the guest look at a slot: slots.ARRIVED or LEAVING."""
        if self.slots is not None:
            self.slots.tell(what, number)

    def withdraw(self, number: int) -> None:
        """Take back the news of a slot that the guest has not read yet."""
        if self.slots is not None:
            self.slots.withdraw(number)

    def number_of(self, transport: object) -> int | None:
        """The device number of `transport`; None if it is not plugged in here."""
        found = (n for n, plugged in self._plugged.items() if plugged.transport is transport)
        return next(found, None)

    def transport_at(self, number: int) -> PciTransport | None:
        """The transport of device `number`."""
        plugged = self._plugged.get(number)
        return None if plugged is None else plugged.transport

    def detach(self, number: int, transport: object, *, pulled: bool = False) -> None:
        """Have `transport` not answer at `number` any more: no register, no doorbell, no DMA, no
        interrupt. The parts that serve the device stay until `unplug`. The bus stays as it is if
        the device has left, or if another one has come since. `pulled`: see PciBus.remove."""
        plugged = self._plugged.get(number)
        if plugged is not None and plugged.transport is transport:
            function = plugged.transport.function
            if pulled:
                bar = plugged.transport.bar
                start = self.bus.where(bar)
                self._pulled.pop(number, None)  # it is the latest now
                self._pulled[number] = (0, 0) if start is None else (start, start + bar.size)
            self.bus.remove(number, function, pulled=pulled)

    def unplug(self, number: int, transport: object) -> None:
        """Take out `transport`, and remove all that it had. No vCPU may be inside one of its
        handlers. A second call has no effect."""
        plugged = self._plugged.get(number)
        if plugged is None or plugged.transport is not transport:
            return
        self.bus.remove(number, plugged.transport.function)
        self.withdraw(number)
        plugged.closing.close()
        self._plugged = {at: one for at, one in self._plugged.items() if at != number}

    def close(self) -> None:
        """Unplug all that is left; the guest must be stopped."""
        for number, plugged in reversed(self._plugged.items()):
            self.unplug(number, plugged.transport)


class _Place:
    """Keeps the doorbells of one device where its BAR is, and the `file` that is its shared memory
    where that one's is.

    A driver says when, so what KVM refuses then is not a reason to end the VM: a write that it does
    not catch reaches the transport, and what is not memory its file, at the price of an exit.
    """

    def __init__(
        self,
        transport: PciTransport,
        vm: Vm,
        file: FileSlot | None,
        warn: Callable[[str], None],
    ) -> None:
        self._transport = transport
        self._vm = vm
        self._file = file
        self._warn = warn
        self._bound: list[tuple[Doorbell, int]] = []

    def bar_moved(self, bar: Bar, address: int | None) -> None:
        self._transport.bar_moved(bar, address)
        if bar is self._transport.bar:
            self._move_doorbells(address)
        elif self._file is not None:
            try:
                self._file.put(address)
            except HostError as error:
                self._warn(f"accesses to shared memory cost an exit each: {error}")

    def _move_doorbells(self, address: int | None) -> None:
        bound, self._bound = self._bound, []
        for bell, at in bound:
            try:
                self._bind(bell, at, deassign=True)
            except HostError as error:
                self._warn(f"a doorbell stays at {at:#x}: {error}")
        if address is None:
            return
        for bell in self._transport.doorbells:
            at = address + bell.offset
            try:
                self._bind(bell, at, deassign=False)
            except HostError as error:
                self._warn(f"kicks of queues cost an exit each: {error}")
                return
            self._bound.append((bell, at))

    def _bind(self, bell: Doorbell, at: int, *, deassign: bool) -> None:
        self._vm.ioeventfd(bell.kick.fd, at, bell.size, datamatch=bell.match, deassign=deassign)

    def bus_master_changed(self, on: bool) -> None:
        self._transport.bus_master_changed(on)

    def function_reset(self) -> None:
        self._transport.function_reset()
