"""The guest that probe.py runs: 64 KiB, one vCPU at EL1, a few instructions."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

from pyvmm.host.syscalls import Closable
from pyvmm.kvm.arm64 import boot_vcpu, uapi
from pyvmm.kvm.arm64.uapi import ffi
from pyvmm.kvm.system import Kvm

_SIZE = 0x1_0000
_CODE = 0x4000
_DATA = 0x8000
_NOWHERE = 0x9_0000  # past the memory, so that an access leaves the guest

# A64 instructions (Arm Architecture Reference Manual, chapter C6)
_DONE = struct.pack("<2I", 0xD2A00121, 0xB9000020)  # mov x1, #_NOWHERE; str w0, [x1]
_ITERATIONS = 4000
_COUNTING_LOOP = (
    struct.pack(
        "<3I",
        0xD2800002 | _ITERATIONS << 5,  # start: mov x2, #_ITERATIONS
        0xF1000442,  # again: subs x2, x2, #1
        0x54FFFFE1,  # b.ne again
    )
    + _DONE
    + struct.pack("<I", 0x17FFFFFB)  # b start
)

_FLOATING_POINT = struct.pack(
    "<4I",
    0xD2A00605,  # mov x5, #(3 << 20): CPACR_EL1.FPEN
    0xD5181045,  # msr cpacr_el1, x5
    0xD5033FDF,  # isb
    0x4EA11C20,  # mov v0.16b, v1.16b
)
_NOP = struct.pack("<I", 0xD503201F)
_COUNTER = struct.pack("<I", 0xD53BE043)  # mrs x3, cntvct_el0


class ProbeGuest(Closable):
    """The VM. `start` puts code into it; ``vcpu.run()`` runs it up to its store to nowhere."""

    done = uapi.KVM_EXIT_MMIO
    counting_loop = _COUNTING_LOOP
    loop_instructions = 2 * _ITERATIONS

    def __init__(self, kvm: Kvm) -> None:
        """Raises HostError."""
        self._memory = mmap.mmap(-1, _SIZE)
        self._vm = kvm.create_vm()
        try:
            host_addr = int(ffi.cast("uintptr_t", ffi.from_buffer(self._memory)))
            self._vm.set_memory_region(0, 0, _SIZE, host_addr)
            self.vcpu = self._vm.create_vcpu(0)
        except BaseException:
            self._vm.close()
            raise

    def instructions(self) -> Iterator[tuple[str, bytes]]:
        """(name, code) of what kernels execute, each to be run on its own."""
        yield "floating point", _FLOATING_POINT + _DONE
        yield "the counter", _COUNTER + _DONE

    def start(self, code: bytes) -> None:
        """Put `code` into memory and the vCPU, all its state fresh, at its beginning."""
        # KVM completes the store of the code before when it enters the guest: it skips one.
        code = _NOP + code
        self._memory[_CODE : _CODE + len(code)] = code
        boot_vcpu.setup_vcpu(self._vm, self.vcpu, pmu=False)
        boot_vcpu.setup_boot_vcpu(self.vcpu, pc=_CODE, x0=_DATA)

    def close(self) -> None:
        """Give everything back."""
        self.vcpu.close()
        self._vm.close()
        self._memory.close()
