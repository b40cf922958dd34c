"""ACPI tables: how a guest finds its CPUs, interrupt controllers, virtio devices and serial port.

The machine is "hardware-reduced" (ACPI 6.5, 4.1): no PM timer, no SCI, no fixed power button;
power-off and reset are one register each. The power button is a device, whose event an interrupt of
a generic event device brings; another one brings those of PCI slots. Section numbers are those of
ACPI 6.5.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.boot.x86 import aml, layout

_OEM_ID = b"PYVMM "
_OEM_TABLE_ID = b"PYVMM   "
_CREATOR = b"PVMM"

# 5.2.9 FADT, "Fixed ACPI Description Table Fixed Feature Flags"
_PWR_BUTTON = 1 << 4  # set: there is no fixed-hardware power button
_SLP_BUTTON = 1 << 5
_RESET_REG_SUP = 1 << 10
_HW_REDUCED_ACPI = 1 << 20
# 5.2.9.3 "IA-PC Boot Architecture Flags"
_LEGACY_DEVICES = 1 << 0
_8042 = 1 << 1
_VGA_NOT_PRESENT = 1 << 2
_CMOS_RTC_NOT_PRESENT = 1 << 5

_PRESSED = 0x80  # 4.8.2.2.1.2: S0 Power Button Pressed
_GENERATION_CHANGED = 0x80  # "Virtual Machine Generation ID"
_VMCLOCK_UPDATED = 0x80  # UAPI.13 "Discovery via ACPI"
_DEVICE_CHECK, _EJECT_REQUEST = 1, 3  # 5.6.6 "Device Object Notifications"
# PCI Firmware Specification 3.3, 4.5.1 "_OSC Interface for PCI Host Bridge Devices"; ACPI 6.2.11
# "_OSC (Operating System Capabilities)"
_PCIE_CAPABILITY_CONTROL = 1 << 4
_UNRECOGNIZED_UUID, _UNRECOGNIZED_REVISION, _CAPABILITIES_MASKED = 1 << 2, 1 << 3, 1 << 4
_SLOTS = range(1, 32)  # device numbers; 0 is the host bridge
_MAX_XAPIC_ID = 254
_ENABLED = 1


class FixedDevices(NamedTuple):
    """The parts that every machine has: addresses of registers, I/O ports, interrupts (GSIs) and
    values.

    A guest powers off by writing `sleep_type_s5` to the sleep control port, and resets by writing
    `reset_value` to the reset port.
    """

    local_apic: int
    io_apic: int
    serial_port: int
    serial_ports: int
    serial_gsi: int
    sleep_control_port: int
    sleep_status_port: int
    sleep_type_s5: int
    reset_port: int
    reset_value: int
    sci_gsi: int
    power_button_gsi: int


class VirtioMmioDevice(NamedTuple):
    """One virtio-mmio register window: `size` bytes at guest-physical `base`, interrupt `gsi`."""

    base: int
    size: int
    gsi: int


class PciHost(NamedTuple):
    """A PCI host bridge for bus 0: its ECAM, `ecam_size` bytes at guest-physical `ecam`, the window
    of memory in which BARs lie, `window_size` bytes at `window`, below 4 GiB, and the first of the
    eight I/O ports for configuration accesses. The registers of its slots (pyvmm.pci.slots) are at
    I/O port `slots_port`, and `slots_gsi` tells of changes. In `memory_window`, if it is not empty,
    lie BARs that are memory."""

    ecam: int
    ecam_size: int
    window: int
    window_size: int
    config_port: int
    slots_port: int
    slots_gsi: int
    memory_window: range = range(0)


class AcpiConfig(NamedTuple):
    """The facts for the tables: `cpus` vCPUs whose APIC ids are 0 to cpus - 1, and the devices:
    those at `fixed` places, and the virtio devices. Without `pci` there is no such bus.

    `i8042` is whether there is a keyboard controller that a driver can use. A port that can
    only reset does not count: a guest would look for the rest of it, in vain and slowly.
    """

    fixed: FixedDevices
    cpus: int = 1
    virtio: tuple[VirtioMmioDevice, ...] = ()
    serial: bool = True
    i8042: bool = False
    pci: PciHost | None = None


class AcpiTables(NamedTuple):
    """`blob` goes to guest-physical `rsdp`, which is also the address of the RSDP in it.

    `tables` are the same tables one by one, by signature, as ``iasl`` takes them.
    """

    rsdp: int
    blob: bytes
    tables: dict[str, bytes]


def build(config: AcpiConfig, base: int = layout.ACPI_TABLES) -> AcpiTables:
    """All tables, to be placed at guest-physical `base`.

    Raises ValueError if they need more than the map leaves them (well over 500 vCPUs and devices).
    """
    rsdp_size = 36
    blob = bytearray(rsdp_size)
    tables = {}

    def place(table: bytes) -> int:
        blob.extend(bytes(-len(blob) % 16))
        address = base + len(blob)
        blob.extend(table)
        tables[table[:4].decode("ascii")] = table
        return address

    dsdt = place(build_dsdt(config))
    fadt = place(build_fadt(config, dsdt))
    described = [fadt, place(build_madt(config))]
    if config.pci is not None:
        described.append(place(build_mcfg(config.pci)))
    xsdt = place(build_xsdt(described))
    blob[:rsdp_size] = build_rsdp(xsdt)
    if len(blob) > layout.ACPI_TABLES_SIZE:
        raise ValueError(f"the ACPI tables need {len(blob)} bytes, more than the map has for them")
    return AcpiTables(base, bytes(blob), tables)


def build_rsdp(xsdt: int) -> bytes:
    """5.2.5.3 "Root System Description Pointer (RSDP) Structure", revision 2."""
    first = struct.pack("<8sB6sBI", b"RSD PTR ", 0, _OEM_ID, 2, 0)
    first = _with_checksum(first, 8)
    whole = first + struct.pack("<IQB3x", 36, xsdt, 0)
    return _with_checksum(whole, 32)


def build_xsdt(addresses: Sequence[int]) -> bytes:
    """5.2.8 "Extended System Description Table (XSDT)"."""
    return _table(b"XSDT", 1, struct.pack(f"<{len(addresses)}Q", *addresses))


def build_fadt(config: AcpiConfig, dsdt: int) -> bytes:
    """5.2.9 "Fixed ACPI Description Table (FADT)", revision 6, hardware-reduced.

    The fields for PM blocks and SCI are unused then and stay 0.
    """
    body = bytearray(276 - 36)

    def put(offset: int, form: str, *values: int) -> None:
        struct.pack_into("<" + form, body, offset - 36, *values)

    boot_flags = _VGA_NOT_PRESENT | _CMOS_RTC_NOT_PRESENT
    boot_flags |= _LEGACY_DEVICES if config.serial or config.i8042 else 0
    boot_flags |= _8042 if config.i8042 else 0
    put(46, "H", config.fixed.sci_gsi)
    put(109, "H", boot_flags)
    put(112, "I", _PWR_BUTTON | _SLP_BUTTON | _RESET_REG_SUP | _HW_REDUCED_ACPI)
    put(116, "BBBBQ", *_port(config.fixed.reset_port))
    put(128, "B", config.fixed.reset_value)
    put(131, "B", 0)  # minor version
    put(140, "Q", dsdt)  # X_DSDT
    put(244, "BBBBQ", *_port(config.fixed.sleep_control_port))
    put(256, "BBBBQ", *_port(config.fixed.sleep_status_port))
    body[268 - 36 : 276 - 36] = b"PYVMM\0\0\0"  # hypervisor vendor identity
    return _table(b"FACP", 6, bytes(body))


def build_madt(config: AcpiConfig) -> bytes:
    """5.2.12 "Multiple APIC Description Table (MADT)": every vCPU and the I/O APIC.

    There are no interrupt source overrides, because KVM's default routing joins GSI n to pin n of
    the I/O APIC, 0 (the PIT) included, and that is what a table without overrides says. There is
    no PCAT_COMPAT flag either: a guest that reads this table needs no 8259.
    """
    body = struct.pack("<II", config.fixed.local_apic, 0)
    for cpu in range(config.cpus):
        if cpu <= _MAX_XAPIC_ID:
            body += struct.pack("<BBBBI", 0, 8, cpu, cpu, _ENABLED)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, cpu, _ENABLED, cpu)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, config.fixed.io_apic, 0)
    return _table(b"APIC", 5, body)


def build_mcfg(host: PciHost) -> bytes:
    """The memory mapped configuration table (PCI Firmware Specification 3.3, 4.1.2 "MCFG Table
    Description"): bus 0 of segment 0."""
    return _table(b"MCFG", 1, struct.pack("<8xQHBB4x", host.ecam, 0, 0, 0))


def build_dsdt(config: AcpiConfig) -> bytes:
    """5.2.11.1 "Differentiated System Description Table (DSDT)": the devices, in AML."""
    devices = [_cpu(index) for index in range(config.cpus)]
    devices += [_virtio(index, device) for index, device in enumerate(config.virtio)]
    if config.pci is not None:
        devices += [_pci_host(config.pci), _motherboard(config.pci)]
    if config.serial:
        devices.append(_serial(config.fixed))
    if config.pci is not None:
        devices += [_generation(), _vmclock()]
    devices += [_power_button(), _event_device(config.fixed, config.pci)]
    sleep = aml.package(*(aml.integer(value) for value in (config.fixed.sleep_type_s5, 0, 0, 0)))
    return _table(b"DSDT", 2, aml.scope("\\_SB", *devices) + aml.name("\\_S5", sleep))


def _cpu(index: int) -> bytes:
    return aml.device(
        f"C{index:03X}",
        aml.name("_HID", aml.string("ACPI0007")),
        aml.name("_UID", aml.integer(index)),
    )


def _virtio(index: int, device: VirtioMmioDevice) -> bytes:
    resources = aml.resource_template(
        aml.memory32_fixed(device.base, device.size), aml.interrupt(device.gsi)
    )
    return aml.device(
        f"V{index:03X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(index)),
        aml.name("_CCA", aml.integer(1)),  # its DMA is coherent with the CPU's caches
        aml.name("_CRS", resources),
    )


def _pci_host(host: PciHost) -> bytes:
    """A PCI Express host bridge, which older systems may drive as one of PCI. Its devices have
    no INTx, so there is no _PRT."""
    windows = [aml.memory32_window(host.window, host.window_size)]
    if host.memory_window:
        windows.append(aml.memory64_window(host.memory_window.start, len(host.memory_window)))
    resources = aml.resource_template(aml.bus_numbers(0, 0), aml.io(host.config_port, 8), *windows)
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", resources),
        aml.method("_DSM", 4, *_keep_bars()),
        aml.method("_OSC", 4, *_grant_control()),
        aml.io_registers("SLTS", host.slots_port, "ARRV", "LEAV", "EJCT"),
        *(_slot(number) for number in _SLOTS),
        aml.method("EVNT", 0, *_slot_events()),
    )


