"""Guests of a few bytes of machine code, for tests of the KVM wrappers on a real /dev/kvm.

Integer instructions only, so that a KVM that interprets its guests runs them too.
"""

from __future__ import annotations

import struct
import threading
from types import TracebackType
from typing import Self

from pyvmm.bus import Action, Bus
from pyvmm.kvm import kick
from pyvmm.kvm.loop import run_until_exit
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.x86 import cpuid
from pyvmm.kvm.x86 import irqchip as irqchip_of
from pyvmm.kvm.x86 import registers as r
from pyvmm.kvm.x86.boot_vcpu import setup_boot_vcpu, setup_vcpu
from pyvmm.kvm.x86.uapi import ffi
from pyvmm.memory import GuestMemory

CODE = 0x1000
STACK = 0x8000
GDT = 0x500
IDT = 0x600
PML4, PDPT, PD = 0x9000, 0xA000, 0xB000  # PD: four pages, the first 4 GiB
HANDLER = 0x2000
RAM_SIZE = 0x4_0000
MMIO_BASE = 0xD000_0000
LOCAL_APIC = 0xFEE0_0000

# Flat descriptors: Intel SDM, volume 3, figure 3-8.
_CODE32, _CODE64, _DATA = 0x00CF_9B00_0000_FFFF, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF


class Recorder:
    """A device that notes its accesses and answers reads from a list, then with zeros."""

    def __init__(self, *answers: int, action: Action | None = None) -> None:
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []
        self.answers = list(answers)
        self.action = action

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return self.answers.pop(0) if self.answers else 0

    def write(self, offset: int, size: int, value: int) -> Action | None:
        self.writes.append((offset, size, value))
        return self.action


class Stop:
    """A port whose write ends `BareGuest.run`."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> Action:
        self.values.append(value)
        return Action.POWEROFF


class BareGuest:
    """A VM with 256 KiB of RAM. `mode` is "real16", "protected32" or "long64".

    Port 0xf4 is a `Stop` port; tests put more on `ports` and `mmio`.
    """

    STOP_PORT = 0xF4

    def __init__(
        self,
        kvm: Kvm,
        code: bytes,
        *,
        mode: str = "protected32",
        vcpus: int = 1,
        irqchip: bool = True,
    ) -> None:
        kick.install()
        self.memory = GuestMemory([(0, RAM_SIZE)])
        self.vm = kvm.create_vm()
        irqchip_of.set_tss_addr(self.vm, 0xFFFB_D000)
        irqchip_of.set_identity_map_addr(self.vm, 0xFFFB_C000)
        if irqchip:
            irqchip_of.create_irqchip(self.vm)
        self.set_slot(0)
        self.ports, self.mmio = Bus("port"), Bus("MMIO")
        self.stop = Stop()
        self.ports.register(self.STOP_PORT, 4, self.stop)
        self.memory.write(CODE, code)
        self._fill_tables()
        self.vcpus = [self.vm.create_vcpu(number) for number in range(vcpus)]
        if irqchip:
            supported = cpuid.supported(kvm)
            for number, vcpu in enumerate(self.vcpus):
                setup_vcpu(vcpu, supported, number, vcpus)
        self.vcpu = self.vcpus[0]
        self.start(mode)

    def set_slot(self, flags: int) -> None:
        """Give the guest its RAM, in slot 0 with `flags`."""
        self.vm.set_memory_region(0, 0, RAM_SIZE, self.memory.regions[0].host_addr, flags)

    def start(self, mode: str, rip: int = CODE) -> None:
        """Put vCPU 0 at `rip` in `mode`."""
        if mode == "real16":
            sregs = r.get_sregs(self.vcpu)
            sregs.cs.base = sregs.cs.selector = 0
            r.set_sregs(self.vcpu, sregs)
            regs = ffi.new("struct kvm_regs *")
            regs.rip, regs.rsp, regs.rflags = rip, STACK, r.RFLAGS_RESERVED
            r.set_regs(self.vcpu, regs)
            return
        assert mode in ("protected32", "long64")
        cr3 = PML4 if mode == "long64" else 0
        setup_boot_vcpu(self.vcpu, mode=mode, rip=rip, rsp=STACK, gdt_base=GDT, cr3=cr3)
        code = _CODE64 if mode == "long64" else _CODE32
        self.memory.write(GDT, struct.pack("<5Q", 0, 0, code, _DATA, 0))

    def set_idt(self, vector: int, handler: bytes) -> None:
        """Have `vector` enter `handler`, 32-bit code, through an interrupt gate."""
        at = HANDLER + 0x40 * (vector & 0xF)
        self.memory.write(at, handler)
        # Intel SDM, volume 3, figure 6-2: offset 15:0, selector, type, offset 31:16
        gate = struct.pack("<HHHH", at & 0xFFFF, 0x10, 0x8E00, at >> 16)
        self.memory.write(IDT + 8 * vector, gate)
        sregs = r.get_sregs(self.vcpu)
        sregs.idt.base, sregs.idt.limit = IDT, 8 * 256 - 1
        r.set_sregs(self.vcpu, sregs)

    def run(self) -> Action | None:
        """Run vCPU 0 until the guest stops; a guest that does not is kicked after 60 seconds."""
        limit = threading.Timer(60, self.vcpu.kick)
        self.vcpu.bind_thread()
        limit.start()
        try:
            return run_until_exit(self.vcpu, self.ports, self.mmio)
        finally:
            limit.cancel()
            limit.join()
            self.vcpu.unbind_thread()

    def run_to_stop(self) -> int:
        """Run to the stop port; the value written there."""
        before = len(self.stop.values)
        action = self.run()
        assert len(self.stop.values) == before + 1, f"{action}, exit: {self.vcpu.exit()}"
        return self.stop.values[-1]

    def _fill_tables(self) -> None:
        # All 4 GiB one to one, in pages of 2 MiB.
        self.memory.write(PML4, struct.pack("<Q", PDPT | 3))
        self.memory.write(PDPT, struct.pack("<4Q", *(PD + 0x1000 * n | 3 for n in range(4))))
        self.memory.write(PD, struct.pack("<2048Q", *(n << 21 | 0x83 for n in range(2048))))

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class VcpuThread:
    """Runs `vcpu` in a thread of its own until it is kicked or a handler asks for something."""

    def __init__(self, guest: BareGuest, vcpu: Vcpu) -> None:
        self.action: Action | None = None
        self.exit_reason = -1
        self._guest, self._vcpu = guest, vcpu
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self._vcpu.bind_thread()
        try:
            self.action = run_until_exit(self._vcpu, self._guest.ports, self._guest.mmio)
            self.exit_reason = self._vcpu.exit_reason
        finally:
            self._vcpu.unbind_thread()

    def join(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive(), "the vCPU's thread did not end"
