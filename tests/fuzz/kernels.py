"""Kernel files under the fuzzer: bzImage, ELF, arm64's Image and its wrappings, initrds, modules.

Files are made by the writers of the boot tests (tests/boot_images.py) and one of modules here. Some
of the numbers that matter in them become other ones, mostly at the edge of what they may be, one
after the other, as the edges of one depend on others (tests/fuzz/kernel_models.py). A case raises
AssertionError, with what was changed, if

- a file is taken that the model refuses, or refused that it takes,
- memory, what is told to the kernel, or where it starts is another one than the model's,
- anything but an error of one line is raised,
- what is unpacked is more than its header says, or not what the libraries make of it,
- a module without what is for debuggers has another section than it had,
- a descriptor or a file is left.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any
from unittest import mock

import boot_images
import zstandard
from fuzz import kernel_models as model
from fuzz.damage import Number, fields, harm, wrong
from fuzz.kernel_models import Edge, Loaded, Refused, u
from fuzz.room import check_closed, open_files, room, told

from pyvmm.boot import x86
from pyvmm.boot.arm64 import image as arm64
from pyvmm.boot.image_file import ImageFile
from pyvmm.boot.x86 import payload, release
from pyvmm.errors import ConfigError
from pyvmm.images import module_file, modules
from pyvmm.machine.board.x86.layout import FIXED_DEVICES
from pyvmm.memory import GuestMemory
from pyvmm.testing.mmio_driver import Ring

MIB = 1 << 20
SIZE = MIB + (192 << 10)  # of the guest's memory
_HIGH = MIB  # where kernels begin
_ZEROS = bytes(SIZE)


_room = functools.cache(room)


@functools.cache
def _memory() -> GuestMemory:
    return GuestMemory([(0, SIZE)])


def _one_line(error: ConfigError) -> None:
    assert "\n" not in str(error) and len(str(error)) < 1500, error


def _push(rng: Random, data: bytearray, edges: Sequence[Edge], note: list[str]) -> None:
    """Put one of the numbers at an edge, or somewhere else."""
    names = sorted({one.number.name for one in edges})
    name = rng.choice(names)
    number, values = rng.choice([one for one in edges if one.number.name == name])
    at, size = number.at, number.size
    if at + size > len(data):
        return
    value = u(data, at, size)
    values = tuple(one for one in values if one != value)
    new = rng.choice(values) if values and rng.random() < 0.8 else wrong(rng, value, size)
    data[at : at + size] = new.to_bytes(size, "little")
    note.append(f"{name} {value:#x} is {new:#x}")


# --- x86 ------------------------------------------------------------------------------------------


def _bzimage(rng: Random) -> bytes:
    code = rng.randbytes(rng.choice((600, 2048, 5000)))
    made = boot_images.bzimage(
        code=code,
        setup_sects=rng.choice((4, 4, 0, 10)),
        alignment=0x1000,
        pref_address=_HIGH + 0x1000 * rng.randrange(16),
        init_size=rng.choice((0, 0x10000)),
        xloadflags=rng.randrange(2),
        version=rng.choice((0x020F, 0x020C, 0x020A, 0x0206)),
        relocatable=rng.randrange(2),
    )
    return made[: len(made) - rng.choice((0, 0, 1, 15, 16))]


def _elf(rng: Random) -> bytes:
    is_32bit = rng.random() < 0.3
    loads, at = [], _HIGH + 0x1000 * rng.randrange(8)
    entry = at
    for _ in range(rng.choice((1, 1, 2, 3))):
        part = rng.randbytes(rng.choice((16, 500, 2000)))
        memsz = len(part) + rng.choice((0, 0, 5000))
        loads.append(boot_images.Load(at, part, memsz=memsz))
        at += memsz + rng.choice((0, 0, 4096))
    if rng.random() < 0.03:  # many that are not loaded
        loads += [boot_images.Load(0, b"", kind=6)] * (rng.choice((127, 128, 129)) - len(loads))
    rng.shuffle(loads)
    note = entry if is_32bit or rng.random() < 0.6 else None
    made = boot_images.Elf(loads, note, entry, is_32bit=is_32bit)
    if is_32bit:
        made.elf_class, made.machine, made.phoff, made.phentsize = 1, 3, 52, 32
    built = made.build()
    if rng.random() < 0.004:
        built += bytes(MIB)
    return built


def _x86(rng: Random, note: list[str]) -> None:
    is_elf = rng.random() < 0.5
    data = bytearray(_elf(rng) if is_elf else _bzimage(rng))
    cmdline = rng.choice(("", "console=ttyS0", "console=ttyS0", "x" * rng.choice((2047, 2048))))
    ramdisk = _ramdisk(rng, bytes(data), note) if rng.random() < 0.5 else None

    def edges() -> list[Edge]:
        if is_elf:
            return model.elf_edges(data, SIZE)
        return model.bzimage_edges(data, SIZE, len(cmdline), len(ramdisk or b""))

    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 4))):
        _push(rng, data, edges(), note)
    if rng.random() < 0.1:
        harm(rng, data, [], note)
    try:
        wanted = model.load(bytes(data), SIZE, ramdisk, cmdline) if data else None
    except Refused:
        wanted = None
    path, initrd = _room() / "kernel", _room() / "initrd"
    path.write_bytes(data)
    if ramdisk is not None:
        initrd.write_bytes(ramdisk)
    memory = _memory()
    try:
        entry = x86.load(
            memory,
            kernel=str(path),
            initrd=None if ramdisk is None else str(initrd),
            cmdline=cmdline,
            acpi=x86.AcpiConfig(FIXED_DEVICES),
        )
    except ConfigError as error:
        _one_line(error)
        assert wanted is None, error
    else:
        assert wanted is not None, "it is to be refused"
        _check_memory(entry, *wanted, ramdisk, cmdline)
    finally:
        memory.regions[0].view[:] = _ZEROS
    with suppress(ConfigError):
        release.release_of(str(path))
    with suppress(ConfigError):
        release.config_of(str(path))


def _check_memory(
    entry: x86.Entry, loaded: Loaded, at: int, ramdisk: bytes | None, cmdline: str
) -> None:
    found = bytes(_memory().regions[0].view)
    expected = bytearray(SIZE - _HIGH)
    parts = [*loaded.parts, (at, ramdisk)] if ramdisk else loaded.parts
    for start, content in parts:
        assert _HIGH <= start <= SIZE - len(content) or not content
        expected[start - _HIGH : start - _HIGH + len(content)] = content
    assert found[_HIGH:] == expected, "memory is another one"
    assert entry.rip == loaded.rip and (entry.cr3 != 0) == loaded.is_long, entry
    text = cmdline.encode() + b"\0"
    assert found[0x20000:0x30000] == text.ljust(0x10000, b"\0"), "the command line"
    size = len(ramdisk or b"")
    rsdp = 0xE0000 + found[0xE0000:_HIGH].index(b"RSD PTR ")
    ranges = [
        *((0, 0x9FC00, 1), (0x9FC00, 0x400, 2), (0xDF000, 0x1000, 2), (0xE0000, 0x20000, 3)),
        (_HIGH, SIZE - _HIGH, 1),
    ]
    page, start_info = bytearray(4096), bytearray(4096)
    if loaded.header is None:
        modules = (1, 0x6040) if size else (0, 0)
        values = (0x336EC578, 1, 0, *modules, 0x20000, rsdp, 0x6080, len(ranges), 0)
        struct.pack_into("<4I4Q2I", start_info, 0, *values)
        struct.pack_into("<4Q", start_info, 0x40, at if size else 0, size, 0, 0)
        for index, (first, length, kind) in enumerate(ranges):
            struct.pack_into("<2Q2I", start_info, 0x80 + 24 * index, first, length, kind, 0)
        assert entry.rbx == 0x6000
    else:
        page[0x1F1 : 0x1F1 + len(loaded.header)] = loaded.header
        page[0x210] = 0xFF
        page[0x211] |= 1
        struct.pack_into("<I", page, 0x214, loaded.code32 & 0xFFFFFFFF)
        struct.pack_into("<2I", page, 0x218, at if size else 0, size)
        struct.pack_into("<I", page, 0x228, 0x20000)
        struct.pack_into("<Q", page, 0x70, rsdp)
        struct.pack_into("<3I", page, 0xC0, 0, 0, 0)
        page[0x1E8] = len(ranges)
        for index, row in enumerate(ranges):
            struct.pack_into("<QQI", page, 0x2D0 + 20 * index, *row)
        assert entry.rsi == 0x7000
    assert found[0x6000:0x7000] == start_info, "what is told by PVH"
    assert found[0x7000:0x8000] == page, "the zero page"


# --- an initrd ------------------------------------------------------------------------------------


def _ramdisk(rng: Random, kernel: bytes, note: list[str]) -> bytes:
    """One that is as it should be, or of a size that just has room, or is damaged."""
    text, numbers = _cpio(rng)
    made = bytearray(text)
    kind = rng.random()
    if kind < 0.4:
        with suppress(Refused):
            loaded, _ = model.load(kernel, SIZE, None, "")
            above = (min(loaded.initrd_max + 1, SIZE) - loaded.end) // 4096 * 4096
            below = (loaded.start - MIB) // 4096 * 4096
            size = rng.choice((above, below)) + rng.choice((-1, 0, 1, 4096, -4096))
            made = made.ljust(min(size, SIZE), b"\0")
    elif kind < 0.7:
        for number in rng.sample(numbers, rng.choice((1, 1, 2))):
            value = int(made[number.at : number.at + 8], 16)
            rest = len(made) - number.at
            others = (value - 1, value + 1, value + 4, rest, 0, 0xFFFFFFFF, 10, 11)
            new = max(0, rng.choice(others))
            made[number.at : number.at + 8] = b"%08X" % new
            note.append(f"{number.name} {value} is {new}")
    elif kind < 0.85:
        harm(rng, made, [*numbers, Number("magic", 0, 6)], note)
    elif kind < 0.9:
        made = bytearray(rng.choice((b"", b"\x7fELF", b"\x1f\x8b", bytes(0x202) + b"HdrS")))
    note.append(f"an initrd of {len(made)} bytes, {bytes(made[:200])!r}")
    return bytes(made)


def _cpio(rng: Random) -> tuple[bytes, list[Number]]:
    text = b""
    numbers = []
    for name in (b"init", b"dir/file", b"TRAILER!!!"):
        content = rng.randbytes(rng.randrange(50)) if name[:1] != b"T" else b""
        values = [1, 0o100755, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        head = rng.choice((b"070701", b"070702")) + b"".join(b"%08X" % one for one in values)
        numbers += [Number("namesize", len(text) + 94, 8), Number("filesize", len(text) + 54, 8)]
        text += head + name + b"\0"
        text += bytes(-len(text) % 4)
        text += content + bytes(-len(content) % 4)
    return text, numbers


# --- payloads -------------------------------------------------------------------------------------

_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": functools.partial(gzip.compress, compresslevel=1),
    "bzip2": functools.partial(bz2.compress, compresslevel=1),
    "xz": functools.partial(lzma.compress, preset=0),
    "lzma": functools.partial(lzma.compress, format=lzma.FORMAT_ALONE, preset=0),
    "zstd": zstandard.ZstdCompressor(level=1, write_checksum=True).compress,
    "zstd, no sum": zstandard.ZstdCompressor(level=1).compress,
    "zstd, no size": zstandard.ZstdCompressor(level=1, write_content_size=False).compress,
    "none": bytes,
}


def _payload(rng: Random, note: list[str]) -> None:
    """The ELF in a bzImage, by each of the libraries' methods."""
    inside = boot_images.Elf().build() + rng.choice((b"", bytes(200_000), rng.randbytes(3000)))
    if rng.random() < 0.01:
        inside = inside.ljust(MIB + rng.randrange(2), b"x")
    config = b"CONFIG_PCI=y\n# CONFIG_X is not set\n" * rng.randrange(30)
    if rng.random() < 0.3:
        inside += b"IKCFG_ST" + gzip.compress(config) + b"IKCFG_ED"
    if rng.random() < 0.03:
        inside = rng.choice((b"", b"x", b"\x7fEL", b"no kernel at all"))
    name = rng.choice(list(_PACKERS))
    packed = bytearray(_PACKERS[name](inside))
    if is_bad := rng.random() < 0.4:
        harm(rng, packed, fields("a:4 b:4 c:4 d:4 e:4"), note)
    if rng.random() < 0.2:
        packed = packed[: len(packed) - rng.randrange(1, 10)]
        is_bad = True
    size = len(inside)
    if rng.random() < 0.3:
        size = rng.choice((size - 1, size + 1, 0, 1 << 30, (1 << 30) + 1, 0xFFFFFFFF)) % (1 << 32)
        is_bad = True
        note.append(f"size {size}")
    if name == "gzip" and is_bad and rng.random() < 0.5:
        packed[-4:] = struct.pack("<I", size)
    trailer = b"" if name in ("gzip", "none") else struct.pack("<I", size)
    whole = bytes(packed) + trailer
    data = bytearray(boot_images.bzimage(code=whole.ljust(600, b"\0"), payload=(0, len(whole))))
    if rng.random() < 0.25:
        is_bad = True
        code = u(data, 0x1F4, 4) * 16
        edges = [
            model.edge("payload_offset", 0x248, 4, 0, 1, *(code - len(whole) + n for n in (0, 1))),
            model.edge("payload_length", 0x24C, 4, 0, 1, 3, 4, code, code + 1, len(whole) - 1),
            *model.bzimage_edges(data, SIZE, 0, 0)[:3],
        ]
        _push(rng, data, edges, note)
    path, output = _room() / "kernel", _room() / "vmlinux"
    path.write_bytes(data)
    note.append(name)
    try:
        wanted = model.payload(bytes(data))
    except Refused:
        wanted = b""
    try:
        payload.unpack_vmlinux(str(path), str(output))
    except ConfigError as error:
        _one_line(error)
        assert wanted[:4] != b"\x7fELF", error
        assert not output.exists()
    else:
        found = output.read_bytes()
        output.unlink()
        assert found == wanted and found[:4] == b"\x7fELF", "it is to be refused"
    assert {one.name for one in _room().iterdir()} <= {"kernel", "initrd"}, "half a file is left"
    with suppress(ConfigError):
        text = release.config_of(str(path))
        assert is_bad or text.encode() == (config if b"IKCFG_ST" in inside else b"")


