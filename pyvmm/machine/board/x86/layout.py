"""The places of an x86 machine's devices: guest-physical addresses, I/O ports and interrupts.

Where it has RAM, and what boot puts there, is in pyvmm/boot/x86/layout.py. docs/memory-map.md draws
both; a test compares them.
"""

from __future__ import annotations

from pyvmm.boot.x86.acpi import FixedDevices, PciHost
from pyvmm.boot.x86.layout import GIB, HOLE_END, ram_ranges
from pyvmm.platform.x86 import acpi_pm, i8042

# --- in the hole below 4 GiB ----------------------------------------------------------------------
PCI_WINDOW = 0xC000_0000  # where BARs answer
PCI_WINDOW_SIZE = 0x1000_0000
VIRTIO_MMIO_BASE = 0xD000_0000
VIRTIO_MMIO_STRIDE = 0x1000
VIRTIO_MMIO_SIZE = 0x200  # registers to 0x100, then the device's configuration space
PCI_ECAM = 0xE000_0000  # the configuration spaces of bus 0
PCI_ECAM_SIZE = 0x10_0000
IOAPIC = 0xFEC0_0000
LOCAL_APIC = 0xFEE0_0000
KVM_IDENTITY_MAP = 0xFFFB_C000  # one page, for KVM on Intel
KVM_TSS = 0xFFFB_D000  # three pages, likewise

# --- above the RAM -------------------------------------------------------------------------------
MAPPED_FILE_ALIGN = GIB  # the largest page, eight of Linux's memory sections
MAX_MAPPED_FILES = 4 << 40  # KASLR leaves 10 TiB above the RAM, a KVM memory slot has at most 8

# --- I/O ports and interrupts --------------------------------------------------------------------
SERIAL_PORT = 0x3F8
SERIAL_PORTS = 8
SERIAL_GSI = 4
I8042_DATA_PORT = 0x60
I8042_COMMAND_PORT = I8042_DATA_PORT + i8042.COMMAND
PCI_CONFIG_PORT = 0xCF8
ACPI_SLEEP_CONTROL_PORT = 0x600
ACPI_SLEEP_STATUS_PORT = ACPI_SLEEP_CONTROL_PORT + acpi_pm.SLEEP_STATUS
ACPI_RESET_PORT = ACPI_SLEEP_CONTROL_PORT + acpi_pm.RESET
ACPI_SCI_GSI = 9  # the FADT wants one; there is no SCI on a hardware-reduced machine, so …
POWER_BUTTON_GSI = 9  # … this has its line
ACPI_SLEEP_TYPE_S5 = acpi_pm.SLEEP_TYPE_S5
ACPI_RESET_VALUE = acpi_pm.RESET_VALUE
PCI_SLOTS_PORT = 0x620
PCI_SLOTS_GSI = 13  # a PC's coprocessor had it

# GSIs of virtio-mmio devices, in the order they are given out: the ISA lines first, because a
# kernel that learns of a device from its command line can only reach those.
VIRTIO_GSIS = (5, 6, 7, 10, 11, 12, 14, 15, *range(16, 24))

FIXED_DEVICES = FixedDevices(
    local_apic=LOCAL_APIC,
    io_apic=IOAPIC,
    serial_port=SERIAL_PORT,
    serial_ports=SERIAL_PORTS,
    serial_gsi=SERIAL_GSI,
    sleep_control_port=ACPI_SLEEP_CONTROL_PORT,
    sleep_status_port=ACPI_SLEEP_STATUS_PORT,
    sleep_type_s5=ACPI_SLEEP_TYPE_S5,
    reset_port=ACPI_RESET_PORT,
    reset_value=ACPI_RESET_VALUE,
    sci_gsi=ACPI_SCI_GSI,
    power_button_gsi=POWER_BUTTON_GSI,
)
"""The facts in the ACPI tables of the devices that every machine has."""

PCI_HOST = PciHost(
    PCI_ECAM,
    PCI_ECAM_SIZE,
    PCI_WINDOW,
    PCI_WINDOW_SIZE,
    PCI_CONFIG_PORT,
    PCI_SLOTS_PORT,
    PCI_SLOTS_GSI,
)
"""The facts in them of the PCI bus."""


def is_message(address: int) -> bool:
    """True if a write to guest-physical `address` is an interrupt (Intel SDM, volume 3, 11.11.1
    "Message Address Register Format")."""
    return address & ~0xF_FFFF == LOCAL_APIC


def mapped_files_start(ram: int) -> int:
    """The address of the first file that is memory of a guest with `ram` bytes of RAM."""
    end = max(HOLE_END, *(start + size for start, size in ram_ranges(ram)))
    return -(-end // MAPPED_FILE_ALIGN) * MAPPED_FILE_ALIGN
