"""Joins the vCPU loop to the buses; with a trace in between if exits are to be shown."""

from __future__ import annotations

from pyvmm.bus import Action, Bus, Handler
from pyvmm.kvm.loop import run_until_exit
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.machine.trace import Hook
from pyvmm.machine.vcpu_runner import RunLoop


def make_run_loop(ports: Bus, mmio: Bus, trace: Hook | None) -> RunLoop:
    """A loop over exits that serves `ports` and `mmio`, and shows each access to `trace`."""
    pio_space: Bus | TracedBus = ports
    mmio_space: Bus | TracedBus = mmio
    if trace is not None:
        pio_space, mmio_space = TracedBus(ports, trace), TracedBus(mmio, trace)

    def loop(vcpu: Vcpu) -> Action | None:
        return run_until_exit(vcpu, pio_space, mmio_space)

    return loop


class TracedBus:
    """A bus that tells `trace` of every access; answers exactly as `bus` does."""

    def __init__(self, bus: Bus, trace: Hook) -> None:
        self._bus = bus
        self._trace = trace

    def find(self, address: int) -> tuple[int, Handler] | None:
        """Claims every address as a range of its own, so that no access goes unseen."""
        return 0, _TracedAddresses(self)

    def read(self, address: int, size: int) -> int:
        value = self._bus.read(address, size)
        self._trace(f"{self._bus.name} read {address:#x} size {size} -> {value:#x}")
        return value

    def write(self, address: int, size: int, value: int) -> Action | None:
        self._trace(f"{self._bus.name} write {address:#x} size {size} <- {value:#x}")
        return self._bus.write(address, size, value)


class _TracedAddresses:
    """The whole address space as one handler, whose offsets are addresses."""

    def __init__(self, space: TracedBus) -> None:
        self.read = space.read
        self.write = space.write