# --- arm64 ----------------------------------------------------------------------------------------


def _arm64(rng: Random, note: list[str]) -> None:
    body = rng.randbytes(rng.choice((10, 3000))) + rng.choice((b"", bytes(100_000)))
    plain = boot_images.arm64_image(
        body,
        text_offset=0x1000 * rng.randrange(3),
        size=rng.choice((MIB, 64 + len(body), 64 + len(body))),
    )
    content = bytearray(plain)
    wrapping = rng.choice(("", "", "gzip", "zstd", "zstd, no sum", "zboot gzip", "zboot zstd"))
    for _ in range(rng.choice((0, 1, 1, 2))):
        _push(rng, content, model.arm64_edges(content, SIZE, len(content)), note)
    if rng.random() < 0.1:
        harm(rng, content, [], note)
    data = bytearray(content)
    if wrapping:
        data = bytearray(_PACKERS[wrapping.removeprefix("zboot ")](bytes(content)))
        if rng.random() < 0.2:
            harm(rng, data, fields("a:4 b:4 c:4 d:4 e:4"), note)
    if wrapping.startswith("zboot"):
        packed = len(data)
        method = wrapping.removeprefix("zboot ").encode()
        data = bytearray(boot_images.zboot(bytes(data), method))
        if rng.random() < 0.4:
            edges = [
                model.edge("magic", 4, 4, 0),
                model.edge("offset", 8, 4, 0, 63, 64, 65, len(data) - packed + 1, len(data)),
                model.edge("size", 12, 4, 0, 1, packed - 1, packed + 1, 2, 4),
                model.edge("method", 24, 8, 0),
            ]
            _push(rng, data, edges, note)
    note.append(wrapping)
    try:
        wanted = model.arm64(bytes(data), SIZE)
    except Refused:
        wanted = None
    path = _room() / "kernel"
    path.write_bytes(data)
    memory = _memory()
    try:
        with ImageFile(str(path), "--kernel") as kernel:
            start, end = arm64.load(memory, kernel)
        found = bytes(memory.regions[0].view)
        assert wanted is not None, "it is to be refused"
        assert (start, end) == wanted[:2]
        assert found == (bytes(start) + wanted[2]).ljust(SIZE, b"\0"), "memory is another one"
    except ConfigError as error:
        _one_line(error)
        assert wanted is None, error
    finally:
        memory.regions[0].view[:] = _ZEROS


