"""From a checked specification to a machine that can run, in short stages.

`prepare` does all that needs no KVM: it fills guest memory, so whatever the user got wrong shows
there, also when the machine will run elsewhere. `assemble` adds KVM. What a stage opens is closed
in reverse order, whichever stage fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm.bus import Bus
from pyvmm.errors import ConfigError, HostError
from pyvmm.host import log
from pyvmm.kvm import kick, uapi
from pyvmm.kvm.stats import StatsFile
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.machine.attach import MmioSlots, virtio_hook
from pyvmm.machine.board.board import Board, VirtioSlot
from pyvmm.machine.board.registry import board_of
from pyvmm.machine.cmdline import command_line, turns_pci_off
from pyvmm.machine.outcome import Alarm
from pyvmm.machine.run_loop import AccessCounts
from pyvmm.machine.trace import Trace
from pyvmm.memory import GuestMemory
from pyvmm.spec.vm import VmSpec
from pyvmm.transport.base import Transport
from pyvmm.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from pyvmm.machine.attach import Plug
    from pyvmm.machine.board.board import Component, Entry, PowerButton, SerialPort
    from pyvmm.machine.mapped_files import FileSlot, MappedFiles
    from pyvmm.machine.pci_host import PciHost


class GoesOn(NamedTuple):
    """In the place of an Entry: the vCPUs go on from a saved state. `cmdline` is what the kernel
    was given once. `places` has each device's on PCI (see PciHost.place_of), None for one on
    virtio-mmio; it is empty if each has the place that it has at a start."""

    cmdline: str
    places: tuple[tuple[int, int] | None, ...] = ()


class Prepared(NamedTuple):
    """All of a machine that needs no KVM: memory with the kernel in it, and open devices. Those in
    `late` came after the start: they are on PCI, whatever the transport of the others."""

    board: Board[Any]
    spec: VmSpec
    memory: GuestMemory
    devices: tuple[VirtioDevice, ...]
    slots: tuple[VirtioSlot, ...]
    entry: Entry
    alarm: Alarm
    files: MappedFiles | None = None
    quiet: bool = False
    late: frozenset[VirtioDevice] = frozenset()

    @property
    def console(self) -> str:
        """The guest's kernel's name of the console that is on the terminal."""
        return self.spec.console or self.board.console


class Parts(NamedTuple):
    """An assembled machine, ready for its vCPU threads."""

    prepared: Prepared
    vm: Vm
    ports: Bus
    mmio: Bus
    serial: SerialPort
    transports: tuple[Transport, ...]
    vcpus: tuple[Vcpu, ...]
    power_button: PowerButton | None = None
    pci: PciHost | None = None  # of a board with a PCI bus
    stats: tuple[StatsFile, ...] = ()  # of the vCPUs
    counts: AccessCounts | None = None  # where KVM does not count exits itself
    platform: Mapping[str, Component] = MappingProxyType({})  # the board's devices, by name
    kvm: Kvm | None = None


def prepare(
    spec: VmSpec,
    devices: tuple[VirtioDevice, ...],
    alarm: Alarm,
    closing: ExitStack,
    *,
    files: MappedFiles | None = None,
    quiet: bool = False,
) -> Prepared:
    """Load the kernel of a machine with the open `devices`, which end a run by `alarm`, and with
    the `files` that are memory. Raises ConfigError for what the user can mend.

    `quiet` asks the kernel for little console output (unless the user's command line differs).
    """
    board = board_of(spec.arch)
    slots = _slots(board, spec, len(devices))
    memory = _allocate(board, spec.memory)
    closing.callback(memory.close)
    entry = _load(board, spec, slots, memory, quiet=quiet, files=files)
    if spec.transport == "pci" and turns_pci_off(entry.cmdline):
        log.of_vm(spec.name)(
            "the guest finds no device: pci=off on its command line hides their bus; leave that "
            "out, or use --transport mmio"
        )
    return Prepared(board, spec, memory, devices, slots, entry, alarm, files, quiet)


def prepare_restored(
    spec: VmSpec,
    devices: tuple[VirtioDevice, ...],
    alarm: Alarm,
    closing: ExitStack,
    memory: GuestMemory,
    goes_on: GoesOn,
    files: MappedFiles | None = None,
) -> Prepared:
    """A machine that goes on from a saved state, in whose `memory` all lies already; `closing`
    gives that back. `files` are those that are memory. Raises ConfigError."""
    board = board_of(spec.arch)
    closing.callback(memory.close)
    placed = zip(devices, goes_on.places, strict=False)
    late = frozenset(device for device, place in placed if place is not None)
    slots = _slots(board, spec, len(devices) - len(late))
    return Prepared(board, spec, memory, devices, slots, goes_on, alarm, files, late=late)


def check_lending(device: VirtioDevice, memory: GuestMemory) -> None:
    """Raise ConfigError for a device that another process serves, if that cannot have `memory`."""
    if device.lends_memory and memory.fd < 0:
        raise ConfigError(
            f"{device.name} is served by another process (vhost-user), which cannot have the "
            "memory of a VM that goes on from a snapshot",
            cure="use a VM that was started anew for that",
        )


def prepare_again(prepared: Prepared) -> Prepared:
    """The same with fresh memory and its kernel loaded anew; nothing of it may run. Raises
    ConfigError or HostError."""
    memory = prepared.memory
    for region in memory.regions:
        memory.discard(region.guest_addr, region.size)
    entry = _load(
        prepared.board,
        prepared.spec,
        prepared.slots,
        memory,
        quiet=prepared.quiet,
        files=prepared.files,
    )
    return prepared._replace(entry=entry)


def check_boot(spec: VmSpec) -> None:
    """Raise the ConfigError that loading the kernel would raise, and keep nothing."""
    board = board_of(spec.arch)
    with closing(_allocate(board, spec.memory)) as memory:
        slots = _slots(board, spec, len(spec.disks) + len(spec.devices))
        _load(board, spec, slots, memory, quiet=True)


def _slots(board: Board[Any], spec: VmSpec, count: int) -> tuple[VirtioSlot, ...]:
    """The places of virtio-mmio devices. Raises ConfigError where there is no PCI bus."""
    if spec.transport != "pci":
        return board.virtio_slots(count)
    if board.pci_places is None:
        raise ConfigError(
            "machines of this architecture have no PCI bus",
            cure="use --transport mmio",
            option="--transport",
        )
    return ()


def _load(
    board: Board[Any],
    spec: VmSpec,
    slots: tuple[VirtioSlot, ...],
    memory: GuestMemory,
    *,
    quiet: bool,
    files: MappedFiles | None = None,
) -> Entry:
    entry: Entry = board.load(
        memory,
        kernel=spec.kernel,
        initrd=spec.initrd,
        cmdline=command_line(spec, board, quiet=quiet),
        cpus=spec.cpus,
        slots=slots,
        discovery=spec.discovery,
        memory_window=_memory_window(spec, files),
    )
    return entry


def _allocate(board: Board[Any], size: int) -> GuestMemory:
    try:
        return GuestMemory(board.ram_ranges(size))
    except HostError as error:
        raise ConfigError(
            f"this machine does not give {size >> 20} MiB: {error}",
            cure="ask for less",
            option="--memory",
        ) from None


def open_kvm(board: Board[Any], cpus: int, closing: ExitStack) -> Kvm:
    """This machine's KVM. Raises ConfigError or HostError if it is not up to a guest with so many
    vCPUs."""
    kvm = Kvm.open()
    closing.callback(kvm.close)
    kvm.check_required(board.requirements)
    if cpus > kvm.max_vcpus:
        raise ConfigError(
            f"this machine's KVM gives a guest {kvm.max_vcpus} vCPUs at most",
            cure="ask for fewer",
            option="--cpus",
        )
    return kvm


def assemble(
    prepared: Prepared,
    kvm: Kvm,
    trace: Trace,
    sink: Callable[[bytes], None],
    closing: ExitStack,
) -> Parts:
    """Put the machine together around `kvm`; `sink` gets the serial port's output.

    Raises HostError if KVM refuses.
    """
    board, spec = prepared.board, prepared.spec
    kick.install()
    vm = board.create_vm(kvm, prepared.memory)
    closing.callback(vm.close)
    _add_memory(vm, prepared.memory)
    ports, mmio = Bus("I/O port"), Bus("MMIO")
    core = board.build(
        kvm,
        vm,
        entry=None if isinstance(prepared.entry, GoesOn) else prepared.entry,
        cpus=spec.cpus,
        ports=ports,
        mmio=mmio,
        sink=sink,
        closing=closing,
    )
    pci = _add_pci(prepared, vm, ports, mmio, _add_files(prepared, kvm, vm, mmio))
    if pci is not None:
        closing.callback(pci.close)
    transports = _attach(prepared, vm, mmio, pci, trace, closing)
    parts = Parts(
        prepared,
        vm,
        ports,
        mmio,
        core.serial,
        transports,
        core.vcpus,
        core.power_button,
        pci,
        platform=core.platform,
        kvm=kvm,
    )
    if not vm.check_extension(uapi.KVM_CAP_BINARY_STATS_FD):
        return parts._replace(counts=AccessCounts())
    return parts._replace(stats=tuple(closing.enter_context(StatsFile(v.fd)) for v in core.vcpus))


def _add_files(prepared: Prepared, kvm: Kvm, vm: Vm, mmio: Bus) -> list[FileSlot]:
    """The files that are memory: at their places, or on PCI for their devices' BARs."""
    files = prepared.files
    if files is None:
        return []
    bits = prepared.board.address_bits(kvm)
    first, warn = len(prepared.memory.regions), log.of_vm(prepared.spec.name)
    if prepared.spec.transport != "pci":
        files.add_to(vm, mmio, first, bits, warn)
        return []
    files.check_reach(bits)
    return files.slots(vm, first, warn)


def _add_pci(
    prepared: Prepared, vm: Vm, ports: Bus, mmio: Bus, files: list[FileSlot]
) -> PciHost | None:
    """The PCI bus, whether a device is on it or not: one may come later."""
    board = prepared.board
    places = board.pci_places
    if places is None:
        return None
    from pyvmm.machine.pci_host import PciHost

    return PciHost(
        places,
        vm,
        partial(board.messages, vm),
        ports=ports,
        mmio=mmio,
        memory_window=_memory_window(prepared.spec, prepared.files),
        files=files,
    )


def _memory_window(spec: VmSpec, files: MappedFiles | None) -> range:
    """The window for BARs that are memory."""
    return range(0) if files is None or spec.transport != "pci" else files.window


def _attach(
    prepared: Prepared,
    vm: Vm,
    mmio: Bus,
    pci: PciHost | None,
    trace: Trace,
    closing: ExitStack,
) -> tuple[Transport, ...]:
    """The devices' transports, in their order."""
    spec = prepared.spec
    usual: Plug = MmioSlots(prepared.slots, vm, mmio)
    if spec.transport == "pci" and pci is not None:
        usual = pci
    if pci is not None and isinstance(prepared.entry, GoesOn):
        pci.expect(dict(zip(prepared.devices, prepared.entry.places, strict=False)))
    return tuple(
        (pci if device in prepared.late and pci is not None else usual).attach(
            device,
            memory=prepared.memory,
            log=log.of_vm(spec.name),  # the transport limits the rate
            trace=virtio_hook(trace),
            closing=closing,
        )
        for device in prepared.devices
    )


def _add_memory(vm: Vm, memory: GuestMemory) -> None:
    for slot, region in enumerate(memory.regions):
        vm.set_memory_region(slot, region.guest_addr, region.size, region.host_addr)
