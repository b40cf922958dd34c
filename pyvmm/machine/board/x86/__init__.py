"""The x86 machine: a PC without a past, whose devices ACPI describes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pyvmm.boot import x86 as boot
from pyvmm.bus import Bus, Handler
from pyvmm.errors import how_many
from pyvmm.host.saved import Saved
from pyvmm.kvm.capabilities import Requirement
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.kvm.x86 import cpuid, irqchip
from pyvmm.kvm.x86.boot_vcpu import setup_boot_vcpu, setup_vcpu
from pyvmm.kvm.x86.capabilities import REQUIRED
from pyvmm.machine.board.board import Board, Core, PciPlaces, VirtioSlot
from pyvmm.machine.board.x86 import layout
from pyvmm.memory import GuestMemory
from pyvmm.platform.serial import BURST, Serial
from pyvmm.platform.x86 import acpi_pm, cmos, i8042

if TYPE_CHECKING:
    from pyvmm.kvm.x86.probe_guest import ProbeGuest
    from pyvmm.machine.messages import Messages


class X86Board(Board[boot.Entry]):
    """See Board. It is made of `layout` and pyvmm/boot/x86, pyvmm/kvm/x86, pyvmm/platform/x86."""

    console = "ttyS0"
    early_console = "earlyprintk=serial,ttyS0,115200"
    kernel_parameters = ("reboot=k",)  # which is tried where ACPI's reset register is not
    kernel_files = ("arch/x86/boot/bzImage", "vmlinux")
    found_by = MappingProxyType(
        {
            "mmio": ("ACPI", "VIRTIO_MMIO_CMDLINE_DEVICES"),
            "pci": ("PCI_MMCONFIG", "PCI_DIRECT"),
        }
    )

    def ram_ranges(self, size: int) -> list[tuple[int, int]]:
        return boot.ram_ranges(size)

    def mapped_files(self, ram: int) -> range:
        start = layout.mapped_files_start(ram)
        return range(start, start + layout.MAX_MAPPED_FILES)

    def virtio_slots(self, count: int) -> tuple[VirtioSlot, ...]:
        if count > len(layout.VIRTIO_GSIS):
            raise ValueError(f"{count} virtio devices, {len(layout.VIRTIO_GSIS)} interrupt lines")
        return tuple(
            VirtioSlot(
                layout.VIRTIO_MMIO_BASE + index * layout.VIRTIO_MMIO_STRIDE,
                layout.VIRTIO_MMIO_SIZE,
                gsi,
            )
            for index, gsi in enumerate(layout.VIRTIO_GSIS[:count])
        )

    @property
    def pci_places(self) -> PciPlaces:
        host = layout.PCI_HOST
        return PciPlaces(
            host.ecam,
            host.window,
            host.window_size,
            host.config_port,
            host.slots_port,
            host.slots_gsi,
        )

    def load(
        self,
        memory: GuestMemory,
        *,
        kernel: str,
        initrd: str | None,
        cmdline: str,
        cpus: int,
        slots: Sequence[VirtioSlot],
        discovery: str,
        memory_window: range = range(0),
    ) -> boot.Entry:
        return boot.load(
            memory,
            kernel=kernel,
            initrd=initrd,
            cmdline=cmdline,
            acpi=boot.AcpiConfig(
                fixed=layout.FIXED_DEVICES,
                cpus=cpus,
                virtio=tuple(boot.VirtioMmioDevice(*slot) for slot in slots),
                pci=layout.PCI_HOST._replace(memory_window=memory_window),
            ),
            virtio_discovery=discovery,
        )

    def kernel_release(self, path: str) -> str:
        from pyvmm.boot.x86.release import release_of

        return release_of(path)

    def kernel_config(self, path: str) -> str:
        from pyvmm.boot.x86.release import config_of

        return config_of(path)

    def unpack_kernel(self, path: str, target: str) -> None:
        from pyvmm.boot.x86.payload import unpack_vmlinux

        unpack_vmlinux(path, target)

    @property
    def requirements(self) -> Sequence[Requirement]:
        return REQUIRED

    def probe_guest(self, kvm: Kvm) -> ProbeGuest:
        from pyvmm.kvm.x86.probe_guest import ProbeGuest

        return ProbeGuest(kvm)

    def address_bits(self, kvm: Kvm) -> int:
        return cpuid.address_bits(cpuid.supported(kvm))

    def create_vm(self, kvm: Kvm, memory: GuestMemory) -> Vm:
        return kvm.create_vm()

    def messages(self, vm: Vm) -> Messages:
        from pyvmm.machine.messages import Messages

        return Messages(vm, irqchip.default_routes(), layout.is_message)

    def build(
        self,
        kvm: Kvm,
        vm: Vm,
        *,
        entry: boot.Entry | None,
        cpus: int,
        ports: Bus,
        mmio: Bus,
        sink: Callable[[bytes], None],
        closing: ExitStack,
    ) -> Core:
        _add_irqchip(vm)
        serial, platform = _add_platform(vm, ports, sink, cpus=cpus)
        closing.callback(serial.close)
        vcpus = _add_vcpus(kvm, vm, entry, cpus, closing)
        return Core(vcpus, serial, PowerButton(vm), platform)

    def save(
        self, kvm: Kvm, vm: Vm, on_vcpus: Callable[[Callable[[Vcpu], Any]], list[Any]]
    ) -> dict[str, Any]:
        from pyvmm.kvm.x86 import saved_vcpu

        host = saved_vcpu.HostAbilities(kvm)
        vcpus = on_vcpus(lambda vcpu: saved_vcpu.save(vcpu, host))
        return {"vcpus": vcpus, "vm": irqchip.save(vm)}

    def check_saved(self, kvm: Kvm, saved: Saved, cpus: int) -> None:
        from pyvmm.kvm.x86 import saved_vcpu

        irqchip.check(kvm)
        states = _saved_vcpus(saved, cpus)
        saved_vcpu.check(kvm, states, partial(_leaves_of_a_guest, kvm, cpus))

    def restore(
        self,
        kvm: Kvm,
        vm: Vm,
        vcpus: Sequence[Vcpu],
        saved: Saved,
        warn: Callable[[str], None],
    ) -> None:
        from pyvmm.kvm.x86 import saved_vcpu

        states = _saved_vcpus(saved, len(vcpus))
        for vcpu, state in zip(vcpus, states, strict=True):
            saved_vcpu.check_cpu(vcpu, state)
        host = saved_vcpu.HostAbilities(kvm)
        for vcpu, state in zip(vcpus, states, strict=True):
            saved_vcpu.restore(vcpu, state, host, warn)
        irqchip.restore(vm, saved.table("vm"))

    def start_clock(self, vm: Vm, saved: Saved) -> None:
        """See Board: the paravirtual clock."""
        irqchip.start_clock(vm, saved.table("vm"))

    def import_restoring(self) -> None:
        """See Board."""
        from pyvmm.kvm.x86 import saved_vcpu  # noqa: F401
        from pyvmm.machine import messages  # noqa: F401

    def tell_of_copy(self, vm: Vm, memory: GuestMemory) -> None:
        boot.tell_of_copy(memory)
        for level in (True, False):
            vm.irq_line(layout.PCI_SLOTS_GSI, level)

    def state_lines(self, vcpu: Vcpu, read: Callable[[int, int], bytes]) -> Iterator[str]:
        from pyvmm.kvm.x86.state_text import state_lines

        return state_lines(vcpu, read)


class PowerButton:
    """The button that ACPI tells the guest of: an interrupt of its generic event device."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def is_watched(self) -> bool:
        """True if a driver has switched its interrupt on: Linux's, for one, when it has found it
        in the DSDT. Raises HostError."""
        return not irqchip.is_masked(self._vm, layout.POWER_BUTTON_GSI)

    def press(self) -> None:
        """Raises HostError."""
        for level in (True, False):
            self._vm.irq_line(layout.POWER_BUTTON_GSI, level)


