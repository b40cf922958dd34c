"""From a checked specification to a machine that can run, in short stages.

`prepare` does all that needs no KVM: it fills guest memory, so whatever the user got wrong shows
there, also when the machine will run elsewhere. `assemble` adds KVM. What a stage opens is closed
in reverse order, whichever stage fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, NamedTuple

from pyvmm.boot import x86 as boot
from pyvmm.bus import Bus, Handler
from pyvmm.errors import ConfigError, HostError
from pyvmm.host import log
from pyvmm.kvm import kick, uapi
from pyvmm.kvm.stats import StatsFile
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.kvm.x86.boot_vcpu import setup_boot_vcpu, setup_vcpu
from pyvmm.kvm.x86.cpuid import CpuidEntry, address_bits
from pyvmm.machine.alarm import Alarm
from pyvmm.machine.attach import attach_virtio
from pyvmm.machine.board.x86 import layout
from pyvmm.machine.cmdline import command_line
from pyvmm.machine.resources import VirtioSlot, virtio_slots
from pyvmm.machine.run_loop import AccessCounts
from pyvmm.machine.trace import Trace
from pyvmm.memory import GuestMemory
from pyvmm.platform.serial import BURST, Serial
from pyvmm.platform.x86 import acpi_pm, cmos, i8042
from pyvmm.spec.vm import VmSpec
from pyvmm.transport.base import Transport
from pyvmm.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from pyvmm.machine.mapped_files import MappedFiles


class Prepared(NamedTuple):
    """All of a machine that needs no KVM: memory with the kernel in it, and open devices."""

    spec: VmSpec
    memory: GuestMemory
    devices: tuple[VirtioDevice, ...]
    slots: tuple[VirtioSlot, ...]
    entry: boot.Entry
    alarm: Alarm
    files: MappedFiles | None = None
    quiet: bool = False


class Parts(NamedTuple):
    """An assembled machine, ready for its vCPU threads."""

    prepared: Prepared
    vm: Vm
    ports: Bus
    mmio: Bus
    serial: Serial
    transports: tuple[Transport, ...]
    vcpus: tuple[Vcpu, ...]
    stats: tuple[StatsFile, ...] = ()  # of the vCPUs
    counts: AccessCounts | None = None  # where KVM does not count exits itself


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
    slots = virtio_slots(len(devices))
    memory = _allocate(spec.memory)
    closing.callback(memory.close)
    entry = _load(spec, slots, memory, quiet=quiet)
    return Prepared(spec, memory, devices, slots, entry, alarm, files, quiet)


def prepare_again(prepared: Prepared) -> Prepared:
    """The same with fresh memory and its kernel loaded anew; nothing of it may run. Raises
    ConfigError or HostError."""
    memory = prepared.memory
    for region in memory.regions:
        memory.discard(region.guest_addr, region.size)
    entry = _load(prepared.spec, prepared.slots, memory, quiet=prepared.quiet)
    return prepared._replace(entry=entry)


def check_boot(spec: VmSpec) -> None:
    """Raise the ConfigError that loading the kernel would raise, and keep nothing."""
    with closing(_allocate(spec.memory)) as memory:
        slots = virtio_slots(len(spec.disks) + len(spec.devices))
        _load(spec, slots, memory, quiet=True)


def _load(
    spec: VmSpec, slots: tuple[VirtioSlot, ...], memory: GuestMemory, *, quiet: bool
) -> boot.Entry:
    return boot.load(
        memory,
        kernel=spec.kernel,
        initrd=spec.initrd,
        cmdline=command_line(spec, quiet=quiet),
        acpi=boot.AcpiConfig(
            fixed=layout.FIXED_DEVICES,
            cpus=spec.cpus,
            virtio=tuple(boot.VirtioMmioDevice(s.base, s.size, s.gsi) for s in slots),
        ),
        virtio_discovery=spec.discovery,
    )


def _allocate(size: int) -> GuestMemory:
    try:
        return GuestMemory(boot.ram_ranges(size))
    except HostError as error:
        raise ConfigError(
            f"this machine does not give {size >> 20} MiB: {error}",
            cure="ask for less",
            option="--memory",
        ) from None


def open_kvm(cpus: int, closing: ExitStack) -> Kvm:
    """This machine's KVM. Raises ConfigError or HostError if it is not up to a guest with so many
    vCPUs."""
    kvm = Kvm.open()
    closing.callback(kvm.close)
    kvm.check_required()
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
    kick.install()
    vm = kvm.create_vm()
    closing.callback(vm.close)
    _add_memory(vm, prepared.memory)
    _add_irqchip(vm)
    ports, mmio = Bus("I/O port"), Bus("MMIO")
    supported = kvm.supported_cpuid()
    if prepared.files is not None:
        prepared.files.add_to(
            vm,
            mmio,
            len(prepared.memory.regions),
            address_bits(supported),
            log.of_vm(prepared.spec.name),
        )
    serial = _add_platform(vm, ports, sink, cpus=prepared.spec.cpus)
    closing.callback(serial.close)
    transports = tuple(
        attach_virtio(
            device,
            slot,
            vm_name=prepared.spec.name,
            vm=vm,
            memory=prepared.memory,
            bus=mmio,
            trace=trace,
            closing=closing,
        )
        for device, slot in zip(prepared.devices, prepared.slots, strict=True)
    )
    vcpus = _add_vcpus(supported, vm, prepared, closing)
    if not vm.check_extension(uapi.KVM_CAP_BINARY_STATS_FD):
        return Parts(prepared, vm, ports, mmio, serial, transports, vcpus, (), AccessCounts())
    stats = tuple(closing.enter_context(StatsFile(vcpu.fd)) for vcpu in vcpus)
    return Parts(prepared, vm, ports, mmio, serial, transports, vcpus, stats)


def _add_memory(vm: Vm, memory: GuestMemory) -> None:
    for slot, region in enumerate(memory.regions):
        vm.set_memory_region(slot, region.guest_addr, region.size, region.host_addr)


def _add_irqchip(vm: Vm) -> None:
    vm.set_tss_addr(layout.KVM_TSS)
    vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
    vm.create_irqchip()
    vm.create_pit2()


def _add_platform(vm: Vm, ports: Bus, sink: Callable[[bytes], None], *, cpus: int) -> Serial:
    def interrupt(level: bool) -> None:
        vm.irq_line(layout.SERIAL_GSI, level)

    serial = Serial(interrupt, sink, burst=BURST if cpus > 1 else math.inf)
    fixed: list[tuple[int, int, Handler]] = [
        (layout.SERIAL_PORT, layout.SERIAL_PORTS, serial),
        (layout.I8042_DATA_PORT, i8042.PORTS, i8042.I8042()),
        (layout.ACPI_SLEEP_CONTROL_PORT, acpi_pm.PORTS, acpi_pm.AcpiPm()),
        (cmos.CMOS_PORT, cmos.PORTS, cmos.Cmos()),
        (cmos.DELAY_PORT, 1, cmos.DelayPort()),
    ]
    for start, size, handler in fixed:
        ports.register(start, size, handler)
    return serial


def _add_vcpus(
    supported: list[CpuidEntry], vm: Vm, prepared: Prepared, closing: ExitStack
) -> tuple[Vcpu, ...]:
    count = prepared.spec.cpus
    vcpus = []
    for index in range(count):
        vcpu = vm.create_vcpu(index)
        closing.callback(vcpu.close)
        setup_vcpu(vcpu, supported, index, count)
        vcpus.append(vcpu)
    entry = prepared.entry
    setup_boot_vcpu(
        vcpus[0],
        mode="long64" if entry.mode == boot.LONG64 else "protected32",
        rip=entry.rip,
        gdt_base=entry.gdt_base,
        rsp=entry.rsp,
        rsi=entry.rsi,
        rbx=entry.rbx,
        cr3=entry.cr3,
    )
    return tuple(vcpus)
