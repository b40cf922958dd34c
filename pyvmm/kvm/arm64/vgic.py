"""The interrupt controller that KVM emulates in the kernel: a GICv3, or a GICv2 where the host's
own one can do no more (KVM API, devices/arm-vgic-v3.rst and arm-vgic.rst).

All raise HostError.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import syscalls
from pyvmm.host.saved import Saved
from pyvmm.kvm.arm64 import boot_vcpu, uapi
from pyvmm.kvm.arm64.uapi import ffi
from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.vm import IrqchipRoute, Vm

if TYPE_CHECKING:
    from pyvmm.kvm.arm64.saved_gic import Register

FIRST_SPI = 32
"""The interrupt id of the first line that is not a vCPU's own. A GSI is a number from there on."""

MAX_VCPUS_V2 = 8


class Places(NamedTuple):
    """Guest-physical addresses: of the distributor, of a GICv2's CPU interfaces, of the first
    vCPU's redistributor and of the interrupt translation service (ITS) in a GICv3."""

    distributor: int
    cpu_interface: int
    redistributors: int
    its: int


class Vgic(syscalls.Closable):
    """A VM's interrupt controller of `version` 3 or 2. It works once `initialise` was called, after
    the vCPUs. One of version 3 has an ITS, which takes the messages of PCI devices (KVM API,
    devices/arm-vgic-its.rst)."""

    def __init__(self, vm: Vm, places: Places, interrupts: Mapping[int, int]) -> None:
        """Make the newest that this KVM can, with as many `interrupts` as there are for its
        version, FIRST_SPI included."""
        self._vm, self._its_place, self._its_fd = vm, places.its, -1
        self._affinities: list[int] = []
        self.version, self._fd = _create(vm)
        self._interrupts = interrupts[self.version]
        try:
            if self.version == 3:
                _place(self._fd, uapi.KVM_VGIC_V3_ADDR_TYPE_DIST, places.distributor)
                _place(self._fd, uapi.KVM_VGIC_V3_ADDR_TYPE_REDIST, places.redistributors)
            else:
                _place(self._fd, uapi.KVM_VGIC_V2_ADDR_TYPE_DIST, places.distributor)
                _place(self._fd, uapi.KVM_VGIC_V2_ADDR_TYPE_CPU, places.cpu_interface)
            number = ffi.new("uint32_t *", self._interrupts)
            _set(self._fd, uapi.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, number)
        except BaseException:
            self.close()
            raise

    def initialise(self, vcpus: int) -> None:
        """Call it when all vCPUs are there, so many."""
        self._affinities = [boot_vcpu.mpidr(index) for index in range(vcpus)]
        _set(self._fd, uapi.KVM_DEV_ARM_VGIC_GRP_CTRL, uapi.KVM_DEV_ARM_VGIC_CTRL_INIT, None)
        if self.version == 3:
            its = self._its_fd = _create_device(self._vm, uapi.KVM_DEV_TYPE_ARM_VGIC_ITS)
            _place(its, uapi.KVM_VGIC_ITS_ADDR_TYPE, self._its_place)
            _set(its, uapi.KVM_DEV_ARM_VGIC_GRP_CTRL, uapi.KVM_DEV_ARM_VGIC_CTRL_INIT, None)

    # --- saved and restored -------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """The state of all, of a VM whose vCPUs stand still. KVM writes a part of a GICv3's into
        guest memory. Raises HostError."""
        from pyvmm.kvm.arm64 import saved_gic

        def read(register: Register) -> int:
            return _read(self._fd, register)

        if self.version == 2:
            registers = saved_gic.save_v2(read, len(self._affinities), self._interrupts)
            return {"version": 2, **registers}
        control = uapi.KVM_DEV_ARM_VGIC_GRP_CTRL
        _set(self._its_fd, control, uapi.KVM_DEV_ARM_ITS_SAVE_TABLES, None)
        _set(self._fd, control, uapi.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, None)

        registers = saved_gic.save(
            read, lambda one: _read(self._its_fd, one), self._affinities, self._interrupts
        )
        return {"version": 3, **registers}

    def restore(self, saved: Saved) -> None:
        """Restore what `save` gave, with the guest memory of then, before a vCPU runs. Raises
        ConfigError for state that cannot be, or that this machine's KVM refuses."""
        from pyvmm.kvm.arm64 import saved_gic

        version = saved.integer("version", 3, 2)
        if version != self.version:
            raise ConfigError(
                f"the VM had a GICv{version}, and this machine's KVM has a GICv{self.version}",
                cure="restore it on a machine like the one it was saved on",
            )

        def write(register: Register, value: int) -> None:
            _write(self._fd, register, value)

        def read_tables() -> None:
            control = uapi.KVM_DEV_ARM_VGIC_GRP_CTRL
            _set(self._its_fd, control, uapi.KVM_DEV_ARM_ITS_RESTORE_TABLES, None)

        try:
            if version == 2:
                saved_gic.restore_v2(write, saved, len(self._affinities), self._interrupts)
                return
            saved_gic.restore(
                write,
                lambda one, value: _write(self._its_fd, one, value),
                read_tables,
                saved,
                self._affinities,
                self._interrupts,
            )
        except HostError as error:
            raise ConfigError(
                f"this machine's KVM refuses the saved state of the GIC: {error}",
                cure="restore it on a machine like the one it was saved on",
            ) from None

    def close(self) -> None:
        """Close our descriptors; the VM keeps its controller."""
        fds = (self._fd, self._its_fd)
        self._fd = self._its_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def _place(fd: int, what: int, address: int) -> None:
    _set(fd, uapi.KVM_DEV_ARM_VGIC_GRP_ADDR, what, ffi.new("uint64_t *", address))


