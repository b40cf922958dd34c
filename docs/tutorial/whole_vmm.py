"""A whole virtual machine monitor: whole_vmm.py KERNEL INITRD DISK boots Linux from its disk."""

import contextlib
import os
import sys
import termios
import threading
import tty

from pyvmm.boot import x86 as boot
from pyvmm.bus import Action, Bus
from pyvmm.host.files import open_image
from pyvmm.host.syscalls import EventFd
from pyvmm.kvm.loop import run_until_exit
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.x86 import cpuid, irqchip
from pyvmm.kvm.x86.boot_vcpu import setup_boot_vcpu, setup_vcpu
from pyvmm.machine.board.x86 import layout
from pyvmm.memory import GuestMemory
from pyvmm.platform.serial import Serial
from pyvmm.platform.x86 import acpi_pm
from pyvmm.transport.mmio import QUEUE_NOTIFY, MmioTransport
from pyvmm.virtio.blk.backend import FileBackend
from pyvmm.virtio.blk.device import BlockDevice

kernel, initrd, disk = sys.argv[1:]
STDIN = 0
DISK_ADDRESS, DISK_WINDOW, DISK_GSI = layout.VIRTIO_MMIO_BASE, 0x1000, 5

# 1. Memory, with all in it that the kernel is started with.
memory = GuestMemory(boot.ram_ranges(512 << 20))
entry = boot.load(
    memory,
    kernel=kernel,
    initrd=initrd,
    cmdline="console=ttyS0 quiet pci=off root=/dev/vda rw",
    acpi=boot.AcpiConfig(
        fixed=layout.FIXED_DEVICES,
        virtio=(boot.VirtioMmioDevice(DISK_ADDRESS, DISK_WINDOW, DISK_GSI),),
    ),
)

# 2. A virtual machine that has this memory, and interrupt controllers and a timer in the kernel.
kvm = Kvm.open()
vm = kvm.create_vm()
for slot, region in enumerate(memory.regions):
    vm.set_memory_region(slot, region.guest_addr, region.size, region.host_addr)
irqchip.set_tss_addr(vm, layout.KVM_TSS)
irqchip.set_identity_map_addr(vm, layout.KVM_IDENTITY_MAP)
irqchip.create_irqchip(vm)
irqchip.create_pit2(vm)

# 3. I/O ports: a serial port that writes to our standard output, and the power switch.
ports, mmio = Bus("I/O port"), Bus("MMIO")
serial = Serial(
    irq=lambda level: vm.irq_line(layout.SERIAL_GSI, level),
    sink=lambda data: print(end=data.decode("latin-1"), flush=True),
)
ports.register(layout.SERIAL_PORT, layout.SERIAL_PORTS, serial)
ports.register(layout.ACPI_SLEEP_CONTROL_PORT, acpi_pm.PORTS, acpi_pm.AcpiPm())

# 4. The disk: a virtio-blk device on the image, behind a virtio-mmio transport.
device = BlockDevice(FileBackend(open_image(disk, read_only=False)), name="disk0", serial="disk0")
interrupt = EventFd()
transport = MmioTransport(device, memory, interrupt.signal, irq_eventfd=interrupt)
mmio.register(DISK_ADDRESS, DISK_WINDOW, transport)
# KVM turns the driver's write to QueueNotify into a signal that wakes the disk's thread, and the
# disk's signal into an interrupt. Neither makes the vCPU leave the guest.
for index, kick in enumerate(transport.kicks):
    vm.ioeventfd(kick.fd, DISK_ADDRESS + QUEUE_NOTIFY, 4, datamatch=index)
vm.irqfd(interrupt.fd, DISK_GSI)

# 5. A processor, which stands where the kernel begins.
vcpu = vm.create_vcpu(0)
setup_vcpu(vcpu, cpuid.supported(kvm), index=0, count=1)
setup_boot_vcpu(
    vcpu,
    mode="long64" if entry.mode == boot.LONG64 else "protected32",
    rip=entry.rip,
    gdt_base=entry.gdt_base,
    rsp=entry.rsp,
    rsi=entry.rsi,
    rbx=entry.rbx,
    cr3=entry.cr3,
)


# 6. What is typed goes into the serial port, as soon as the guest has room for it.
def type_in() -> None:
    room = threading.Event()
    serial.watch_room(room.set)
    while typed := os.read(STDIN, 16):
        while typed := typed[serial.enqueue_input(typed) :]:
            room.wait()
            room.clear()


# 7. Run the guest. It comes back for each access to a port or a register that is ours.
with contextlib.ExitStack() as restoring:
    if os.isatty(STDIN):
        restoring.callback(termios.tcsetattr, STDIN, termios.TCSADRAIN, termios.tcgetattr(STDIN))
        tty.setraw(STDIN)
    threading.Thread(target=type_in, daemon=True).start()
    action = run_until_exit(vcpu, ports, mmio)
device.reset()  # waits for what the disk has begun
sys.exit(None if action is Action.POWEROFF else f"the guest ended by {action or vcpu.exit()}")
