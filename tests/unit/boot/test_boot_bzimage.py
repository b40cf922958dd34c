"""bzImage: what the guest finds in memory, and every header that must be refused (rows 55, 56)."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from boot_images import CODE, MIB, boot, bzimage, guest_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.boot import x86
from pyvmm.errors import ConfigError
from pyvmm.machine.board.x86.layout import FIXED_DEVICES

ZERO_PAGE = 0x7000


def refused(directory: Path, kernel: bytes, *words: str, **options: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        boot(directory, kernel, **options)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_kernel_is_where_its_header_wants_it_and_starts_at_the_64_bit_entry(tmp_path: Path) -> None:
    entry, memory = boot(tmp_path, bzimage(pref_address=0x200_0000))
    assert memory.read(0x200_0000, len(CODE)) == CODE
    assert entry.mode == x86.LONG64
    assert entry.rip == 0x200_0200
    assert entry.rsi == ZERO_PAGE


def test_zero_page_carries_the_header_and_what_the_kernel_must_know(tmp_path: Path) -> None:
    kernel = bzimage()
    _, memory = boot(tmp_path, kernel, initrd=b"x" * 5000, cmdline="root=/dev/vda rw")
    page = memory.read(ZERO_PAGE, 4096)
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x230:0x268] == kernel[0x230:0x268]
    assert page[0x210] == 0xFF, "type_of_loader"
    (cmdline,) = struct.unpack_from("<I", page, 0x228)
    assert memory.read(cmdline, 17) == b"root=/dev/vda rw\0"
    start, size = struct.unpack_from("<II", page, 0x218)
    assert size == 5000
    assert start % 4096 == 0 and memory.read(start, 5000) == b"x" * 5000
    (rsdp,) = struct.unpack_from("<Q", page, 0x70)
    assert memory.read(rsdp, 8) == b"RSD PTR "


def e820_of(page: bytes) -> list[tuple[int, int, int]]:
    return [struct.unpack_from("<QQI", page, 0x2D0 + 20 * index) for index in range(page[0x1E8])]


def test_e820_of_a_small_guest(tmp_path: Path) -> None:
    _, memory = boot(tmp_path, bzimage(), memory=guest_memory(64))
    assert e820_of(memory.read(ZERO_PAGE, 4096)) == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xDF000, 0x1000, 2),
        (0xE0000, 0x20000, 3),
        (0x100000, 63 * MIB, 1),
    ]


def test_e820_of_five_gib_has_ram_above_the_hole(tmp_path: Path) -> None:
    _, memory = boot(tmp_path, bzimage(), memory=guest_memory(5 * 1024), initrd=b"i" * 100)
    page = memory.read(ZERO_PAGE, 4096)
    ranges = e820_of(page)
    assert ranges[-2:] == [(0x100000, 0xC000_0000 - 0x100000, 1), (1 << 32, 2 << 30, 1)]
    usable = sum(size for _, size, kind in ranges if kind == 1)
    assert 5 << 30 > usable > (5 << 30) - MIB
    start = struct.unpack_from("<I", page, 0x218)[0]
    assert start + 100 <= 0x8000_0000, "initrd_addr_max holds, although there is RAM above"


def test_identity_map_of_the_first_four_gib(tmp_path: Path) -> None:
    entry, memory = boot(tmp_path, bzimage())

    def table(address: int, index: int) -> int:
        return struct.unpack("<Q", memory.read((address & ~0xFFF) + 8 * index, 8))[0]

    for address in (0, 0x7000, 0x100_0200, 0x3FFF_FFFF, 0x4000_0000, 0xFEE0_0000, 0xFFFF_FFFF):
        pml4 = table(entry.cr3, address >> 39)
        pdpt = table(pml4, address >> 30 & 511)
        page = table(pdpt, address >> 21 & 511)
        assert pml4 & 3 == pdpt & 3 == 3
        assert page & 0x83 == 0x83
        assert (page & ~0x1F_FFFF) + (address & 0x1F_FFFF) == address


def test_descriptor_table(tmp_path: Path) -> None:
    entry, memory = boot(tmp_path, bzimage())
    table = struct.unpack("<5Q", memory.read(entry.gdt_base, 40))
    assert table[:2] == (0, 0)
    assert table[2] == 0x00AF_9B00_0000_FFFF, "64-bit code"
    assert table[3] == 0x00CF_9300_0000_FFFF, "data"
    assert table[4] == 0x0000_8B00_0000_0067, "busy TSS"


def test_relocatable_kernel_is_aligned(tmp_path: Path) -> None:
    entry, _ = boot(tmp_path, bzimage(pref_address=0x10_1000))
    assert entry.rip == 0x20_0000 + 0x200


def test_row55_setup_sects_zero_means_four(tmp_path: Path) -> None:
    entry, memory = boot(tmp_path, bzimage(setup_sects=0))
    assert memory.read(entry.rip - 0x200, len(CODE)) == CODE


def test_row55_more_setup_sectors_are_skipped(tmp_path: Path) -> None:
    entry, memory = boot(tmp_path, bzimage(setup_sects=39))
    assert memory.read(entry.rip - 0x200, len(CODE)) == CODE


def test_row55_bad_hdrs(tmp_path: Path) -> None:
    refused(tmp_path, bzimage(magic=b"HdrX"), "--kernel", "HdrS", "bzImage")


@pytest.mark.parametrize("version", [0x0200, 0x0205])
def test_row55_old_protocol(tmp_path: Path, version: int) -> None:
    refused(tmp_path, bzimage(version=version), f"2.{version & 0xFF:02}", "2.06")


@pytest.mark.parametrize(
    "change",
    [
        {"xloadflags": 0},  # a 32-bit kernel
        {"version": 0x020B},  # xloadflags is not a field of it yet
    ],
)
def test_a_kernel_without_a_64_bit_entry_starts_at_its_32_bit_one(
    tmp_path: Path, change: dict[str, int]
) -> None:
    entry, memory = boot(tmp_path, bzimage(**change))  # type: ignore[arg-type]
    assert (entry.mode, entry.rip) == (x86.PROTECTED32, 0x100_0000)
    assert (entry.rsi, entry.rbx) == (ZERO_PAGE, 0), "boot.rst, 32-bit Boot Protocol"
    assert memory.read(entry.rip, len(CODE)) == CODE
    table = struct.unpack("<5Q", memory.read(entry.gdt_base, 40))
    assert table[2:4] == (0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)


def test_fields_that_an_old_header_has_not_are_not_taken_from_the_code_behind_it(
    tmp_path: Path,
) -> None:
    kernel = bytearray(bzimage(version=0x0209, jump=0x258 - 0x202, relocatable=0))
    kernel[0x258:0x290] = b"\xff" * (0x290 - 0x258)
    entry, memory = boot(tmp_path, bytes(kernel))
    assert entry.rip == 0x10_0000
    page = memory.read(ZERO_PAGE, 4096)
    assert page[0x248:0x258] == kernel[0x248:0x258]
    assert page[0x258:0x268] == bytes(16)


@pytest.mark.parametrize("missing", range(16))
def test_the_last_paragraph_need_not_be_whole(tmp_path: Path, missing: int) -> None:
    # syssize counts paragraphs of 16 bytes, rounded up: memtest86+'s last one has 8 bytes.
    kernel = bzimage()
    entry, memory = boot(tmp_path, kernel[: len(kernel) - missing])
    assert memory.read(entry.rip - 0x200, len(CODE) - missing) == CODE[: len(CODE) - missing]
    if not missing:
        refused(tmp_path, kernel[:-16], "truncated", f"has {len(kernel) - 16} bytes")


def test_devices_are_named_by_acpi_alone_where_the_command_line_has_no_room(tmp_path: Path) -> None:
    acpi = x86.AcpiConfig(FIXED_DEVICES, virtio=(x86.VirtioMmioDevice(0xD000_0000, 512, 5),) * 8)
    entry, _ = boot(tmp_path, bzimage(), acpi=acpi)
    assert entry.cmdline.count("virtio_mmio.device=") == 8
    entry, memory = boot(tmp_path, bzimage(cmdline_size=255), acpi=acpi)
    assert entry.cmdline == "console=ttyS0"
    assert b"LNRO0005" in memory.read(0xE_0000, 0x2_0000)
    long = "x" * 256
    refused(tmp_path, bzimage(cmdline_size=255), "256 bytes", "255", acpi=acpi, cmdline=long)
    both = {"acpi": acpi, "virtio_discovery": "both"}
    refused(tmp_path, bzimage(cmdline_size=255), "255", **both)


def test_row55_init_size_larger_than_ram(tmp_path: Path) -> None:
    refused(tmp_path, bzimage(init_size=80 * MIB), "96 MiB", "64 MiB", "--memory 96M")


def test_row55_init_size_that_no_guest_can_have(tmp_path: Path) -> None:
    refused(tmp_path, bzimage(init_size=0xFFFF_FFFF), "below 4 GiB")


def test_a_kernel_that_just_fits(tmp_path: Path) -> None:
    boot(tmp_path, bzimage(init_size=48 * MIB), memory=guest_memory(64))
    refused(tmp_path, bzimage(init_size=48 * MIB + 1), "--memory 65M")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"loadflags": 0}, "zImage"),
        ({"syssize": 4096}, "truncated"),
        ({"code": b""}, "damaged"),
        ({"jump": 0x10}, "header"),
        ({"jump": 0xFF}, "header"),
        ({"alignment": 0}, "alignment"),
        ({"alignment": 3}, "alignment"),
        ({"relocatable": 0, "pref_address": 0x1000}, "1 MiB"),
        ({"pref_address": 1 << 63}, "memory"),
    ],
)
def test_row55_other_headers_that_cannot_be_booted(
    tmp_path: Path, change: dict[str, int], word: str
) -> None:
    refused(tmp_path, bzimage(**change), "--kernel", word)  # type: ignore[arg-type]


def test_row55_truncated_file(tmp_path: Path) -> None:
    whole = bzimage()
    for size in (1, 0x202, 0x206, 0x290, 2560, len(whole) - 16):
        refused(tmp_path, whole[:size], "--kernel")


# --- the initrd ----------------------------------------------------------------------------------


def initrd_of(memory: x86.GuestMemory) -> tuple[int, int]:
    return struct.unpack("<II", memory.read(ZERO_PAGE + 0x218, 8))


def test_initrd_lies_at_the_end_of_ram(tmp_path: Path) -> None:
    _, memory = boot(tmp_path, bzimage(), initrd=b"i" * 4097)
    assert initrd_of(memory) == (64 * MIB - 8192, 4097)


def test_initrd_ends_below_initrd_addr_max(tmp_path: Path) -> None:
    _, memory = boot(tmp_path, bzimage(initrd_addr_max=0x1FF_FFFF), initrd=b"i" * 4096)
    assert initrd_of(memory) == (0x1FF_F000, 4096)


def test_no_initrd_is_said_as_zero(tmp_path: Path) -> None:
    _, memory = boot(tmp_path, bzimage())
    assert initrd_of(memory) == (0, 0)


def test_initrd_goes_below_the_kernel_where_there_is_no_room_above(tmp_path: Path) -> None:
    _, memory = boot(tmp_path, bzimage(init_size=48 * MIB), initrd=b"i" * 4096)
    assert initrd_of(memory) == (16 * MIB - 4096, 4096)


def test_row56_initrd_larger_than_ram(tmp_path: Path) -> None:
    (tmp_path / "initrd").write_bytes(b"")
    with open(tmp_path / "big", "wb") as file:
        file.truncate(100 * MIB)
    with pytest.raises(ConfigError) as caught:
        (tmp_path / "kernel").write_bytes(bzimage())
        x86.load(
            guest_memory(),
            kernel=str(tmp_path / "kernel"),
            initrd=str(tmp_path / "big"),
            acpi=x86.AcpiConfig(FIXED_DEVICES),
        )
    text = str(caught.value)
    assert text.startswith("--initrd")
    assert "100 MiB" in text and "64 MiB" in text and "24 MiB" in text
    assert "--memory 125M" in text


def test_row56_the_memory_it_names_is_enough(tmp_path: Path) -> None:
    initrd = bytes(100 * MIB)
    boot(tmp_path, bzimage(), initrd=initrd, memory=guest_memory(125))
    refused(tmp_path, bzimage(), "--memory 125M", initrd=initrd, memory=guest_memory(123))


def test_row56_initrd_does_not_fit_below_initrd_addr_max(tmp_path: Path) -> None:
    kernel = bzimage(initrd_addr_max=25 * MIB - 1)
    error = refused(tmp_path, kernel, "--initrd", "25 MiB", "20 MiB", initrd=bytes(20 * MIB))
    assert "--memory" not in str(error), "more memory would not help"


def test_row56_initrd_never_overlaps_what_the_kernel_needs(tmp_path: Path) -> None:
    # 16 MiB load address + 47 MiB leave 1 MiB above the kernel and 15 MiB below it.
    kernel = bzimage(init_size=47 * MIB)
    _, memory = boot(tmp_path, kernel, initrd=bytes(1 * MIB))
    assert initrd_of(memory) == (63 * MIB, 1 * MIB)
    _, memory = boot(tmp_path, kernel, initrd=bytes(15 * MIB))
    assert initrd_of(memory) == (1 * MIB, 15 * MIB)
    refused(tmp_path, kernel, "--initrd", "16 MiB", "63 MiB", initrd=bytes(15 * MIB + 1))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.lists(
        st.tuples(st.integers(0x1F1, 0x290), st.integers(0, 255)), min_size=1, max_size=12
    ),
    size=st.integers(0, 5000),
)
def test_row55_no_mutation_raises_anything_but_config_error(
    tmp_path: Path, changes: list[tuple[int, int]], size: int
) -> None:
    kernel = bytearray(bzimage())
    for offset, value in changes:
        kernel[offset] = value
    memory = guest_memory(32)
    try:
        boot(tmp_path, bytes(kernel[: size + 500]), memory=memory, initrd=b"i")
    except ConfigError as error:
        assert str(error)
    finally:
        memory.close()
