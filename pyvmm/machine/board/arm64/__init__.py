"""The arm64 machine: KVM's GIC, a serial port, a clock and virtio-mmio, told by a device tree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pyvmm.boot import arm64 as boot
from pyvmm.boot.arm64.layout import GENERATION_ID_ROOM
from pyvmm.bus import Bus
from pyvmm.errors import ConfigError, how_many
from pyvmm.host.saved import Saved
from pyvmm.kvm.arm64 import boot_vcpu, uapi, vgic
from pyvmm.kvm.arm64.capabilities import REQUIRED
from pyvmm.kvm.capabilities import Requirement
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.machine.board.arm64 import layout
from pyvmm.machine.board.board import Board, Core, PciPlaces, VirtioSlot
from pyvmm.memory import GuestMemory
from pyvmm.platform.arm64 import gicv2m, pl061
from pyvmm.platform.arm64.pl031 import Pl031
from pyvmm.platform.serial import BURST, Serial

if TYPE_CHECKING:
    from pyvmm.kvm.arm64.probe_guest import ProbeGuest
    from pyvmm.machine.board.board import Component
    from pyvmm.machine.messages import Messages

_GICS = (
    boot.Gic(
        3,
        (
            (layout.GIC_DISTRIBUTOR, uapi.KVM_VGIC_V3_DIST_SIZE),
            (layout.GIC_REDISTRIBUTORS, layout.GIC_REDISTRIBUTORS_SIZE),
        ),
        (layout.GIC_ITS, uapi.KVM_VGIC_V3_ITS_SIZE),
    ),
    boot.Gic(
        2,
        (
            (layout.GIC_DISTRIBUTOR, uapi.KVM_VGIC_V2_DIST_SIZE),
            (layout.GIC_CPU_INTERFACE, uapi.KVM_VGIC_V2_CPU_SIZE),
        ),
        (layout.GIC_FRAME, layout.GIC_FRAME_SIZE),
    ),
)
_PLACES = vgic.Places(
    *(layout.GIC_DISTRIBUTOR, layout.GIC_CPU_INTERFACE, layout.GIC_REDISTRIBUTORS, layout.GIC_ITS)
)
_FIRST_PPI = 16
_MESSAGES_V2 = range(
    vgic.FIRST_SPI + layout.MESSAGE_GSIS.start, vgic.FIRST_SPI + layout.MESSAGE_GSIS.stop
)


class Arm64Board(Board[boot.Entry]):
    """See Board. It is made of `layout` and pyvmm/boot/arm64, kvm/arm64, platform/arm64."""

    console = "ttyS0"
    early_console = f"earlycon=uart8250,mmio,{layout.SERIAL:#x}"
    kernel_parameters = ()
    kernel_files = tuple(f"arch/arm64/boot/{one}" for one in ("Image", "Image.gz", "vmlinuz.efi"))
    # Every kernel reads a device tree, which has virtio-mmio devices as well.
    found_by = MappingProxyType({"pci": ("PCI_HOST_GENERIC",), "serial": ("SERIAL_OF_PLATFORM",)})

    def ram_ranges(self, size: int) -> list[tuple[int, int]]:
        return boot.ram_ranges(size)

    def mapped_files(self, ram: int) -> range:
        end = sum(boot.ram_ranges(ram)[-1])
        start = -(-end // layout.MAPPED_FILE_ALIGN) * layout.MAPPED_FILE_ALIGN
        return range(start, start + layout.MAX_MAPPED_FILES)

    def virtio_slots(self, count: int) -> tuple[VirtioSlot, ...]:
        if count > layout.VIRTIO_SLOTS:
            raise ValueError(f"{count} virtio devices, {layout.VIRTIO_SLOTS} places")
        return tuple(
            VirtioSlot(
                layout.VIRTIO_MMIO_BASE + index * layout.VIRTIO_MMIO_STRIDE,
                layout.VIRTIO_MMIO_SIZE,
                layout.VIRTIO_GSI + index,
            )
            for index in range(count)
        )

    @property
    def pci_places(self) -> PciPlaces:
        window = layout.PCI_WINDOW, layout.PCI_WINDOW_SIZE
        return PciPlaces(layout.PCI_ECAM, *window, config_port=None)

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
        if discovery != "auto":
            raise ConfigError(
                f"arm64 guests are told of their devices by a device tree, not by {discovery}",
                cure="leave the option out",
                option="--discovery",
            )
        if cpus > layout.MAX_CPUS:
            raise ConfigError(
                f"an arm64 guest has {layout.MAX_CPUS} vCPUs at most",
                cure="ask for fewer",
                option="--cpus",
            )
        machine = boot.Machine(
            ram=[(region.guest_addr, region.size) for region in memory.regions],
            affinities=[boot_vcpu.mpidr(index) for index in range(cpus)],
            serial=boot.Device(layout.SERIAL, layout.SERIAL_SIZE, layout.SERIAL_GSI),
            clock=(layout.CLOCK, layout.CLOCK_SIZE),
            gpio=boot.Device(layout.GPIO, layout.GPIO_SIZE, layout.GPIO_GSI),
            button=pl061.BUTTON,
            generation=boot.Device(0, GENERATION_ID_ROOM, layout.GENERATION_GSI),
            virtio=[boot.Device(*slot) for slot in slots],
            timers=layout.TIMER_PPIS,
            pmu=layout.PMU_PPI,
            pci=boot.PciHost(
                (layout.PCI_ECAM, layout.PCI_ECAM_SIZE),
                (layout.PCI_WINDOW, layout.PCI_WINDOW_SIZE),
                memory_window,
            ),
            cmdline=cmdline,
            initrd=(0, 0),
        )
        return boot.load(memory, kernel=kernel, initrd=initrd, machine=machine, gics=_GICS)

    def kernel_release(self, path: str) -> str:
        from pyvmm.boot.arm64.kernel_file import release_of

        return release_of(path)

    def kernel_config(self, path: str) -> str:
        from pyvmm.boot.arm64.kernel_file import config_of

        return config_of(path)

    def unpack_kernel(self, path: str, target: str) -> None:
        from pyvmm.boot.arm64.kernel_file import unpack_image

        unpack_image(path, target)

    @property
    def requirements(self) -> Sequence[Requirement]:
        return REQUIRED

    def probe_guest(self, kvm: Kvm) -> ProbeGuest:
        from pyvmm.kvm.arm64.probe_guest import ProbeGuest

        return ProbeGuest(kvm)

    def address_bits(self, kvm: Kvm) -> int:
        return kvm.check_extension(uapi.KVM_CAP_ARM_VM_IPA_SIZE) or _USUAL_ADDRESS_BITS

    def create_vm(self, kvm: Kvm, memory: GuestMemory) -> Vm:
        bits, end = self.address_bits(kvm), memory.regions[-1].end
        if end > 1 << bits:
            most = (1 << bits) - memory.regions[0].guest_addr
            raise ConfigError(
                f"the guest's memory would end at {end:#x}, and this machine's KVM gives a guest "
                f"addresses of {bits} bits",
                cure=f"give it --memory {most >> 30}G or less",
                option="--memory",
            )
        # As wide as this KVM has it: files as memory come after the VM is made.
        return kvm.create_vm(_vm_type(kvm))

    def messages(self, vm: Vm) -> Messages:
        from pyvmm.machine.messages import Messages

        version = 3 if vgic.takes_messages(vm) else 2
        return Messages(
            vm,
            vgic.default_routes(layout.GIC_INTERRUPTS[version]),
            lambda address: address == layout.MESSAGES[version],
            with_sender=version == 3,
            pin_of=None if version == 3 else _gsi_of_message,
        )

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
        if vm.check_extension(uapi.KVM_CAP_ARM_NISV_TO_USER):
            vm.enable_cap(uapi.KVM_CAP_ARM_NISV_TO_USER)  # else KVM_RUN fails with ENOSYS
        gic = vgic.Vgic(vm, _PLACES, layout.GIC_INTERRUPTS)
        closing.callback(gic.close)
        if gic.version == 2 and cpus > vgic.MAX_VCPUS_V2:
            raise ConfigError(
                f"this machine's KVM has a GICv2, which serves {vgic.MAX_VCPUS_V2} vCPUs",
                cure="ask for fewer",
                option="--cpus",
            )
        vcpus = _add_vcpus(vm, gic, cpus, closing)
        if entry is not None:
            boot_vcpu.setup_boot_vcpu(vcpus[0], pc=entry.pc, x0=entry.trees[gic.version])

        line = partial(vgic.set_line, vm, layout.SERIAL_GSI)
        serial = Serial(line, sink, burst=BURST if cpus > 1 else math.inf)
        closing.callback(serial.close)
        clock = Pl031()
        gpio = pl061.Pl061(partial(vgic.set_line, vm, layout.GPIO_GSI))
        mmio.register(layout.GPIO, layout.GPIO_SIZE, gpio)
        mmio.register(layout.SERIAL, layout.SERIAL_SIZE, serial)
        mmio.register(layout.CLOCK, layout.CLOCK_SIZE, clock)
        if gic.version == 2:
            frame = gicv2m.Gicv2m(_MESSAGES_V2, partial(_send_message, vm))
            mmio.register(layout.GIC_FRAME, layout.GIC_FRAME_SIZE, frame)
        # The GIC first: what the others interrupt for when they are restored is kept then.
        platform: dict[str, Component] = {
            **{"gic": gic, "serial": serial, "clock": clock, "gpio": gpio}
        }
        return Core(vcpus, serial, gpio, platform)

    def save(
        self, kvm: Kvm, vm: Vm, on_vcpus: Callable[[Callable[[Vcpu], Any]], list[Any]]
    ) -> dict[str, Any]:
        from pyvmm.kvm.arm64 import saved_vcpu

        return {"vcpus": on_vcpus(saved_vcpu.save)}

    def check_saved(self, kvm: Kvm, saved: Saved, cpus: int) -> None:
        from pyvmm.kvm.arm64 import saved_vcpu

        # Registers are refused one by one, so that only a vCPU can tell.
        state = _saved_vcpus(saved, cpus)[0]
        with kvm.create_vm(_vm_type(kvm)) as vm, vm.create_vcpu(0) as vcpu:
            boot_vcpu.setup_vcpu(vm, vcpu, pmu=boot_vcpu.has_pmu(vm))
            saved_vcpu.restore_registers(vcpu, state)

    def restore(
        self,
        kvm: Kvm,
        vm: Vm,
        vcpus: Sequence[Vcpu],
        saved: Saved,
        warn: Callable[[str], None],
    ) -> None:
        from pyvmm.kvm.arm64 import saved_vcpu

        states = _saved_vcpus(saved, len(vcpus))
        for vcpu, state in zip(vcpus, states, strict=True):
            saved_vcpu.restore(vcpu, state)

    def import_restoring(self) -> None:
        """See Board."""
        from pyvmm.kvm.arm64 import saved_gic, saved_vcpu  # noqa: F401
        from pyvmm.machine import messages  # noqa: F401

    def tell_of_copy(self, vm: Vm, memory: GuestMemory) -> None:
        boot.tell_of_copy(memory)
        for level in (True, False):
            vgic.set_line(vm, layout.GENERATION_GSI, level)

    def state_lines(self, vcpu: Vcpu, read: Callable[[int, int], bytes]) -> Iterator[str]:
        from pyvmm.kvm.arm64.state_text import state_lines

        return state_lines(vcpu, read)


def _gsi_of_message(data: int) -> int | None:
    """The shared interrupt that a message through GICv2m asks for."""
    return data - vgic.FIRST_SPI if data in _MESSAGES_V2 else None


def _send_message(vm: Vm, number: int) -> None:
    for level in (True, False):
        vgic.set_line(vm, number - vgic.FIRST_SPI, level)


def _vm_type(kvm: Kvm) -> int:
    bits = kvm.check_extension(uapi.KVM_CAP_ARM_VM_IPA_SIZE)
    return bits & uapi.KVM_VM_TYPE_ARM_IPA_SIZE_MASK


def _saved_vcpus(saved: Saved, count: int) -> list[Saved]:
    states = list(saved.tables("vcpus", count))
    if len(states) != count:
        raise saved.wrong(f"there are {how_many(len(states), 'vCPU')}, not {count}")
    return states


_USUAL_ADDRESS_BITS = 40  # of a VM of type 0 (KVM API, 4.2 KVM_CREATE_VM)


def _add_vcpus(vm: Vm, gic: vgic.Vgic, count: int, closing: ExitStack) -> tuple[Vcpu, ...]:
    pmu = boot_vcpu.has_pmu(vm)
    vcpus = []
    for index in range(count):
        vcpu = vm.create_vcpu(index)
        closing.callback(vcpu.close)
        boot_vcpu.setup_vcpu(vm, vcpu, pmu=pmu)
        vcpus.append(vcpu)
    gic.initialise(count)
    if pmu:
        for vcpu in vcpus:
            boot_vcpu.finish_pmu(vcpu, _FIRST_PPI + layout.PMU_PPI)
    return tuple(vcpus)