def _saved_vcpus(saved: Saved, count: int) -> list[Saved]:
    states = list(saved.tables("vcpus", count))
    if len(states) != count:
        raise saved.wrong(f"there are {how_many(len(states), 'vCPU')}, not {count}")
    return states


def _leaves_of_a_guest(kvm: Kvm, cpus: int) -> list[cpuid.CpuidEntry]:
    """What the first of so many vCPUs is told of its processor: one is made and goes again."""
    with kvm.create_vm() as vm:
        _add_irqchip(vm)
        with vm.create_vcpu(0) as vcpu:
            setup_vcpu(vcpu, cpuid.supported(kvm), 0, cpus)
            return cpuid.get_cpuid(vcpu)


def _add_irqchip(vm: Vm) -> None:
    irqchip.set_tss_addr(vm, layout.KVM_TSS)
    irqchip.set_identity_map_addr(vm, layout.KVM_IDENTITY_MAP)
    irqchip.create_irqchip(vm)
    irqchip.create_pit2(vm)


def _add_platform(
    vm: Vm, ports: Bus, sink: Callable[[bytes], None], *, cpus: int
) -> tuple[Serial, Mapping[str, Any]]:
    def interrupt(level: bool) -> None:
        vm.irq_line(layout.SERIAL_GSI, level)

    serial = Serial(interrupt, sink, burst=BURST if cpus > 1 else math.inf)
    fixed: dict[str, tuple[int, int, Handler]] = {
        "serial": (layout.SERIAL_PORT, layout.SERIAL_PORTS, serial),
        "i8042": (layout.I8042_DATA_PORT, i8042.PORTS, i8042.I8042()),
        "acpi_pm": (layout.ACPI_SLEEP_CONTROL_PORT, acpi_pm.PORTS, acpi_pm.AcpiPm()),
        "cmos": (cmos.CMOS_PORT, cmos.PORTS, cmos.Cmos()),
        "delay_port": (cmos.DELAY_PORT, 1, cmos.DelayPort()),
    }
    for start, size, handler in fixed.values():
        ports.register(start, size, handler)
    return serial, {name: handler for name, (_, _, handler) in fixed.items()}


def _add_vcpus(
    kvm: Kvm, vm: Vm, entry: boot.Entry | None, count: int, closing: ExitStack
) -> tuple[Vcpu, ...]:
    supported = cpuid.supported(kvm)
    vcpus = []
    for index in range(count):
        vcpu = vm.create_vcpu(index)
        closing.callback(vcpu.close)
        setup_vcpu(vcpu, supported, index, count)
        vcpus.append(vcpu)
    if entry is None:
        return tuple(vcpus)
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
