"""ELF kernels (vmlinux): entered by their PVH note, or in long mode where they have none.

pyelftools knows the layout of the structures; what may stand in them is checked here, before any of
it is used. A 32-bit ELF can be entered by its PVH note only. Source: System V ABI, "ELF Header" and
"Program Header"; Xen public/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pyvmm.boot.file_kinds import ELF_MACHINES, EM_386, EM_AARCH64, EM_X86_64
from pyvmm.boot.image_file import ImageFile
from pyvmm.boot.x86 import layout
from pyvmm.boot.x86.placement import check_kernel_fits
from pyvmm.errors import how_many
from pyvmm.memory import GuestMemory

_CLASS_32, _CLASS_64 = 1, 2
_EHDR_SIZE = {_CLASS_32: 52, _CLASS_64: 64}
_PHDR_SIZE = {_CLASS_32: 32, _CLASS_64: 56}
MAX_SEGMENTS = 128
MAX_NOTES_SIZE = 1 << 20
PN_XNUM = 0xFFFF  # the real number would stand in a section header
_MACHINE_OF = {_CLASS_32: EM_386, _CLASS_64: EM_X86_64}
ET_EXEC, ET_DYN = 2, 3
PT_LOAD, PT_NOTE = 1, 4
XEN_ELFNOTE_PHYS32_ENTRY = 18

_CLASS, _DATA = 4, 5
_TRUNCATED = "it is truncated: copy or build it again"


@dataclass(frozen=True)
class Segment:
    """A PT_LOAD segment: `filesz` bytes at `offset` of the file go to `paddr`, `memsz` in all."""

    offset: int
    paddr: int
    filesz: int
    memsz: int

    @property
    def end(self) -> int:
        return self.paddr + self.memsz


@dataclass(frozen=True)
class ElfKernel:
    """A checked ELF kernel. `pvh_entry` is None where it has no PVH note."""

    entry: int
    pvh_entry: int | None
    segments: tuple[Segment, ...]  # ascending and disjoint

    @property
    def start(self) -> int:
        return self.segments[0].paddr

    @property
    def end(self) -> int:
        return self.segments[-1].end


def parse(kernel: ImageFile) -> ElfKernel:
    """Check headers, segments and notes of `kernel`. Raises ConfigError, and reads no segment."""
    elf_class = _check_ident(kernel)
    header, rows = _read_headers(kernel, elf_class)
    segments = [_checked_segment(kernel, row) for row in rows if row["p_type"] == PT_LOAD]
    segments = sorted((s for s in segments if s.memsz), key=lambda segment: segment.paddr)
    if not segments:
        raise kernel.error(f"{kernel.path} has no segment to load: it is not a kernel")
    for before, after in pairwise(segments):
        if before.end > after.paddr:
            raise kernel.error(
                f"{kernel.path}: the segments at {before.paddr:#x} and {after.paddr:#x} overlap"
            )
    pvh_entry = None
    for row in rows:
        if row["p_type"] == PT_NOTE and pvh_entry is None:
            pvh_entry = _find_pvh_entry(kernel, row)
    if pvh_entry is None and elf_class == _CLASS_32:
        raise kernel.error(
            f"{kernel.path} is a 32-bit ELF without a PVH note",
            "use one with CONFIG_PVH, a bzImage, or a 64-bit x86 kernel",
        )
    entry = header["e_entry"]
    start = entry if pvh_entry is None else pvh_entry
    if not any(s.paddr <= start < s.paddr + s.filesz for s in segments):
        raise kernel.error(
            f"{kernel.path}: its entry {start:#x} lies in no loaded segment",
            "use a vmlinux with CONFIG_PVH, or a bzImage",
        )
    return ElfKernel(entry, pvh_entry, tuple(segments))


def load(memory: GuestMemory, kernel: ImageFile, image: ElfKernel) -> None:
    """Read all segments to their physical addresses. Raises ConfigError if one is outside RAM."""
    check_kernel_fits(memory, kernel, image.end)
    for segment in image.segments:
        # Fresh guest RAM is zero, so what is past filesz needs no clearing.
        kernel.read_into(memory.view(segment.paddr, segment.filesz), segment.offset)


def _check_ident(kernel: ImageFile) -> int:
    """The ELF's class."""
    head = kernel.read(0, _EHDR_SIZE[_CLASS_64])
    if len(head) < _EHDR_SIZE[_CLASS_64]:  # as no 32-bit kernel is shorter than this either
        raise kernel.error(
            f"{kernel.path} has {how_many(len(head), 'byte')}, too few for an ELF header",
            _TRUNCATED,
        )
    if head[_CLASS] not in _EHDR_SIZE:
        raise kernel.error(f"{kernel.path} is an ELF of an unknown class, {head[_CLASS]}")
    if head[_DATA] != 1:
        raise kernel.error(f"{kernel.path} is a big-endian ELF", "use a 64-bit x86 kernel")
    return head[_CLASS]


