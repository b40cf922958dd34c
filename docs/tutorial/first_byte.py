"""A virtual machine from nothing to its first byte on the serial port."""

import mmap
import sys

from pyvmm.kvm.exits import IoOut
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.x86 import registers, uapi
from pyvmm.kvm.x86.uapi import ffi

SERIAL_PORT = 0x3F8
CODE_ADDRESS = 0x1000

# 16-bit x86 machine code, assembled by hand.
CODE = bytes.fromhex(
    "baf803"  # mov dx, 0x3f8    the serial port's data register
    "b048"  # mov al, 'H'
    "ee"  # out dx, al
    "b069"  # mov al, 'i'
    "ee"  # out dx, al
    "b00a"  # mov al, '\n'
    "ee"  # out dx, al
    "f4"  # hlt
)

with Kvm.open() as kvm, kvm.create_vm() as vm:
    # The guest's RAM is memory of this process.
    ram = mmap.mmap(-1, 0x4000)
    ram[CODE_ADDRESS : CODE_ADDRESS + len(CODE)] = CODE
    host_address = int(ffi.cast("uintptr_t", ffi.from_buffer(ram)))
    vm.set_memory_region(slot=0, guest_addr=0, size=len(ram), host_addr=host_address)

    with vm.create_vcpu(0) as vcpu:
        # A processor starts in real mode with its code segment at the top of memory.
        sregs = registers.get_sregs(vcpu)
        sregs.cs.base = sregs.cs.selector = 0
        registers.set_sregs(vcpu, sregs)
        regs = registers.get_regs(vcpu)
        regs.rip = CODE_ADDRESS
        registers.set_regs(vcpu, regs)

        # Run until the guest halts; print what it sends.
        while (reason := vcpu.run()) != uapi.KVM_EXIT_HLT:
            event = vcpu.exit()
            if not isinstance(event, IoOut) or event.port != SERIAL_PORT:
                sys.exit(f"unexpected exit {reason}: {event}")
            sys.stdout.write(event.data.decode())
            sys.stdout.flush()