def _slot(number: int) -> bytes:
    """A place from which a device can be ejected (6.3.3 "_EJx (Eject)"). There is no _STA: whether
    there is a device is seen in configuration space, as every system looks for one there."""
    return aml.device(
        _slot_name(number),
        aml.name("_ADR", aml.integer(number << 16)),
        aml.name("_SUN", aml.integer(number)),
        aml.method("_EJ0", 1, aml.store(aml.integer(1 << number), aml.path("EJCT"))),
    )


def _slot_name(number: int) -> str:
    return f"S{number:02X}"


def _slot_events() -> list[bytes]:
    """Each slot of which something is told hears of it, once."""
    told = aml.local(0)
    terms = []
    for register, event in (("ARRV", _DEVICE_CHECK), ("LEAV", _EJECT_REQUEST)):
        terms += [aml.store(aml.path(register), told), aml.store(told, aml.path(register))]
        terms += [
            aml.if_any(told, aml.integer(1 << number), aml.notify(_slot_name(number), event))
            for number in _SLOTS
        ]
    return terms


def _motherboard(host: PciHost) -> bytes:
    """A device by which Linux sees that an ECAM which MCFG names is nobody else's memory."""
    return aml.device(
        "MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resource_template(aml.memory32_fixed(host.ecam, host.ecam_size))),
    )


