"""ACPI tables: read back with a decoder of our own, and by ACPICA's iasl."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import uuid
from pathlib import Path

import pytest

from pyvmm.boot.x86 import AcpiConfig, VirtioMmioDevice, acpi, aml
from pyvmm.machine.board.x86 import layout
from pyvmm.machine.board.x86.layout import FIXED_DEVICES

IASL = shutil.which("iasl")
needs_iasl = pytest.mark.skipif(not IASL, reason="no iasl: apt install acpica-tools")

DEVICES = tuple(
    VirtioMmioDevice(0xD000_0000 + n * 0x1000, 0x200, gsi)
    for n, gsi in enumerate(layout.VIRTIO_GSIS)
)
PCI = layout.PCI_HOST
CONFIGS = {
    "one-cpu": AcpiConfig(FIXED_DEVICES),
    "disks": AcpiConfig(FIXED_DEVICES, cpus=4, virtio=DEVICES[:2]),
    "everything": AcpiConfig(FIXED_DEVICES, cpus=300, virtio=DEVICES, i8042=True),
    "bare": AcpiConfig(FIXED_DEVICES, cpus=1, serial=False),
    "pci": AcpiConfig(FIXED_DEVICES, cpus=2, pci=PCI),
}


def parse(tables: acpi.AcpiTables) -> dict[str, bytes]:
    """Follow the pointers from the RSDP, as a kernel does; tables by signature."""

    def at(address: int, size: int) -> bytes:
        start = address - tables.rsdp
        assert start >= 0 and start + size <= len(tables.blob)
        return tables.blob[start : start + size]

    def table(address: int) -> bytes:
        content = at(address, struct.unpack("<I", at(address + 4, 4))[0])
        assert sum(content) % 256 == 0, "checksum"
        return content

    rsdp = at(tables.rsdp, 36)
    assert rsdp[:8] == b"RSD PTR " and rsdp[15] == 2
    assert sum(rsdp[:20]) % 256 == 0 and sum(rsdp) % 256 == 0
    length, address = struct.unpack_from("<IQ", rsdp, 20)
    assert length == 36
    xsdt = table(address)
    found = {"XSDT": xsdt}
    for (pointer,) in struct.iter_unpack("<Q", xsdt[36:]):
        content = table(pointer)
        found[content[:4].decode()] = content
    (dsdt,) = struct.unpack_from("<Q", found["FACP"], 140)
    found["DSDT"] = table(dsdt)
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_table_is_reached_with_its_checksum_right(config: AcpiConfig) -> None:
    found = parse(acpi.build(config))
    expected = {"XSDT", "FACP", "APIC", "DSDT"}
    assert set(found) == (expected if config.pci is None else {*expected, "MCFG"})


def test_rsdp_can_also_be_found_by_searching() -> None:
    address = acpi.build(AcpiConfig(FIXED_DEVICES)).rsdp
    assert 0xE0000 <= address < 0x100000 and address % 16 == 0


def test_fadt_has_the_registers_of_the_map() -> None:
    fadt = parse(acpi.build(AcpiConfig(FIXED_DEVICES)))["FACP"]
    assert len(fadt) == 276 and fadt[8] == 6

    def register(offset: int) -> tuple[int, ...]:
        return struct.unpack_from("<BBBBQ", fadt, offset)

    assert register(116) == (1, 8, 0, 1, 0x602), "reset"
    assert fadt[128] == 1
    assert register(244) == (1, 8, 0, 1, 0x600), "sleep control"
    assert register(256) == (1, 8, 0, 1, 0x601), "sleep status"
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 << 20, "hardware-reduced"
    assert flags & 1 << 10, "reset register supported"


@pytest.mark.parametrize(
    ("name", "flags"), [("one-cpu", 0b100101), ("everything", 0b100111), ("bare", 0b100100)]
)
def test_fadt_says_which_legacy_devices_a_guest_need_not_look_for(name: str, flags: int) -> None:
    fadt = parse(acpi.build(CONFIGS[name]))["FACP"]
    assert struct.unpack_from("<H", fadt, 109)[0] == flags


def test_mcfg_has_the_ecam_of_bus_0() -> None:
    mcfg = parse(acpi.build(CONFIGS["pci"]))["MCFG"]
    assert struct.unpack_from("<QHBB", mcfg, 44) == (PCI.ecam, 0, 0, 0)
    assert len(mcfg) == 60
    assert "MCFG" not in parse(acpi.build(CONFIGS["bare"]))


def test_madt_has_every_cpu_and_the_io_apic() -> None:
    madt = parse(acpi.build(AcpiConfig(FIXED_DEVICES, cpus=300)))["APIC"]
    assert struct.unpack_from("<I", madt, 36)[0] == 0xFEE0_0000
    ids, io_apics = [], []
    offset = 44
    while offset < len(madt):
        kind, size = madt[offset], madt[offset + 1]
        if kind == 0:
            uid, apic_id, flags = struct.unpack_from("<BBI", madt, offset + 2)
            assert uid == apic_id and flags == 1
            ids.append(apic_id)
        elif kind == 9:
            apic_id, flags, uid = struct.unpack_from("<III", madt, offset + 4)
            assert uid == apic_id and flags == 1
            ids.append(apic_id)
        else:
            assert kind == 1
            io_apics.append(struct.unpack_from("<BxII", madt, offset + 2))
        offset += size
    assert ids == list(range(300)), "255 is the broadcast id of xAPIC: such a CPU needs x2APIC"
    assert io_apics == [(0, 0xFEC0_0000, 0)]


def run_iasl(directory: Path, *arguments: str) -> str:
    assert IASL
    done = subprocess.run(
        [IASL, *arguments], cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not re.search(r"warning|error|invalid|unknown|could not", _harmless(said), re.I), said
    return said


def _harmless(said: str) -> str:
    """iasl's output without the lines that count the complaints as none."""
    return re.sub(r"0 Errors, 0 Warnings, 0 Remarks", "", said)