# --- modules --------------------------------------------------------------------------------------


def _module(rng: Random) -> bytes:
    """An object file with some sections."""
    info = [b"license=GPL", b"vermagic=6.1.0 SMP", b"alias=pci:v*", b"depends="]
    rng.shuffle(info)
    sections = {
        ".text": rng.randbytes(rng.randrange(200)),
        ".modinfo": b"\0".join(info) + b"\0",
        ".debug_info": bytes(rng.choice((0, 3000))),
        ".rela.debug_info": bytes(rng.choice((0, 500))),
        ".data": rng.randbytes(30),
    }
    names, starts = b"\0", {}
    for name in (*sections, ".shstrtab"):
        starts[name] = len(names)
        names += name.encode() + b"\0"
    sections[".shstrtab"] = names
    head = 64
    body, rows = b"", [bytes(64)]
    for name, content in sections.items():
        body += bytes(-len(body) % 8)
        row = (starts[name], 1, 0, 0, head + len(body), len(content), 0, 0, 8, 0)
        rows.append(struct.pack("<2I4Q2I2Q", *row))
        body += content
    body += bytes(-len(body) % 8)
    table = head + len(body)
    ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
    rest = struct.pack(
        "<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, len(rows), len(rows) - 1
    )
    return ident + rest + body + b"".join(rows)


