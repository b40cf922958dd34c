"""A virtual machine: its memory slots, interrupt controllers and the eventfds wired into it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.host import syscalls
from pyvmm.kvm import uapi
from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.uapi import ffi
from pyvmm.kvm.vcpu import Vcpu

PAGE_SIZE = 4096


class IrqchipRoute(NamedTuple):
    """GSI `gsi` raises `pin` of interrupt controller `irqchip` (KVM_IRQCHIP_…)."""

    gsi: int
    irqchip: int
    pin: int


class MsiRoute(NamedTuple):
    """GSI `gsi` sends the message `data` to `address`, as a PCI device's MSI would; `devid` is that
    device's requester id, where the interrupt controller asks who sent it (KVM_CAP_MSI_DEVID)."""

    gsi: int
    address: int
    data: int
    devid: int | None = None


class Vm(syscalls.Closable):
    """One VM's file descriptor, `fd`. All addresses are guest-physical unless they say host."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        """Own `fd`; `Kvm.create_vm` is how to get one."""
        self.fd = fd
        self._vcpu_mmap_size = vcpu_mmap_size

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION as this VM sees it. Raises HostError."""
        return syscalls.ioctl(self.fd, uapi.KVM_CHECK_EXTENSION, capability, "KVM_CHECK_EXTENSION")

    # --- memory ----------------------------------------------------------------------------------

    def set_memory_region(
        self, slot: int, guest_addr: int, size: int, host_addr: int, flags: int = 0
    ) -> None:
        """Make `size` bytes of this process at `host_addr` the guest's RAM at `guest_addr`.

        The same slot again moves it or changes `flags` (KVM_MEM_…); size 0 removes it. The memory
        must stay mapped while the slot is there. Raises HostError (EEXIST: slots overlap).
        """
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot = slot
        region.flags = flags
        region.guest_phys_addr = guest_addr
        region.memory_size = size
        region.userspace_addr = host_addr
        struct_ioctl(self.fd, uapi.KVM_SET_USER_MEMORY_REGION, region, "KVM_SET_USER_MEMORY_REGION")

    def get_dirty_log(self, slot: int, size: int) -> bytes:
        """The pages of `slot`, `size` bytes long, that the guest wrote since the last call.

        One bit per page, lowest first, padded to 64 pages. The slot needs KVM_MEM_LOG_DIRTY_PAGES.
        Raises HostError (ENOENT: the slot does not log).
        """
        pages = -(-size // PAGE_SIZE)
        bitmap = bytearray(-(-pages // 64) * 8)
        log = ffi.new("struct kvm_dirty_log *")
        log.slot = slot
        log.dirty_bitmap = ffi.from_buffer(bitmap)
        struct_ioctl(self.fd, uapi.KVM_GET_DIRTY_LOG, log, "KVM_GET_DIRTY_LOG")
        return bytes(bitmap)

    # --- interrupts ------------------------------------------------------------------------------

    def irq_line(self, gsi: int, level: bool) -> None:
        """Drive the line of `gsi` high or low."""
        line = ffi.new("struct kvm_irq_level *")
        line.irq = gsi
        line.level = int(level)
        struct_ioctl(self.fd, uapi.KVM_IRQ_LINE, line, "KVM_IRQ_LINE")

    def irqfd(
        self, fd: int, gsi: int, *, resample_fd: int | None = None, deassign: bool = False
    ) -> None:
        """Let each signal of eventfd `fd` raise `gsi`, with no system call of ours.

        Without `resample_fd` the line pulses, as an edge. With it the line stays high until the
        guest ends the interrupt; then KVM lowers it and signals `resample_fd`, whereupon a device
        that still wants service signals `fd` again. `deassign` undoes the binding of (fd, gsi).
        """
        wiring = ffi.new("struct kvm_irqfd *")
        wiring.fd = fd
        wiring.gsi = gsi
        if deassign:
            wiring.flags = uapi.KVM_IRQFD_FLAG_DEASSIGN
        elif resample_fd is not None:
            wiring.flags = uapi.KVM_IRQFD_FLAG_RESAMPLE
            wiring.resamplefd = resample_fd
        struct_ioctl(self.fd, uapi.KVM_IRQFD, wiring, "KVM_IRQFD")

    def set_gsi_routing(self, routes: Sequence[IrqchipRoute | MsiRoute]) -> None:
        """Replace the whole table of what each GSI raises.

        The table that KVM starts with is its architecture's: `kvm/x86/irqchip.py` has x86's.
        """
        table = ffi.new("struct kvm_irq_routing *", {"entries": len(routes)})
        table.nr = len(routes)
        for entry, route in zip(table.entries, routes, strict=True):
            entry.gsi = route.gsi
            if isinstance(route, MsiRoute):
                entry.type = uapi.KVM_IRQ_ROUTING_MSI
                entry.u.msi.address_lo = route.address & 0xFFFF_FFFF
                entry.u.msi.address_hi = route.address >> 32
                entry.u.msi.data = route.data
                if route.devid is not None:
                    entry.flags = uapi.KVM_MSI_VALID_DEVID
                    entry.u.msi.devid = route.devid
            else:
                entry.type = uapi.KVM_IRQ_ROUTING_IRQCHIP
                entry.u.irqchip.irqchip = route.irqchip
                entry.u.irqchip.pin = route.pin
        struct_ioctl(self.fd, uapi.KVM_SET_GSI_ROUTING, table, "KVM_SET_GSI_ROUTING")

    def signal_msi(self, address: int, data: int) -> bool:
        """Send one message-signalled interrupt now; False if the guest blocked it."""
        message = ffi.new("struct kvm_msi *")
        message.address_lo = address & 0xFFFF_FFFF
        message.address_hi = address >> 32
        message.data = data
        return struct_ioctl(self.fd, uapi.KVM_SIGNAL_MSI, message, "KVM_SIGNAL_MSI") > 0

    # --- doorbells -------------------------------------------------------------------------------

    def ioeventfd(
        self,
        fd: int,
        addr: int,
        length: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
        deassign: bool = False,
    ) -> None:
        """Turn guest writes at `addr` into signals of eventfd `fd`, with no exit.

        `length` is 1, 2, 4 or 8 bytes, or 0 for a write of any length. With `datamatch`, only
        writes of that value count; the others exit as ever. `pio`: `addr` is an I/O port.
        `deassign` undoes a binding and must repeat its arguments. Raises ValueError for a
        `datamatch` without a length, and HostError (EEXIST: already bound).
        """
        if datamatch is not None and length == 0:
            raise ValueError("datamatch needs a length")
        doorbell = ffi.new("struct kvm_ioeventfd *")
        doorbell.fd = fd
        doorbell.addr = addr
        doorbell.len = length
        if datamatch is not None:
            doorbell.datamatch = datamatch
            doorbell.flags |= uapi.KVM_IOEVENTFD_FLAG_DATAMATCH
        if pio:
            doorbell.flags |= uapi.KVM_IOEVENTFD_FLAG_PIO
        if deassign:
            doorbell.flags |= uapi.KVM_IOEVENTFD_FLAG_DEASSIGN
        struct_ioctl(self.fd, uapi.KVM_IOEVENTFD, doorbell, "KVM_IOEVENTFD")

    # --- the rest --------------------------------------------------------------------------------

    def enable_cap(self, capability: int, *args: int) -> None:
        """KVM_ENABLE_CAP with up to four arguments. Raises HostError."""
        request = ffi.new("struct kvm_enable_cap *")
        request.cap = capability
        for place, value in enumerate(args):
            request.args[place] = value
        struct_ioctl(self.fd, uapi.KVM_ENABLE_CAP, request, "KVM_ENABLE_CAP")

    def get_clock(self) -> int:
        """Nanoseconds of the guest's paravirtual clock. Raises HostError."""
        data = ffi.new("struct kvm_clock_data *")
        struct_ioctl(self.fd, uapi.KVM_GET_CLOCK, data, "KVM_GET_CLOCK")
        return int(data.clock)

    def set_clock(self, nanoseconds: int) -> None:
        """Have that clock go on from there. Raises HostError."""
        data = ffi.new("struct kvm_clock_data *")
        # Without KVM_CLOCK_REALTIME: with it the clock would jump by the time that has passed since
        # the state was saved, and the guest's watchdogs with it.
        data.clock = nanoseconds
        struct_ioctl(self.fd, uapi.KVM_SET_CLOCK, data, "KVM_SET_CLOCK")

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """A new vCPU, number `vcpu_id` (on x86 also its APIC id). Raises HostError.

        With the in-kernel irqchip, vCPU 0 starts runnable and the others wait for INIT and SIPI.
        """
        fd = syscalls.ioctl(self.fd, uapi.KVM_CREATE_VCPU, vcpu_id, "KVM_CREATE_VCPU")
        return Vcpu(vcpu_id, fd, self._vcpu_mmap_size)

    def close(self) -> None:
        """Close the VM. The kernel keeps it until its vCPUs are closed too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def dirty_pages(bitmap: bytes) -> list[int]:
    """The page numbers within the slot that a dirty log's `bitmap` names, ascending."""
    pages = []
    for place, byte in enumerate(bitmap):
        while byte:
            low = byte & -byte
            pages.append(place * 8 + low.bit_length() - 1)
            byte ^= low
    return pages