def disassemble(directory: Path, config: AcpiConfig) -> dict[str, str]:
    sources = {}
    for signature, content in parse(acpi.build(config)).items():
        (directory / f"{signature}.dat").write_bytes(content)
        run_iasl(directory, "-d", f"{signature}.dat")
        sources[signature] = (directory / f"{signature}.dsl").read_text()
    return sources


@needs_iasl
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_iasl_disassembles_every_table_without_complaint(
    tmp_path: Path, config: AcpiConfig
) -> None:
    for source in disassemble(tmp_path, config).values():
        header = source.partition("*/")[0]
        assert "Incorrect" not in source and "Invalid" not in source
        assert "**" not in header.replace("****", "")
        assert "Unknown" not in source and "ERROR" not in source


@needs_iasl
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_iasl_compiles_what_it_disassembled(tmp_path: Path, config: AcpiConfig) -> None:
    disassemble(tmp_path, config)
    for signature in ("DSDT", "FACP", "APIC"):
        said = run_iasl(tmp_path, "-p", f"again-{signature}", f"{signature}.dsl")
        assert "0 Errors, 0 Warnings, 0 Remarks" in said
    for signature in ("FACP", "APIC"):
        again = (tmp_path / f"again-{signature}.aml").read_bytes()
        first = (tmp_path / f"{signature}.dat").read_bytes()
        # The compiler puts its own name and version into the header, and the checksum follows.
        assert again[36:] == first[36:]


@needs_iasl
def test_iasl_reads_the_devices_that_are_meant(tmp_path: Path) -> None:
    dsdt = disassemble(tmp_path, CONFIGS["disks"])["DSDT"]
    assert len(re.findall(r'Name \(_HID, "LNRO0005"\)', dsdt)) == 2
    for device in DEVICES[:2]:
        block = dsdt.partition(f"0x{device.base:08X}")[2].partition("Device")[0]
        assert "0x00000200" in block
        assert re.search(r"Interrupt \(ResourceConsumer, Edge, ActiveHigh, Exclusive", block)
        assert f"0x{device.gsi:08X}" in block
    serial = dsdt.partition("Device (COM1)")[2]
    assert '_HID, EisaId ("PNP0501")' in serial
    button = dsdt.partition("Device (PWRB)")[2].partition("Device")[0]
    assert '_HID, EisaId ("PNP0C0C")' in button
    events = dsdt.partition("Device (GED)")[2]
    assert '_HID, "ACPI0013"' in events
    assert re.search(r"Interrupt \(ResourceConsumer, Edge, ActiveHigh, Exclusive", events)
    assert f"0x{layout.POWER_BUTTON_GSI:08X}" in events
    method = events.partition("Method (_EVT, 1, Serialized)")[2]
    assert re.search(r"Notify \(.*PWRB, 0x80\)", method)
    assert serial.count("0x03F8") == 2 and "0x00000004" in serial
    assert len(re.findall(r'Name \(_HID, "ACPI0007"', dsdt)) == 4
    power_off = re.search(r"Name \(\\?_S5, Package.*?\{(.*?)\}", dsdt, re.DOTALL)
    assert power_off
    assert "0x05" in power_off[1].split(",")[0]
    assert "COM1" not in disassemble(tmp_path, CONFIGS["bare"])["DSDT"]