def _read_headers(kernel: ImageFile, elf_class: int) -> tuple[Any, list[Any]]:
    """The ELF header and all program headers, as pyelftools reads them."""
    # elftools.elf.elffile would pull in its DWARF reader, which no kernel needs to be started.
    from elftools.common.utils import struct_parse
    from elftools.elf.structs import ELFStructs

    structs = ELFStructs(little_endian=True, elfclass=32 * elf_class)
    structs.create_basic_structs()
    try:
        structs.create_advanced_structs()
        head = kernel.read(0, _EHDR_SIZE[elf_class])
        header = struct_parse(structs.Elf_Ehdr, io.BytesIO(head))
        values = dict(header)
        machine, kind = _number(header, kernel, 18), _number(header, kernel, 16)
    except Exception as error:  # whatever it raises, the file is at fault
        raise kernel.error(f"{kernel.path} is not a readable ELF file: {error}") from None
    _check_header(kernel, values, machine, kind, elf_class)
    size = _PHDR_SIZE[elf_class]
    table = kernel.read(values["e_phoff"], values["e_phnum"] * size)
    try:
        stream = io.BytesIO(table)
        rows = [dict(struct_parse(structs.Elf_Phdr, stream)) for _ in range(values["e_phnum"])]
    except Exception as error:
        raise kernel.error(f"{kernel.path} has unreadable program headers: {error}") from None
    for index, row in enumerate(rows):
        row["p_type"] = int.from_bytes(table[index * size :][:4], "little")
    return values, rows


def _number(_header: Any, kernel: ImageFile, offset: int) -> int:
    return int.from_bytes(kernel.read(offset, 2), "little")


def _check_header(
    kernel: ImageFile, header: dict[str, Any], machine: int, kind: int, elf_class: int
) -> None:
    if machine != _MACHINE_OF[elf_class]:
        what = ELF_MACHINES.get(machine, f"machine {machine}")
        arm64 = "--arch arm64 with the Image that is built beside it, or "
        cure = f"use {arm64 if machine == EM_AARCH64 else ''}a 64-bit x86 kernel"
        raise kernel.error(f"{kernel.path} is an ELF for {what}", cure)
    if kind not in (ET_EXEC, ET_DYN):
        raise kernel.error(f"{kernel.path} is an ELF object file, not a linked kernel")
    number, offset = header["e_phnum"], header["e_phoff"]
    if number == PN_XNUM or number > MAX_SEGMENTS:
        raise kernel.error(f"{kernel.path} has {number} program headers: it is not a kernel")
    size = _PHDR_SIZE[elf_class]
    if number and header["e_phentsize"] != size:
        said = header["e_phentsize"]
        raise kernel.error(f"{kernel.path}: its program headers have {said} bytes each, not {size}")
    if offset + number * size > kernel.size:
        raise kernel.error(
            f"{kernel.path}: its program headers at {offset:#x} lie past its end", _TRUNCATED
        )


def _checked_segment(kernel: ImageFile, row: dict[str, Any]) -> Segment:
    segment = Segment(row["p_offset"], row["p_paddr"], row["p_filesz"], row["p_memsz"])
    where = f"{kernel.path}: its segment for {segment.paddr:#x}"
    if segment.memsz < segment.filesz:
        raise kernel.error(
            f"{where} has {segment.filesz} bytes in the file for {segment.memsz} in memory"
        )
    if segment.offset + segment.filesz > kernel.size:
        raise kernel.error(f"{where} goes past the end of the file", _TRUNCATED)
    if segment.end > 1 << 64:
        raise kernel.error(f"{where} wraps around the end of the address space")
    if segment.memsz and segment.paddr < layout.HIGH_RAM:
        raise kernel.error(
            f"{where} lies over the boot data below 1 MiB", "link it at 1 MiB or above"
        )
    return segment


def _find_pvh_entry(kernel: ImageFile, row: dict[str, Any]) -> int | None:
    """The 32-bit physical entry in the notes of a PT_NOTE segment, or None."""
    offset, size = row["p_offset"], row["p_filesz"]
    if offset + size > kernel.size or size > MAX_NOTES_SIZE:
        raise kernel.error(f"{kernel.path}: its notes go past the end of the file", _TRUNCATED)
    notes = kernel.read(offset, size)
    alignment = 8 if row["p_align"] == 8 else 4
    position = 0
    while position + 12 <= len(notes):
        name_size, desc_size, kind = (
            int.from_bytes(notes[position + 4 * field :][:4], "little") for field in range(3)
        )
        desc = _align(position + 12 + name_size, alignment)
        end = _align(desc + desc_size, alignment)
        name = notes[position + 12 : position + 12 + min(name_size, 4)]
        if kind == XEN_ELFNOTE_PHYS32_ENTRY and name == b"Xen\0" and name_size == 4:
            value = notes[desc : desc + desc_size]
            if desc_size not in (4, 8) or len(value) != desc_size:
                raise kernel.error(f"{kernel.path}: its PVH note is damaged")
            return int.from_bytes(value, "little")
        position = end
    return None


def _align(value: int, alignment: int) -> int:
    return (value + alignment - 1) & -alignment