_TYPES = {4: "uint32_t *", 8: "uint64_t *"}


def _read(fd: int, register: Register) -> int:
    value = ffi.new(_TYPES[register.size])
    request = ffi.new("struct kvm_device_attr *")
    request.group = register.group
    request.attr = register.attribute
    request.addr = int(ffi.cast("uintptr_t", value))
    what = f"KVM_GET_DEVICE_ATTR of the GIC, group {register.group}, {register.attribute:#x}"
    struct_ioctl(fd, uapi.KVM_GET_DEVICE_ATTR, request, what)
    return int(value[0])


def _write(fd: int, register: Register, value: int) -> None:
    where = f"group {register.group}, {register.attribute:#x} = {value:#x}"
    what = f"KVM_SET_DEVICE_ATTR of the GIC, {where}"
    _set(fd, register.group, register.attribute, ffi.new(_TYPES[register.size], value), what)


def _set(
    fd: int,
    group: int,
    attribute: int,
    value: object,
    what: str = "KVM_SET_DEVICE_ATTR of the GIC",
) -> None:
    request = ffi.new("struct kvm_device_attr *")
    request.group = group
    request.attr = attribute
    request.addr = 0 if value is None else int(ffi.cast("uintptr_t", value))
    struct_ioctl(fd, uapi.KVM_SET_DEVICE_ATTR, request, what)


def _create(vm: Vm) -> tuple[int, int]:
    """(version, file descriptor)."""
    try:
        return 3, _create_device(vm, uapi.KVM_DEV_TYPE_ARM_VGIC_V3)
    except HostError as error:
        if error.errno != errno.ENODEV:
            raise
    return 2, _create_device(vm, uapi.KVM_DEV_TYPE_ARM_VGIC_V2)


def _create_device(vm: Vm, kind: int) -> int:
    request = ffi.new("struct kvm_create_device *")
    request.type = kind
    struct_ioctl(vm.fd, uapi.KVM_CREATE_DEVICE, request, "KVM_CREATE_DEVICE of the GIC")
    return int(request.fd)


def default_routes(interrupts: int) -> list[IrqchipRoute]:
    """The routing table that KVM starts with: each GSI is a shared interrupt of its own; so many
    `interrupts` as the controller was made with."""
    return [IrqchipRoute(gsi, 0, gsi) for gsi in range(interrupts - FIRST_SPI)]


def takes_messages(vm: Vm) -> bool:
    """True if `vm`, which is built, has an ITS."""
    return bool(vm.check_extension(uapi.KVM_CAP_MSI_DEVID))


def set_line(vm: Vm, gsi: int, level: bool) -> None:
    """Drive the line of `gsi` high or low: KVM_IRQ_LINE has fields for the kind of interrupt and
    its id here (KVM API, 4.25)."""
    kind = uapi.KVM_ARM_IRQ_TYPE_SPI << uapi.KVM_ARM_IRQ_TYPE_SHIFT
    vm.irq_line(kind | FIRST_SPI + gsi, level)