def _modules(rng: Random, note: list[str]) -> None:
    data = bytearray(_module(rng))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        _push(rng, data, model.module_edges(data), note)
    if rng.random() < 0.1:
        harm(rng, data, [], note)
    if rng.random() < 0.1:
        data += b"~Module signature appended~\n"
    whole = bytes(data)
    try:
        wanted = model.modinfo(whole)
    except Refused:
        wanted = {}
    try:
        found = module_file.read_info("m.ko", whole)
    except ConfigError as error:
        _one_line(error)
        assert not wanted, error
    else:
        assert found == wanted
    less = module_file.for_loading(whole)
    if less == whole:
        assert not _has_to_shrink(whole), "what is for debuggers is still there"
        return
    assert len(less) < len(whole) and not whole.endswith(b"appended~\n")
    before, after = model.module(whole), model.module(less)
    assert before.is_whole and after.is_whole and len(before.sections) == len(after.sections)
    ends = 64 if whole[4] == 2 else 52
    for one, new in zip(before.sections, after.sections, strict=True):
        if before.is_called(whole, one, b".debug_", b".rela.debug_", b".rel.debug_"):
            assert new[:4] == (one.name, 0, 0, 0) and not any((new.align, *new.other)), new
        elif one.kind in (0, 8):
            assert new == one
        else:
            assert new == one._replace(offset=new.offset)
            assert new.offset % (one.align or 1) == 0 and new.offset >= ends, new
            assert one.offset + one.size <= len(whole), "it has an end"
            content = whole[one.offset : one.offset + one.size]
            assert less[new.offset : new.offset + one.size] == content
            ends = new.offset + one.size
    again = module_file.for_loading(less)
    assert again == less


