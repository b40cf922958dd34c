"""The interrupt controllers and the timer that KVM emulates in the kernel, and how GSIs reach them.

All raise HostError.
"""

from __future__ import annotations

from typing import Any

from pyvmm.host import syscalls
from pyvmm.host.saved import Saved
from pyvmm.kvm import capabilities
from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.capabilities import Requirement
from pyvmm.kvm.plain import fill, to_plain
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.vm import IrqchipRoute, Vm
from pyvmm.kvm.x86 import uapi
from pyvmm.kvm.x86.uapi import ffi

_MASKED = 1 << 16  # Intel 82093AA data sheet, 3.2.4 "I/O Redirection Table Registers", bit 16


def set_tss_addr(vm: Vm, addr: int) -> None:
    """Give Intel's KVM the place of three pages of its own; nothing else may be there."""
    syscalls.ioctl(vm.fd, uapi.KVM_SET_TSS_ADDR, addr, "KVM_SET_TSS_ADDR")


def set_identity_map_addr(vm: Vm, addr: int) -> None:
    """Give Intel's KVM the place of one page of its own. Call it before any vCPU is created."""
    where = ffi.new("uint64_t *", addr)
    struct_ioctl(vm.fd, uapi.KVM_SET_IDENTITY_MAP_ADDR, where, "KVM_SET_IDENTITY_MAP_ADDR")


def create_irqchip(vm: Vm) -> None:
    """Two 8259 PICs, an I/O APIC and a local APIC per vCPU, all in the kernel."""
    syscalls.ioctl(vm.fd, uapi.KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")


def create_pit2(vm: Vm) -> None:
    """An i8254 timer in the kernel; it also answers port 0x61, so that no exit is needed."""
    config = ffi.new("struct kvm_pit_config *")
    config.flags = uapi.KVM_PIT_SPEAKER_DUMMY
    struct_ioctl(vm.fd, uapi.KVM_CREATE_PIT2, config, "KVM_CREATE_PIT2")


def default_routes() -> list[IrqchipRoute]:
    """The table KVM_CREATE_IRQCHIP sets up: GSI n is I/O APIC pin n, and PIC line n below 16.

    Setting a routing replaces all of it, so a table with MSI routes starts from this one.
    """
    routes = []
    for gsi in range(uapi.KVM_IOAPIC_NUM_PINS):
        if gsi < 16:
            pic = uapi.KVM_IRQCHIP_PIC_MASTER if gsi < 8 else uapi.KVM_IRQCHIP_PIC_SLAVE
            routes.append(IrqchipRoute(gsi, pic, gsi % 8))
        routes.append(IrqchipRoute(gsi, uapi.KVM_IRQCHIP_IOAPIC, gsi))
    return routes


_CHIPS = {
    "pic_master": uapi.KVM_IRQCHIP_PIC_MASTER,
    "pic_slave": uapi.KVM_IRQCHIP_PIC_SLAVE,
    "ioapic": uapi.KVM_IRQCHIP_IOAPIC,
}
_CHIP_SIZE = 512  # struct kvm_irqchip's union


def save(vm: Vm) -> dict[str, Any]:
    """The interrupt controllers, the timer and the paravirtual clock, of a `vm` whose vCPUs stand
    still."""
    state: dict[str, Any] = {"clock": vm.get_clock()}
    pit = ffi.new("struct kvm_pit_state2 *")
    struct_ioctl(vm.fd, uapi.KVM_GET_PIT2, pit, "KVM_GET_PIT2")
    state["pit"] = to_plain(ffi, pit)
    for name, number in _CHIPS.items():
        chip = ffi.new("struct kvm_irqchip *")
        chip.chip_id = number
        struct_ioctl(vm.fd, uapi.KVM_GET_IRQCHIP, chip, "KVM_GET_IRQCHIP")
        state[name] = bytes(ffi.buffer(chip.chip.dummy)).hex()
    return state


def check(kvm: Kvm) -> None:
    """Raise ConfigError, which names it, for an ability that `save` and `restore` need."""
    capabilities.check(kvm.check_extension, _NEEDED)


_NEEDED = (
    Requirement(uapi.KVM_CAP_PIT_STATE2, "KVM_CAP_PIT_STATE2", "the saved timer goes on"),
    Requirement(uapi.KVM_CAP_ADJUST_CLOCK, "KVM_CAP_ADJUST_CLOCK", "the guest's clock goes on"),
)


def restore(vm: Vm, state: Saved) -> None:
    """Restore what `save` gave, after the vCPUs: KVM hands interrupts that wait in the I/O APIC to
    local APICs, which must be on by then. Raises ConfigError for state that cannot be."""
    pit = ffi.new("struct kvm_pit_state2 *")
    fill(ffi, pit, state.table("pit"))
    struct_ioctl(vm.fd, uapi.KVM_SET_PIT2, pit, "KVM_SET_PIT2")
    # After the vCPUs' time stamp counters, from which KVM makes it.
    start_clock(vm, state)
    for name, number in _CHIPS.items():
        chip = ffi.new("struct kvm_irqchip *")
        chip.chip_id = number
        ffi.buffer(chip.chip.dummy)[:] = state.data(name, _CHIP_SIZE)
        struct_ioctl(vm.fd, uapi.KVM_SET_IRQCHIP, chip, "KVM_SET_IRQCHIP")


def start_clock(vm: Vm, state: Saved) -> None:
    """Have the clock of what `save` gave go on from now: since `restore` it has gone on already.
    Raises ConfigError, HostError."""
    vm.set_clock(state.bits("clock", 63))


def is_masked(vm: Vm, pin: int) -> bool:
    """True if the guest has the interrupt of I/O APIC `pin` switched off, as after a reset."""
    chip = ffi.new("struct kvm_irqchip *")
    chip.chip_id = uapi.KVM_IRQCHIP_IOAPIC
    struct_ioctl(vm.fd, uapi.KVM_GET_IRQCHIP, chip, "KVM_GET_IRQCHIP")
    return bool(chip.chip.ioapic.redirtbl[pin].bits & _MASKED)
