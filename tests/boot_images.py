"""Writers of small kernels for the boot tests: from the specifications, not the code under test."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

from pyvmm.boot import x86
from pyvmm.machine.board.x86.layout import FIXED_DEVICES
from pyvmm.memory import GuestMemory

MIB = 1 << 20
CODE = bytes(range(256)) * 8  # 2 KiB that can be recognised in guest memory


def bzimage(
    *,
    code: bytes = CODE,
    setup_sects: int = 4,
    magic: bytes = b"HdrS",
    version: int = 0x020F,
    loadflags: int = 1,
    xloadflags: int = 1,
    syssize: int | None = None,
    alignment: int = 0x20_0000,
    relocatable: int = 1,
    pref_address: int = 0x100_0000,
    init_size: int = 0x80_0000,
    initrd_addr_max: int = 0x7FFF_FFFF,
    cmdline_size: int = 2047,
    jump: int = 0x6A,
    payload: tuple[int, int] = (0, 0),
    banner: bytes = b"6.1.0-test (someone@example) #1",
) -> bytes:
    """A bzImage by boot.rst; `setup_sects` is what the header says, 0 stands for 4 there."""
    sectors = setup_sects or 4
    image = bytearray((sectors + 1) * 512)
    struct.pack_into("<BHI", image, 0x1F1, setup_sects, 1, (syssize or -(-len(code) // 16)))
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x200:0x202] = bytes([0xEB, jump])
    image[0x202:0x206] = magic
    struct.pack_into("<H", image, 0x206, version)
    struct.pack_into("<H", image, 0x20E, 0x400)
    image[0x600 : 0x600 + len(banner)] = banner
    image[0x211] = loadflags
    struct.pack_into("<I", image, 0x22C, initrd_addr_max)
    struct.pack_into("<IBBH", image, 0x230, alignment, relocatable, 21, xloadflags)
    struct.pack_into("<I", image, 0x238, cmdline_size)
    struct.pack_into("<II", image, 0x248, *payload)
    struct.pack_into("<QI", image, 0x258, pref_address, init_size)
    return bytes(image) + code.ljust(-(-len(code) // 16) * 16, b"\0")


@dataclass
class Load:
    """A PT_LOAD program header; sizes follow `data` where they are not given."""

    paddr: int = 0x100_0000
    data: bytes = CODE
    offset: int | None = None
    filesz: int | None = None
    memsz: int | None = None
    kind: int = 1


@dataclass
class Elf:
    """An ELF kernel by the System V ABI; `note` is the value of the PVH note, or None. It is laid
    out as ELF32 if it `is_32bit`; class and machine say what they are told."""

    loads: list[Load] = field(default_factory=lambda: [Load()])
    note: int | None = 0x100_0040
    entry: int = 0x100_0000
    elf_class: int = 2
    data: int = 1
    kind: int = 2
    machine: int = 62
    phoff: int = 64
    phentsize: int = 56
    phnum: int | None = None
    is_32bit: bool = False

    def build(self) -> bytes:
        headers = list(self.loads)
        if self.note is not None:
            other = struct.pack("<III4sI", 4, 4, 6, b"Xen\0", 0)  # one that is not looked for
            value = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", self.note)
            headers.append(Load(paddr=0, data=other + value, kind=4))
        body = b""
        head, row = (52, 32) if self.is_32bit else (64, 56)
        start = head + row * len(headers)
        table = b""
        for load in headers:
            size = len(load.data)
            offset = start + len(body) if load.offset is None else load.offset
            filesz = size if load.filesz is None else load.filesz
            memsz = filesz if load.memsz is None else load.memsz
            places = (offset, load.paddr, load.paddr, filesz, memsz)
            if self.is_32bit:
                table += struct.pack("<8I", load.kind, *places, 5, 4)
            else:
                table += struct.pack("<IIQQQQQQ", load.kind, 5, *places, 4)
            body += load.data
        ident = b"\x7fELF" + bytes([self.elf_class, self.data, 1]) + bytes(9)
        header = ident + struct.pack(
            "<HHIIIIIHHHHHH" if self.is_32bit else "<HHIQQQIHHHHHH",
            self.kind,
            self.machine,
            1,
            self.entry,
            self.phoff,
            0,
            0,
            head,
            self.phentsize,
            len(headers) if self.phnum is None else self.phnum,
            0,
            0,
            0,
        )
        return header + table + body


def arm64_image(
    body: bytes = b"body",
    *,
    text_offset: int = 0,
    size: int = 4 * MIB,
    flags: int = 0xA,
    magic: bytes = b"ARM\x64",
) -> bytes:
    """An Image by Documentation/arch/arm64/booting.rst."""
    head = struct.pack("<2I3Q24x4sI", 0x1400_0010, 0, text_offset, size, flags, magic, 0)
    assert len(head) == 64
    return head + body


def zboot(
    payload: bytes, method: bytes = b"gzip", offset: int = 64, size: int | None = None
) -> bytes:
    """An EFI program that unpacks the kernel `payload`, as drivers/firmware/efi/libstub makes."""
    said = len(payload) if size is None else size
    head = struct.pack("<2s2x4s2I8x32s", b"MZ", b"zimg", offset, said, method)
    return head.ljust(64, b"\0") + payload


def module(
    depends: str = "", softdep: str = "", release: str = "6.9.1-mine", features: str = "SMP"
) -> bytes:
    """A module for the kernel `release`: an ELF object with the section .modinfo."""
    texts = [f"vermagic={release} {features}", f"depends={depends}", "license=GPL"]
    texts += [f"softdep={softdep}"] if softdep else []
    return elf_object({".modinfo": b"".join(text.encode() + b"\0" for text in texts)})


def elf_object(content: dict[str, bytes], alignment: int = 1) -> bytes:
    """One with these sections, in their order."""
    names = b"\0" + b"".join(f"{name}\0".encode() for name in (*content, ".shstrtab"))
    data, headers = b"", bytes(64)
    for name, text in {**content, ".shstrtab": names}.items():
        data += bytes(-len(data) % alignment)
        where = (names.index(f"\0{name}\0".encode()) + 1, 3 if name == ".shstrtab" else 1, 0, 0)
        headers += struct.pack("<IIQQQQIIQQ", *where, 64 + len(data), len(text), 0, 0, alignment, 0)
        data += text
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    count = len(headers) // 64
    header += struct.pack(
        "<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64 + len(data), 0, 64, 0, 0, 64, count, count - 1
    )
    return header + data + headers


def guest_memory(mebibytes: int = 64) -> GuestMemory:
    return GuestMemory(x86.ram_ranges(mebibytes * MIB))


def boot(
    directory: Path,
    kernel: bytes,
    *,
    initrd: bytes | None = None,
    cmdline: str = "console=ttyS0",
    memory: GuestMemory | None = None,
    acpi: x86.AcpiConfig | None = None,
    virtio_discovery: str = "auto",
) -> tuple[x86.Entry, GuestMemory]:
    """Write the files and load them; the entry and the memory."""
    path = directory / "kernel"
    path.write_bytes(kernel)
    ramdisk = None
    if initrd is not None:
        ramdisk = directory / "initrd"
        ramdisk.write_bytes(initrd)
    memory = memory or guest_memory()
    entry = x86.load(
        memory,
        kernel=str(path),
        initrd=str(ramdisk) if ramdisk else None,
        cmdline=cmdline,
        acpi=acpi or x86.AcpiConfig(FIXED_DEVICES),
        virtio_discovery=virtio_discovery,
    )
    return entry, memory
