"""Joins the vCPU loop to the buses; with a trace in between if exits are to be shown, or a count if
KVM does not count them."""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.bus import Action, Bus, Handler
from pyvmm.kvm.loop import run_until_exit
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.machine.trace import Hook
from pyvmm.machine.vcpu_runner import RunLoop


class AccessCounts:
    """The number of accesses of each kind that pyvmm has served. Any vCPU adds to it. There is no
    lock, so one access in a million is lost, when two vCPUs add at the same time."""

    def __init__(self) -> None:
        self.io = 0
        self.mmio = 0

    def exits(self) -> dict[str, int]:
        """As MachineStats has them."""
        return {"total": self.io + self.mmio, "io": self.io, "mmio": self.mmio}


def make_run_loop(
    ports: Bus, mmio: Bus, trace: Hook | None, counts: AccessCounts | None = None
) -> RunLoop:
    """A loop over exits that serves `ports` and `mmio`, and shows each access to `trace`."""
    pio_space: Bus | TracedBus = ports
    mmio_space: Bus | TracedBus = mmio
    if trace is not None:
        pio_space, mmio_space = TracedBus(ports, trace), TracedBus(mmio, trace)
    if counts is not None:
        return _counting_loop(pio_space, mmio_space, counts)

    def loop(vcpu: Vcpu) -> Action | None:
        return run_until_exit(vcpu, pio_space, mmio_space)

    return loop


def _counting_loop(
    pio_space: Bus | TracedBus, mmio_space: Bus | TracedBus, counts: AccessCounts
) -> RunLoop:
    def count_io() -> None:
        counts.io += 1

    def count_mmio() -> None:
        counts.mmio += 1

    pio = CountedBus(pio_space, count_io)
    mmio = CountedBus(mmio_space, count_mmio)

    def loop(vcpu: Vcpu) -> Action | None:
        return run_until_exit(vcpu, pio, mmio)

    return loop


class CountedBus:
    """A bus that calls `count` at every access; answers exactly as `bus` does."""

    def __init__(self, bus: Bus | TracedBus, count: Callable[[], None]) -> None:
        self._bus = bus
        self._count = count

    def find(self, address: int) -> tuple[int, Handler] | None:
        found = self._bus.find(address)
        return None if found is None else (found[0], _Counted(found[1], self._count))

    def read(self, address: int, size: int) -> int:
        self._count()
        return self._bus.read(address, size)

    def write(self, address: int, size: int, value: int) -> Action | None:
        self._count()
        return self._bus.write(address, size, value)


class _Counted:
    def __init__(self, handler: Handler, count: Callable[[], None]) -> None:
        self._handler = handler
        self._count = count

    def read(self, offset: int, size: int) -> int:
        self._count()
        return self._handler.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> Action | None:
        self._count()
        return self._handler.write(offset, size, value)


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
