"""The guest that probe.py runs: 64 KiB, one vCPU in long mode, a few bytes of machine code."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

from pyvmm.host.syscalls import Closable
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.x86 import cpuid, irqchip, uapi
from pyvmm.kvm.x86 import registers as r
from pyvmm.kvm.x86.boot_vcpu import CODE_SELECTOR, set_flat_segments
from pyvmm.kvm.x86.uapi import ffi

_SIZE = 0x1_0000
_IDT = 0x0
_GDT = 0x800
_PML4, _PDPT, _PD = 0x1000, 0x2000, 0x3000
_CODE = 0x4000
_HANDLER = 0x5000
_STACK = 0x8000
_DATA = 0x9000  # 64-byte aligned, as XSAVE wants it
_TSS_ADDR = 0xFFFB_D000  # far from the guest's 64 KiB

# Flat code (64-bit) and data descriptors: Intel SDM, volume 3, figure 3-8.
_GDT_CODE64 = 0x00AF_9B00_0000_FFFF
_GDT_DATA = 0x00CF_9300_0000_FFFF
_BREAKPOINT = 3
_INTERRUPT_GATE = 0x8E00

_CR4_OSFXSR = 1 << 9
_CR4_OSXMMEXCPT = 1 << 10
_CR4_OSXSAVE = 1 << 18
_CPUID_1_ECX_CX16 = 1 << 13
_CPUID_1_ECX_XSAVE = 1 << 26

_DONE = bytes.fromhex("e610")  # out 0x10, al

_ITERATIONS = 4000
_LOOP_INSTRUCTIONS = 2 * _ITERATIONS
_COUNTING_LOOP = (
    b"\xb9" + struct.pack("<I", _ITERATIONS)  # start: mov ecx, iterations
    + bytes.fromhex("ffc9")  # again: dec ecx
    + bytes.fromhex("75fc")  # jnz again
    + _DONE  # out 0x10, al
    + bytes.fromhex("ebf3")  # jmp start
)  # fmt: skip

_INT3 = bytes.fromhex("cc")
_CMPXCHG16B = bytes.fromhex("480fc70e")  # cmpxchg16b [rsi]
_SSE = bytes.fromhex(
    "0f2806"  # movaps xmm0, [rsi]
    "660fefc0"  # pxor xmm0, xmm0
    "0f2906"  # movaps [rsi], xmm0
)
_FXSAVE = bytes.fromhex(
    "0fae06"  # fxsave [rsi]
    "0fae0e"  # fxrstor [rsi]
)
_XSAVE = bytes.fromhex(
    "31c9"  # xor ecx, ecx
    "31d2"  # xor edx, edx
    "b803000000"  # mov eax, 3: x87 and SSE
    "0f01d1"  # xsetbv
    "0fae26"  # xsave [rsi]
    "0fae2e"  # xrstor [rsi]
)


class ProbeGuest(Closable):
    """The VM. `start` puts code into it; ``vcpu.run()`` runs it up to its `out` to port 0x10."""

    done = uapi.KVM_EXIT_IO
    counting_loop = _COUNTING_LOOP
    loop_instructions = _LOOP_INSTRUCTIONS

    def __init__(self, kvm: Kvm) -> None:
        """Raises HostError."""
        self._memory = mmap.mmap(-1, _SIZE)
        self._supported = cpuid.supported(kvm)
        self._vm = kvm.create_vm()
        try:
            irqchip.set_tss_addr(self._vm, _TSS_ADDR)
            host_addr = int(ffi.cast("uintptr_t", ffi.from_buffer(self._memory)))
            self._vm.set_memory_region(0, 0, _SIZE, host_addr)
            self.vcpu = self._vm.create_vcpu(0)
        except BaseException:
            self._vm.close()
            raise
        self._fill_memory()
        cpuid.set_cpuid(self.vcpu, cpuid.for_vcpu(self._supported, 0, 1))

    def instructions(self) -> Iterator[tuple[str, bytes]]:
        """(name, code) of what kernels execute where CPUID offers it, each to be run on its own."""
        yield "int3", _INT3 + _DONE
        if self._has(_CPUID_1_ECX_CX16):
            yield "cmpxchg16b", _CMPXCHG16B + _DONE
        yield "SSE", _SSE + _DONE
        yield "FXSAVE", _FXSAVE + _DONE
        if self._has(_CPUID_1_ECX_XSAVE):
            yield "XSAVE", _XSAVE + _DONE

    def start(self, code: bytes) -> None:
        """Put `code` into memory and the vCPU, all its state fresh, at its beginning."""
        self._memory[_CODE : _CODE + len(code)] = code
        self._memory[_DATA : _DATA + 1024] = bytes(1024)
        sregs = r.get_sregs(self.vcpu)
        set_flat_segments(sregs, "long64")
        sregs.gdt.base, sregs.gdt.limit = _GDT, 4 * 8 - 1
        sregs.idt.base, sregs.idt.limit = _IDT, (_BREAKPOINT + 1) * 16 - 1
        sregs.cr0 = r.CR0_PE | r.CR0_ET | r.CR0_PG
        sregs.cr3 = _PML4
        sregs.cr4 = r.CR4_PAE | _CR4_OSFXSR | _CR4_OSXMMEXCPT
        if self._has(_CPUID_1_ECX_XSAVE):
            sregs.cr4 |= _CR4_OSXSAVE
        sregs.efer = r.EFER_LME | r.EFER_LMA
        r.set_sregs(self.vcpu, sregs)
        regs = ffi.new("struct kvm_regs *")
        regs.rip, regs.rsp, regs.rsi = _CODE, _STACK, _DATA
        regs.rflags = r.RFLAGS_RESERVED
        r.set_regs(self.vcpu, regs)

    def close(self) -> None:
        """Give everything back."""
        self.vcpu.close()
        self._vm.close()
        self._memory.close()

    def _has(self, feature: int) -> bool:
        return any(e.function == 1 and e.ecx & feature for e in self._supported)

    def _fill_memory(self) -> None:
        put = self._put
        # The first 2 MiB one to one: present, writable; the last level a large page.
        put(_PML4, "<Q", _PDPT | 3)
        put(_PDPT, "<Q", _PD | 3)
        put(_PD, "<Q", 0x83)
        put(_GDT, "<4Q", 0, 0, _GDT_CODE64, _GDT_DATA)
        # offset 15:0, selector, stack table and type, offset 31:16, offset 63:32, reserved
        gate = (_HANDLER, CODE_SELECTOR, _INTERRUPT_GATE, 0, 0, 0)
        put(_IDT + 16 * _BREAKPOINT, "<HHHHII", *gate)
        self._memory[_HANDLER : _HANDLER + 2] = bytes.fromhex("48cf")  # iretq

    def _put(self, address: int, layout: str, *values: int) -> None:
        struct.pack_into(layout, self._memory, address, *values)