@needs_iasl
def test_iasl_reads_what_tells_a_copy(tmp_path: Path) -> None:
    dsdt = disassemble(tmp_path, CONFIGS["pci"])["DSDT"]
    clock = dsdt.partition("Device (VCLK)")[2].partition("Device (")[0]
    for name, value in (("_HID", "AMZNC10C"), ("_CID", "VMCLOCK"), ("_DDN", "VMCLOCK")):
        assert f'Name ({name}, "{value}")' in clock
    page = re.search(r"Memory32Fixed \(ReadWrite,\s*0x(\w+),[^\n]*\s*0x(\w+),", clock)
    assert page and [int(number, 16) for number in page.groups()] == [0xDF000, 0x1000]
    method = dsdt.partition("Device (GED)")[2].partition("Method (_EVT")[2]
    told = re.findall(r"Notify \(.*?(VGEN|VCLK), 0x80\)", method)
    assert told == ["VGEN", "VCLK"]


@needs_iasl
def test_iasl_reads_the_host_bridge_that_is_meant(tmp_path: Path) -> None:
    dsdt = disassemble(tmp_path, CONFIGS["pci"])["DSDT"]
    bridge = dsdt.partition("Device (PCI0)")[2]
    words = " ".join(re.sub(r"//[^\n]*|/\*.*?\*/", "", bridge).split())
    for wanted in (
        'Name (_HID, EisaId ("PNP0A08") )',
        'Name (_CID, EisaId ("PNP0A03") )',
        "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, 0x0000, 0x0000, 0x0000,"
        " 0x0000, 0x0001, ,, )",
        "IO (Decode16, 0x0CF8, 0x0CF8, 0x01, 0x08, )",
        "DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,"
        " 0x00000000, 0xC0000000, 0xCFFFFFFF, 0x00000000, 0x10000000, ,, , AddressRangeMemory,"
        " TypeStatic)",
        'ToUUID ("e5c937d0-3553-4d7a-9117-ea4d19c3434d")',
        "If ((Arg2 == Zero)) { Return (Buffer (One) { 0x21 }) }",
        "If ((Arg2 == 0x05)) { Return (Zero) }",
        "Device (MBRD)",
        "Memory32Fixed (ReadWrite, 0xE0000000, 0x00100000, )",
    ):
        assert wanted in words, words


HOST_BRIDGES = uuid.UUID("33db4d5b-1ff7-401c-9657-7441c03dd766")