def _has_to_shrink(data: bytes) -> bool:
    """True if it is sound, and much of it is for debuggers."""
    try:
        found = model.module(data)
    except Refused:
        return False
    if not found.is_whole or data.endswith(b"~Module signature appended~\n"):
        return False
    kept = 64 * (len(found.sections) + 2)
    is_any = False
    for one in found.sections:
        if found.is_called(data, one, b".debug_", b".rela.debug_", b".rel.debug_"):
            is_any = True
        elif one.kind not in (0, 8):
            if one.offset + one.size > len(data) or one.align > 65536:
                return False
            kept += one.size + one.align
    return is_any and kept < len(data)


# --- modules that are compressed ------------------------------------------------------------------

_MOST = 4 * MIB  # of a module, in place of 128 MiB


@functools.cache
def _filled(size: int) -> bytes:
    return b"\x7fELF".ljust(size, b"m")


def _xz(rng: Random) -> Callable[[bytes], bytes]:
    check = rng.choice((lzma.CHECK_NONE, lzma.CHECK_CRC32, lzma.CHECK_CRC64, lzma.CHECK_SHA256))
    log = rng.choice((12, 16, 20, 21, 22, 23))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << log}]
    return functools.partial(lzma.compress, check=check, filters=filters)


def _zst(rng: Random) -> Callable[[bytes], bytes]:
    log = rng.choice((10, 17, 20, 22, 23))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1,
        window_log=log,
        write_checksum=rng.random() < 0.5,
        write_content_size=rng.random() < 0.5,
    )
    packer = zstandard.ZstdCompressor(compression_params=parameters)
    if rng.random() < 0.5:
        return packer.compress

    def in_pieces(data: bytes) -> bytes:
        one = packer.compressobj()
        half = len(data) // 2
        first = one.compress(data[:half]) + one.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        return first + one.compress(data[half:]) + one.flush()

    return in_pieces


