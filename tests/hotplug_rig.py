"""A machine without vCPUs, with a PCI bus that devices come to and go from: the test is its guest.

KVM is a record of what it was asked for, so that what is left of a device can be counted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from descriptors import open_descriptors

from pyvmm.bus import Bus
from pyvmm.kinds.vm_spec import validate
from pyvmm.kvm.x86 import irqchip
from pyvmm.machine.board.board import PciPlaces
from pyvmm.machine.builder import Parts, Prepared
from pyvmm.machine.machine import Machine
from pyvmm.machine.messages import Messages
from pyvmm.machine.outcome import Alarm
from pyvmm.machine.pci_host import PciHost
from pyvmm.machine.trace import Trace
from pyvmm.memory import GuestMemory
from pyvmm.monitor.hotplug import Hotplug
from pyvmm.monitor.open_devices import OpenDevices
from pyvmm.pci import registers as pci
from pyvmm.pci import slots
from pyvmm.spec.vm import VmSpec
from pyvmm.testing.pci_driver import PciDriver

SAFETY_TIMEOUT = 60.0
MIB = 1 << 20
PLACES = PciPlaces(0xE000_0000, 0xC000_0000, 0x1000_0000, 0xCF8, slots_port=0x620, slots_gsi=13)


class RecordingVm:
    """The doorbells and interrupts that KVM would have."""

    def __init__(self) -> None:
        self.doorbells: set[tuple[int, int]] = set()
        self.irqfds: set[tuple[int, int]] = set()
        self.routes: list[Any] = []
        self.pulses = 0

    def ioeventfd(
        self, fd: int, address: int, size: int, *, datamatch: int | None, deassign: bool
    ) -> None:
        (self.doorbells.remove if deassign else self.doorbells.add)((fd, address))

    def irqfd(self, fd: int, gsi: int, *, deassign: bool = False) -> None:
        (self.irqfds.remove if deassign else self.irqfds.add)((fd, gsi))

    def set_gsi_routing(self, routes: list[Any]) -> None:
        self.routes = routes

    def irq_line(self, gsi: int, level: bool) -> None:
        assert gsi == PLACES.slots_gsi
        self.pulses += level


class Rig:
    """The machine: `add` and `remove` are the monitor's, `asked` and `eject` the guest's."""

    def __init__(self, spec: VmSpec, closing: ExitStack, places: PciPlaces = PLACES) -> None:
        self.places = places
        self.vm = RecordingVm()
        self.memory = GuestMemory([(0, 2 * MIB)])
        closing.callback(self.memory.close)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.devices = closing.enter_context(
            OpenDevices("vm", None, Alarm(), lambda fd, size, read_only: 0)
        )
        spec = validate(spec)
        opened = tuple(self.devices.open(part) for part in spec.parts)
        self.prepared = Prepared(
            None, spec, self.memory, opened, (), SimpleNamespace(cmdline=""), Alarm()
        )
        self.boot = closing.enter_context(ExitStack())
        self.machine = Machine(self.assemble(self.prepared), Trace(()))
        self.changes: list[Parts] = []
        self.hotplug = Hotplug(
            self.machine,
            self.devices,
            Trace(()),
            tell=lambda kind, /, **details: self.events.append((kind, details)),
            changed=self.changes.append,
        )
        closing.callback(self.hotplug.close)

    def assemble(self, prepared: Prepared) -> Parts:
        """The parts of a start of the guest."""
        ports, mmio = Bus("I/O port"), Bus("MMIO")
        self.messages = Messages(self.vm, irqchip.default_routes(), lambda at: True)  # type: ignore[arg-type]
        host = PciHost(self.places, self.vm, lambda: self.messages, ports=ports, mmio=mmio)  # type: ignore[arg-type]
        host.on_eject = lambda number: self.hotplug.ejected(number)
        self.boot.callback(host.close)
        transports = tuple(
            host.attach(device, memory=self.memory, log=print, trace=None, closing=self.boot)
            for device in prepared.devices
        )
        return Parts(prepared, self.vm, ports, mmio, None, transports, (), pci=host)  # type: ignore[arg-type]

    @property
    def host(self) -> PciHost:
        host = self.machine.parts.pci
        assert host is not None
        return host

    @property
    def ids(self) -> list[str]:
        """The machine's devices."""
        return [device.name for device in self.machine.parts.prepared.devices]

    # --- the monitor ------------------------------------------------------------------------------

    def add(self, kind: str, value: Any) -> dict[str, Any]:
        return self.hotplug.add(kind, value)

    def remove(self, kind: str, id: str, timeout: float = SAFETY_TIMEOUT, force: bool = False):
        return self.hotplug.remove(kind, id, timeout, force)

    def removing(self, kind: str, id: str, **options: Any) -> Asking:
        """Somebody who asks for a removal, and waits in a thread."""
        return Asking(lambda: self.remove(kind, id, **options))

    # --- the guest --------------------------------------------------------------------------------

    def port(self, register: int) -> int:
        return self.machine.parts.ports.read(PLACES.slots_port + register, 4)  # type: ignore[operator]

    def set_port(self, register: int, value: int) -> None:
        self.machine.parts.ports.write(PLACES.slots_port + register, 4, value)  # type: ignore[operator]

    def asked(self, register: int) -> int:
        """The slots that the guest finds there, once there are some; it clears them, as the DSDT's
        method does."""
        until(lambda: self.port(register) != 0)
        found = self.port(register)
        self.set_port(register, found)
        return found

    def eject(self, number: int) -> None:
        """_EJ0"""
        self.set_port(slots.EJECT, 1 << number)

    def is_there(self, number: int) -> bool:
        return self.host.bus.read(number, 0, pci.PCI_VENDOR_ID, 2) == 0x1AF4

    def driver(self, number: int) -> PciDriver:
        """A driver in front of what is in a slot, at the BAR where firmware has put it."""
        bus = self.host.bus
        driver = PciDriver(bus.ecam, bus.window, PLACES.window, number, self.memory)
        driver.find()
        bar = bus.functions[number].bars[0]
        driver.place(bus.functions[number].address_of(bar))
        return driver

    def footprint(self) -> dict[str, Any]:
        """All that a device can leave."""
        host = self.host
        return {
            "descriptors": open_descriptors(),
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "doorbells": len(self.vm.doorbells),
            "irqfds": len(self.vm.irqfds),
            "gsis": len(self.messages._free),
            "routes": len(self.messages._routes),
            "functions": sorted(host.bus.functions),
            "window": host.bus.window._map,
            "plugged": sorted(host._plugged),
            "pending": host.slots._bits if host.slots is not None else None,
            "leaving": len(self.hotplug._leaving),
            "finishing": len(self.hotplug._finishing),
            "open": sorted(device.name for device in self.devices._closing),
            "parts": self.ids,
        }

    def is_as(self, before: dict[str, Any]) -> None:
        """Wait until the footprint is `before` again: the thread that takes a device out ends a
        moment after it has told so."""
        until(lambda: self.footprint() == before, lambda: f"{self.footprint()} is not yet {before}")


class Asking(threading.Thread):
    """Calls something; `result` returns or raises what that did."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True, name="asking")
        self._call = call
        self._found: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._found = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(SAFETY_TIMEOUT)
        assert not self.is_alive(), "it still waits"
        if self._error is not None:
            raise self._error
        return self._found


def until(condition: Callable[[], bool], what: Callable[[], str] = str) -> None:
    give_up_at = time.monotonic() + SAFETY_TIMEOUT
    while not condition():
        assert time.monotonic() < give_up_at, what()
        time.sleep(0.002)


@contextmanager
def machine(spec: VmSpec, places: PciPlaces = PLACES) -> Iterator[Rig]:
    """It runs from the start; all that it had is gone at the end."""
    with ExitStack() as closing:
        yield Rig(spec, closing, places)


def image(folder: Path, name: str = "data", size: int = MIB) -> Path:
    """A disk's image, with something in it."""
    path = folder / name
    path.write_bytes(os.urandom(4096) + bytes(size - 4096))
    return path