@needs_iasl
@pytest.mark.parametrize(
    ("whose", "revision", "asked", "answered"),
    [
        # A query, and what is granted: PCI Express capabilities, and no more than is asked for.
        (HOST_BRIDGES, 1, (1, 0x1F, 0x3F), (0x11, 0x1F, 0x10)),
        (HOST_BRIDGES, 1, (0, 0x1F, 0x10), (0, 0x1F, 0x10)),
        (HOST_BRIDGES, 1, (0, 0x1F, 0), (0, 0x1F, 0)),
        (HOST_BRIDGES, 2, (0, 0x1F, 0x10), (8, 0x1F, 0x10)),
        (uuid.UUID(int=7), 1, (0, 0x1F, 0x3F), (4, 0x1F, 0x3F)),
    ],
)
def test_acpica_runs_the_method_that_grants_control(
    whose: uuid.UUID,
    revision: int,
    asked: tuple[int, ...],
    answered: tuple[int, ...],
    tmp_path: Path,
) -> None:
    (tmp_path / "DSDT.dat").write_bytes(parse(acpi.build(CONFIGS["pci"]))["DSDT"])
    buffers = [data.hex(" ") for data in (whose.bytes_le, struct.pack("<3I", *asked))]
    command = f"execute \\_SB.PCI0._OSC ({buffers[0]}) {revision} 3 ({buffers[1]})"
    done = subprocess.run(
        ["acpiexec", "-b", command, "DSDT.dat"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answer = re.search(r"\[Buffer\] Length 0C = +0000: ([0-9A-F ]{35})", done.stdout)
    assert answer, done.stdout
    assert struct.unpack("<3I", bytes.fromhex(answer[1])) == answered


@needs_iasl
def test_iasl_reads_the_window_of_memory_that_is_meant(tmp_path: Path) -> None:
    window = range(5 << 32, 7 << 32)
    config = AcpiConfig(FIXED_DEVICES, pci=PCI._replace(memory_window=window))
    dsdt = disassemble(tmp_path, config)["DSDT"]
    words = " ".join(re.sub(r"//[^\n]*|/\*.*?\*/", "", dsdt).split())
    assert (
        "QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, Prefetchable, ReadWrite,"
        " 0x0000000000000000, 0x0000000500000000, 0x00000006FFFFFFFF, 0x0000000000000000,"
        " 0x0000000200000000, ,, , AddressRangeMemory, TypeStatic)"
    ) in words, words
    assert "QWordMemory" not in disassemble(tmp_path, CONFIGS["pci"])["DSDT"]


@needs_iasl
def test_iasl_reads_the_slots_that_are_meant(tmp_path: Path) -> None:
    dsdt = disassemble(tmp_path, CONFIGS["pci"])["DSDT"]
    words = " ".join(re.sub(r"//[^\n]*|/\*.*?\*/", "", dsdt).split())
    assert "OperationRegion (SLTS, SystemIO, 0x0620, 0x0C)" in words
    fields = "ARRV, 32, LEAV, 32, EJCT, 32"
    assert f"Field (SLTS, DWordAcc, NoLock, Preserve) {{ {fields} }}" in words
    for number in range(1, 32):
        slot = words.partition(f"Device (S{number:02X})")[2].partition("Device (")[0]
        names = {2: "0x02", 1: "One"}
        sun = names.get(number, f"0x{number:02X}")
        assert f"Name (_SUN, {sun})" in slot
        assert re.search(rf"Name \(_ADR, 0x0*{number << 16:X}\)", slot)
        bit = {1: "0x02"}.get(number, rf"0x0*{1 << number:X}")
        assert re.search(rf"Method \(_EJ0, 1, \w+\) {{ EJCT = {bit} }}", slot)
    told = words.partition("Method (EVNT, 0, Serialized)")[2].partition("Device (")[0]
    arrived, _, leaving = told.partition("Local0 = LEAV LEAV = Local0")
    assert "Local0 = ARRV ARRV = Local0" in arrived
    for part, event in ((arrived, "One"), (leaving, "0x03")):
        notified = re.findall(
            rf"If \(\(Local0 & (0x[0-9A-F]+)\)\) {{ Notify \(S([0-9A-F]+), {event}\)", part
        )
        assert [int(slot, 16) for _, slot in notified] == list(range(1, 32))
        assert all(int(bit, 16) == 1 << int(slot, 16) for bit, slot in notified)
    events = words.partition("Method (_EVT, 1, Serialized)")[2]
    assert f"If ((Arg0 == 0x{layout.POWER_BUTTON_GSI:02X})) {{ Notify (\\_SB.PWRB, 0x80)" in events
    assert re.search(rf"If \(\(Arg0 == 0x{layout.PCI_SLOTS_GSI:02X}\)\) {{ .*EVNT \(\)", events)
    assert "SLTS" not in disassemble(tmp_path, CONFIGS["disks"])["DSDT"]


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0x100, "0b0001"),
        (0x1_0000, "0c00000100"),
        (1 << 32, "0e0000000001000000"),
    ],
)
def test_aml_integers_are_the_shortest(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize("size", [0, 50, 62, 63, 64, 4000, 4100, 70_000])
def test_aml_package_lengths_count_themselves(size: int) -> None:
    encoded = aml.scope("ABCD", bytes(size))
    lead = encoded[1]
    extra = lead >> 6
    length = lead & 0x3F
    if extra:
        length = lead & 0xF | int.from_bytes(encoded[2 : 2 + extra], "little") << 4
    assert length == len(encoded) - 1


def test_aml_refuses_what_it_cannot_say() -> None:
    with pytest.raises(ValueError):
        aml.integer(1 << 64)
    with pytest.raises(ValueError):
        aml.scope("ABCD", bytes(1 << 28))
    with pytest.raises(ValueError):
        acpi.build(AcpiConfig(FIXED_DEVICES, cpus=20_000))