def _compressed_modules(rng: Random, note: list[str]) -> None:
    size = rng.choice((0, 1, 100, 3000, 3000, 70_000))
    inside = rng.choice((rng.randbytes(size), _filled(size)))
    if rng.random() < 0.04:
        inside = _filled(_MOST + rng.randrange(-1, 2))
    suffix = rng.choice((".xz", ".zst", ".zst", ".gz"))
    packer = {".xz": _xz, ".zst": _zst, ".gz": lambda rng: _PACKERS["gzip"]}[suffix](rng)
    data = bytearray(packer(inside))
    kind = rng.random()
    if kind < 0.3:
        harm(rng, data, fields("a:1 b:1 c:1 d:1 e:1 f:1 g:2 h:4"), note)
    elif kind < 0.5:
        del data[len(data) - rng.randrange(1, min(20, len(data))) :]
        note.append("cut")
    elif kind < 0.6:
        data += rng.choice((bytes(4), b"x", bytes(data)))
        note.append("more behind")
    note.append(f"{suffix} of {len(inside)}, {len(data)}: {bytes(data[:40]).hex()}")
    wanted = _of_module(bytes(data), suffix)
    with mock.patch.object(modules, "_MOST_MODULE", _MOST):
        try:
            found = modules._unpacked(f"m.ko{suffix}", bytes(data))
        except ConfigError as error:
            _one_line(error)
            assert wanted is None, error
        else:
            assert wanted is not None, f"{len(found)} bytes that are to be refused"
            assert found == wanted


def _of_module(data: bytes, suffix: str) -> bytes | None:
    """The first thing in `data`, a byte or a few at a time; None if it has to be refused."""
    one: Any
    if suffix == ".xz":
        one = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST)
    elif suffix == ".gz":
        one = zlib.decompressobj(31)
    else:
        one = zstandard.ZstdDecompressor(max_window_size=_MOST).decompressobj()
    found = []
    try:
        step = 1 + len(data) // 7
        for at in range(0, len(data), step):
            found.append(one.decompress(data[at : at + step]))
            if one.eof:
                break
    except (lzma.LZMAError, zlib.error, zstandard.ZstdError):
        return None
    whole = b"".join(found)
    if suffix == ".zst" and one.eof:
        # A little at a time, the library does not look after an empty block at the end.
        says = zstandard.get_frame_parameters(data).content_size
        if says not in (zstandard.CONTENTSIZE_UNKNOWN, len(whole)):
            return None
    return whole if one.eof and len(whole) <= _MOST else None


_WAYS: tuple[Callable[[Random, list[str]], Any], ...] = (
    *(_x86, _x86, _x86, _payload, _arm64, _arm64, _modules, _modules, _compressed_modules),
)


def kernel_case(rng: Random, ring: Ring) -> int:
    """One file; one step."""
    note: list[str] = []
    way = rng.choice(_WAYS)
    assert _room() and _memory()
    descriptors = open_files()
    with told(way, note):
        way(rng, note)
        check_closed(descriptors)
    return 1
