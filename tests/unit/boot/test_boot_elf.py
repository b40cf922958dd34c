"""ELF kernels: PVH and 64-bit entry, and every file that must be refused (rows 53, 54)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from boot_images import CODE, MIB, Elf, Load, boot, guest_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.boot import x86
from pyvmm.errors import ConfigError

ELF32: dict[str, Any] = {"is_32bit": True, "elf_class": 1, "machine": 3}
ELF32 |= {"phoff": 52, "phentsize": 32}


def refused(directory: Path, kernel: Elf | bytes, *words: str, mebibytes: int = 64) -> None:
    image = kernel if isinstance(kernel, bytes) else kernel.build()
    memory = guest_memory(mebibytes)
    with pytest.raises(ConfigError) as caught:
        boot(directory, image, memory=memory)
    for word in ("--kernel", *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pvh_note_is_the_entry_in_protected_mode(tmp_path: Path) -> None:
    entry, memory = boot(tmp_path, Elf(note=0x100_0123).build())
    assert entry.mode == x86.PROTECTED32
    assert (entry.rip, entry.rbx) == (0x100_0123, 0x6000)
    assert memory.read(0x100_0000, len(CODE)) == CODE
    table = struct.unpack("<5Q", memory.read(entry.gdt_base, 40))
    assert table[2] == 0x00CF_9B00_0000_FFFF, "flat 32-bit code"


def test_a_32_bit_elf_is_entered_by_its_pvh_note(tmp_path: Path) -> None:
    data = bytes(range(256))
    loads = [Load(), Load(paddr=0x200_0000, data=data, memsz=5000)]
    entry, memory = boot(tmp_path, Elf(loads=loads, note=0x200_0010, **ELF32).build())
    assert (entry.mode, entry.rip, entry.rbx) == (x86.PROTECTED32, 0x200_0010, 0x6000)
    assert memory.read(0x100_0000, len(CODE)) == CODE
    assert memory.read(0x200_0000, 256) == data


def test_pvh_start_info(tmp_path: Path) -> None:
    _, memory = boot(
        tmp_path, Elf().build(), initrd=b"i" * 100, cmdline="a=b", memory=guest_memory(4096)
    )
    info = struct.unpack("<4I4Q2I", memory.read(0x6000, 56))
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, _ = info
    assert (magic, version, flags, modules) == (0x336EC578, 1, 0, 1)
    assert memory.read(cmdline, 4) == b"a=b\0"
    assert memory.read(rsdp, 8) == b"RSD PTR "
    start, size, _, _ = struct.unpack("<4Q", memory.read(modlist, 32))
    assert memory.read(start, size) == b"i" * 100
    ranges = [struct.unpack("<QQII", memory.read(memmap + 24 * n, 24))[:3] for n in range(entries)]
    assert ranges[0] == (0, 0x9FC00, 1)
    assert ranges[-1] == (1 << 32, 1 << 30, 1)


def test_pvh_without_initrd_has_no_module(tmp_path: Path) -> None:
    _, memory = boot(tmp_path, Elf().build())
    assert struct.unpack("<4IQ", memory.read(0x6000, 24))[3:] == (0, 0)


def test_without_a_note_it_starts_in_long_mode_with_boot_params(tmp_path: Path) -> None:
    entry, memory = boot(tmp_path, Elf(note=None).build(), cmdline="a=b")
    assert entry.mode == x86.LONG64
    assert (entry.rip, entry.rsi) == (0x100_0000, 0x7000)
    page = memory.read(0x7000, 4096)
    assert page[0x1FE:0x200] == b"\x55\xaa" and page[0x202:0x206] == b"HdrS"
    (cmdline,) = struct.unpack_from("<I", page, 0x228)
    assert memory.read(cmdline, 4) == b"a=b\0"
    assert page[0x1E8] == 5


def test_memory_past_filesz_is_zero_and_kept_free_of_the_initrd(tmp_path: Path) -> None:
    kernel = Elf(loads=[Load(memsz=47 * MIB)])
    _, memory = boot(tmp_path, kernel.build(), initrd=bytes([7]) * MIB)
    assert memory.read(0x100_0000 + len(CODE), 4096) == bytes(4096)
    start, size = struct.unpack("<2Q", memory.read(0x6040, 16))
    assert (start, size) == (63 * MIB, MIB)


def test_many_segments_in_any_order(tmp_path: Path) -> None:
    loads = [Load(0x300_0000, b"third"), Load(0x100_0000, CODE), Load(0x200_0000, b"second")]
    _, memory = boot(tmp_path, Elf(loads=loads).build())
    assert memory.read(0x300_0000, 5) == b"third"
    assert memory.read(0x200_0000, 6) == b"second"


def test_row53_empty(tmp_path: Path) -> None:
    refused(tmp_path, b"", "empty")


@pytest.mark.parametrize("size", [4, 16, 63])
def test_row53_truncated_header(tmp_path: Path, size: int) -> None:
    refused(tmp_path, Elf().build()[:size], "truncated")


def test_row53_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    whole = Elf().build()
    for size in range(64, len(whole), 37):
        refused(tmp_path, whole[:size])


@pytest.mark.parametrize(
    ("kernel", "word"),
    [
        (Elf(elf_class=1), "is an ELF for 64-bit x86"),
        (Elf(elf_class=3), "unknown class"),
        (Elf(machine=3), "is an ELF for 32-bit x86"),
        (Elf(**ELF32, note=None), "32-bit ELF without a PVH note"),
        (Elf(**{**ELF32, "phentsize": 56}), "56 bytes each, not 32"),
        (Elf(**{**ELF32, "phoff": 1 << 30}), "past its end"),
        (Elf(data=2), "big-endian"),
        (Elf(machine=183), "for arm64; use --arch arm64 with the Image"),
        (Elf(machine=9999), "9999"),
        (Elf(kind=1), "object"),
        (Elf(phoff=1 << 62), "past its end"),
        (Elf(phoff=(1 << 64) - 1), "past its end"),
        (Elf(phnum=0xFFFF), "program headers"),
        (Elf(phnum=0), "no segment"),
        (Elf(phnum=40), "past its end"),
        (Elf(phnum=128), "past its end"),
        (Elf(phentsize=32), "32 bytes"),
        (Elf(phentsize=0), "0 bytes"),
    ],
)
def test_row53_headers(tmp_path: Path, kernel: Elf, word: str) -> None:
    if kernel.phnum in (40, 128):
        kernel.loads[0].data = b"short"
    refused(tmp_path, kernel, word)


@pytest.mark.parametrize(
    ("load", "word"),
    [
        (Load(memsz=100), "100 in memory"),
        (Load(filesz=1 << 40, memsz=1 << 40), "past the end"),
        (Load(offset=1 << 63), "past the end"),
        (Load(offset=(1 << 64) - 1, filesz=1), "past the end"),
        (Load(filesz=0, memsz=0), "no segment"),
    ],
)
def test_row53_segments_against_the_file(tmp_path: Path, load: Load, word: str) -> None:
    refused(tmp_path, Elf(loads=[load]), word)


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (Load(paddr=0x7000), ("boot data",)),
        (Load(paddr=0xF_FFFF), ("boot data",)),
        (Load(paddr=0), ("boot data",)),
        (Load(paddr=64 * MIB), ("65 MiB", "64 MiB", "--memory 65M")),
        (Load(memsz=60 * MIB), ("76 MiB", "--memory 76M")),
        (Load(paddr=0xC000_0000), ("below 4 GiB",)),
        (Load(paddr=1 << 40), ("below 4 GiB",)),
        (Load(paddr=(1 << 64) - 100), ("wraps",)),
        (Load(memsz=(1 << 64) - 1), ("wraps",)),
    ],
)
def test_row54_segments_against_memory(tmp_path: Path, load: Load, words: tuple[str, ...]) -> None:
    refused(tmp_path, Elf(loads=[Load(0x10_0000), load], entry=0x10_0000, note=None), *words)


def test_row54_a_segment_in_the_hole_of_a_large_guest(tmp_path: Path) -> None:
    refused(
        tmp_path, Elf(loads=[Load(), Load(paddr=0xC000_0000)]), "below 4 GiB", mebibytes=5 * 1024
    )


def test_row54_overlapping_segments(tmp_path: Path) -> None:
    refused(tmp_path, Elf(loads=[Load(), Load(paddr=0x100_0000 + 100)]), "overlap")
    refused(tmp_path, Elf(loads=[Load(memsz=MIB), Load(paddr=0x108_0000)]), "overlap")


@pytest.mark.parametrize("note", [0, 0x7000, 0x100_0000 + len(CODE), 0xFFFF_FFFF])
def test_entry_outside_what_was_loaded(tmp_path: Path, note: int) -> None:
    refused(tmp_path, Elf(note=note), "entry")
    refused(tmp_path, Elf(note=None, entry=note), "entry")


def test_a_damaged_note_is_said_and_not_skipped(tmp_path: Path) -> None:
    good = Elf().build()
    cut = good.replace(struct.pack("<III", 4, 4, 18), struct.pack("<III", 4, 400, 18))
    refused(tmp_path, cut, "note")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.lists(
        st.tuples(st.integers(4, 64 + 3 * 56 + 40), st.integers(0, 255)), min_size=1, max_size=8
    ),
    size=st.integers(0, 5000),
    note=st.booleans(),
)
def test_row53_row54_no_mutation_raises_anything_but_config_error(
    tmp_path: Path, changes: list[tuple[int, int]], size: int, note: bool
) -> None:
    loads = [Load(data=b"short"), Load(0x200_0000)]
    kernel = bytearray(Elf(loads=loads, note=0x200_0000 if note else None).build())
    for offset, value in changes:
        kernel[offset] = value
    memory = guest_memory(48)
    try:
        boot(tmp_path, bytes(kernel[: size + 64]), memory=memory, initrd=b"i")
    except ConfigError as error:
        assert str(error)
    finally:
        memory.close()