def _keep_bars() -> tuple[bytes, ...]:
    """PCI Firmware Specification 3.3, 4.6.5 "_DSM for Preserving PCI Boot Configurations": BARs
    stay where they are."""
    function, preserve = aml.argument(2), 5
    known = aml.buffer(bytes([1 << 0 | 1 << preserve]))
    return (
        aml.if_equal(
            aml.argument(0),
            aml.uuid("e5c937d0-3553-4d7a-9117-ea4d19c3434d"),
            aml.if_equal(function, aml.integer(0), aml.return_(known)),
            aml.if_equal(function, aml.integer(preserve), aml.return_(aml.integer(0))),
        ),
        aml.return_(aml.buffer(bytes(1))),
    )


def _grant_control() -> tuple[bytes, ...]:
    """The features that a system may handle itself: see to PCI Express capabilities. Hot-plug is by
    ACPI, and there are no power management events and no error reporting."""
    revision, capabilities = aml.argument(1), aml.argument(3)
    status, control, granted = aml.path("CDW1"), aml.path("CDW3"), aml.local(0)
    return (
        aml.dword_field("CDW1", capabilities, 0),
        aml.if_equal(
            aml.argument(0),
            aml.uuid("33db4d5b-1ff7-401c-9657-7441c03dd766"),
            aml.dword_field("CDW3", capabilities, 8),
            aml.if_not_equal(
                revision,
                aml.integer(1),
                aml.or_(status, aml.integer(_UNRECOGNIZED_REVISION), status),
            ),
            aml.and_(control, aml.integer(_PCIE_CAPABILITY_CONTROL), granted),
            aml.if_not_equal(
                granted,
                control,
                aml.or_(status, aml.integer(_CAPABILITIES_MASKED), status),
            ),
            aml.store(granted, control),
        ),
        aml.else_(aml.or_(status, aml.integer(_UNRECOGNIZED_UUID), status)),
        aml.return_(capabilities),
    )


