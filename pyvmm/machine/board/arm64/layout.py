"""The places of an arm64 machine's devices: guest-physical addresses and interrupts.

All are below the RAM (pyvmm/boot/arm64/layout.py). docs/arm64.md has them; a test compares them.
"""

from __future__ import annotations

from pyvmm.boot.arm64.layout import GIB
from pyvmm.kvm.arm64 import uapi
from pyvmm.platform.arm64 import gicv2m, pl031, pl061

MAX_CPUS = 64

# --- guest-physical addresses ---------------------------------------------------------------------
GIC_DISTRIBUTOR = 0x0800_0000
GIC_CPU_INTERFACE = 0x0801_0000  # a GICv2's
GIC_FRAME = 0x0802_0000  # GICv2m's, for messages
GIC_FRAME_SIZE = gicv2m.SIZE
GIC_ITS = 0x0808_0000  # a GICv3's, for messages
GIC_REDISTRIBUTORS = 0x0880_0000  # a GICv3's, one for each vCPU
GIC_REDISTRIBUTORS_SIZE = MAX_CPUS * uapi.KVM_VGIC_V3_REDIST_SIZE
SERIAL = 0x0900_0000
SERIAL_SIZE = 8
CLOCK = 0x0901_0000
CLOCK_SIZE = pl031.SIZE
GPIO = 0x0902_0000
GPIO_SIZE = pl061.SIZE
VIRTIO_MMIO_BASE = 0x0A00_0000
VIRTIO_MMIO_STRIDE = 0x1000
VIRTIO_MMIO_SIZE = 0x200  # registers to 0x100, then the device's configuration space
PCI_ECAM = 0x0B00_0000  # the configuration spaces of bus 0
PCI_ECAM_SIZE = 0x10_0000
PCI_WINDOW = 0x1000_0000  # where BARs answer
PCI_WINDOW_SIZE = 0x1000_0000

# --- interrupts -----------------------------------------------------------------------------------
# GSIs, which count the shared ones from 0 on: the GIC's id is 32 more.
SERIAL_GSI = 0
GPIO_GSI = 1
GENERATION_GSI = 2
VIRTIO_GSI = 16
VIRTIO_SLOTS = 32
# Of all kinds, by the controller's version; KVM wants a multiple of 32.
GIC_INTERRUPTS = {3: 96, 2: 256}
# The shared ones of a GICv2 that are messages: five for each function of a PCI bus.
MESSAGE_GSIS = range(64, 224)

# A vCPU's own, counted from 16 on: the timers of secure and non-secure EL1, of the guest's own time
# and of the hypervisor (Arm Base System Architecture, "PPI assignments"), and the counters'.
TIMER_PPIS = (13, 14, 11, 10)
PMU_PPI = 7

# Where PCI devices write their messages, by the controller's version: GITS_TRANSLATER (Arm IHI
# 0069, 12.19 "The ITS register descriptions"), in the second 64 KiB of the ITS; or GICv2m's
# doorbell.
MESSAGES = {3: GIC_ITS + 0x1_0040, 2: GIC_FRAME + gicv2m.DOORBELL}

# --- above the RAM -------------------------------------------------------------------------------
MAPPED_FILE_ALIGN = GIB
MAX_MAPPED_FILES = 4 << 40
SMALLEST_ADDRESS_BITS = 32  # that KVM makes a VM for