def _serial(fixed: FixedDevices) -> bytes:
    resources = aml.resource_template(
        aml.io(fixed.serial_port, fixed.serial_ports), aml.interrupt(fixed.serial_gsi)
    )
    return aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", resources),
    )


def _power_button() -> bytes:
    """4.8.2.2.1.2 "Control Method Power Button": in a hardware-reduced machine the only kind."""
    return aml.device(
        "PWRB",
        aml.name("_HID", aml.eisa_id("PNP0C0C")),
        aml.name("_UID", aml.integer(0)),
    )


def _generation() -> bytes:
    """Microsoft's "Virtual Machine Generation ID" (2012): where the number lies that another one
    takes the place of in each copy of a running guest, whose random numbers would be the same."""
    address = aml.package(aml.integer(layout.GENERATION_ID), aml.integer(0))
    return aml.device(
        "VGEN",
        # Drivers go by the _CID, which has not the form that a _HID must have.
        aml.name("_HID", aml.string("PVMM0001")),
        aml.name("_CID", aml.string("VM_Gen_Counter")),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", address),
    )


def _vmclock() -> bytes:
    """UAPI.13 "VMClock", "Discovery via ACPI"."""
    page = aml.resource_template(aml.memory32_fixed(layout.VMCLOCK, layout.VMCLOCK_SIZE))
    return aml.device(
        "VCLK",
        aml.name("_HID", aml.string("AMZNC10C")),
        aml.name("_CID", aml.string("VMCLOCK")),
        aml.name("_DDN", aml.string("VMCLOCK")),
        aml.name("_CRS", page),
    )


def _event_device(fixed: FixedDevices, pci: PciHost | None) -> bytes:
    """5.6.9 "Interrupt-signaled ACPI Events": that the button was pressed, and with `pci` that
    there is something to be seen of a slot, or that the guest is a copy: a driver looks whether
    its generation has changed."""
    events = {fixed.power_button_gsi: [aml.notify("\\_SB.PWRB", _PRESSED)]}
    if pci is not None:
        events[pci.slots_gsi] = [
            aml.notify("\\_SB.VGEN", _GENERATION_CHANGED),
            aml.notify("\\_SB.VCLK", _VMCLOCK_UPDATED),
            aml.path("\\_SB.PCI0.EVNT"),
        ]
    happen = (
        aml.if_equal(aml.argument(0), aml.integer(gsi), *terms) for gsi, terms in events.items()
    )
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resource_template(*(aml.interrupt(gsi) for gsi in events))),
        aml.method("_EVT", 1, *happen),
    )


def _port(port: int) -> tuple[int, int, int, int, int]:
    """5.2.3.2 "Generic Address Structure" of an 8-bit I/O port."""
    system_io, bits, byte_access = 1, 8, 1
    return system_io, bits, 0, byte_access, port


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """5.2.6 "System Description Table Header" and `body`, with the checksum right."""
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        signature,
        36 + len(body),
        revision,
        0,
        _OEM_ID,
        _OEM_TABLE_ID,
        1,
        _CREATOR,
        1,
    )
    return _with_checksum(header + body, 9)


def _with_checksum(data: bytes, offset: int) -> bytes:
    """`data` with its byte at `offset` (0 so far) set so that all bytes add up to 0."""
    return data[:offset] + bytes([-sum(data) & 0xFF]) + data[offset + 1 :]
