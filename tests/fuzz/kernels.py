"""Kernel files under the fuzzer: bzImage, ELF, arm64's Image and its wrappings, initrds, modules.

Files are made by the writers of the boot tests (tests/boot_images.py) and one of modules here, with
the place of each number in their headers known. A case raises AssertionError, with what was
changed, if

- a kernel is loaded, and memory is another one than a reader of our own makes of the same file,
- one that is as it should be is refused,
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
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import boot_images
import zstandard
from fuzz.damage import Number, fields, harm
from fuzz.room import check_closed, open_files, room, told

from pyvmm.boot import x86
from pyvmm.boot.arm64 import image as arm64
from pyvmm.boot.image_file import ImageFile
from pyvmm.boot.x86 import payload, release
from pyvmm.errors import ConfigError
from pyvmm.images import module_file
from pyvmm.machine.board.x86.layout import FIXED_DEVICES
from pyvmm.memory import GuestMemory
from pyvmm.testing.mmio_driver import Ring

MIB = 1 << 20
SIZE = 2 * MIB  # of the guest's memory
_HIGH = MIB  # where kernels begin
_ZEROS = bytes(SIZE)


_room = functools.cache(room)


@functools.cache
def _memory() -> GuestMemory:
    return GuestMemory([(0, SIZE)])


def _one_line(error: ConfigError) -> None:
    assert "\n" not in str(error) and len(str(error)) < 1500, error


def _u(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


# --- x86 ------------------------------------------------------------------------------------------

_BZIMAGE = (
    *fields("setup_sects:1 root_flags:2 syssize:4", 0x1F1),
    *fields("jump:1 magic:4 version:2", 0x201),
    *fields("kernel_version:2 type:1 loadflags:1", 0x20E),
    *fields("initrd_addr_max:4 alignment:4 relocatable:1 min_alignment:1 xloadflags:2", 0x22C),
    *fields("cmdline_size:4", 0x238),
    *fields("payload_offset:4 payload_length:4", 0x248),
    *fields("pref_address:8 init_size:4", 0x258),
)
_ELF64 = (
    *fields("magic:4 class:1 data:1 version:1"),
    *fields("kind:2 machine:2 :4 entry:8 phoff:8 :8 :4 ehsize:2 phentsize:2 phnum:2", 16),
)
_ELF32 = (
    *fields("magic:4 class:1 data:1 version:1"),
    *fields("kind:2 machine:2 :4 entry:4 phoff:4 :4 :4 ehsize:2 phentsize:2 phnum:2", 16),
)
_ROW64 = "type:4 flags:4 offset:8 vaddr:8 paddr:8 filesz:8 memsz:8 align:8"
_ROW32 = "type:4 offset:4 vaddr:4 paddr:4 filesz:4 memsz:4 flags:4 align:4"


def _bzimage(rng: Random) -> tuple[bytes, list[Number]]:
    code = rng.randbytes(rng.choice((600, 2048, 5000)))
    start = _HIGH + 0x1000 * rng.randrange(16)
    made = boot_images.bzimage(
        code=code,
        setup_sects=rng.choice((4, 4, 0, 10)),
        alignment=0x1000,
        pref_address=start,
        init_size=rng.choice((0, 0x10000)),
        xloadflags=rng.randrange(2),
        version=rng.choice((0x020F, 0x020C, 0x020A, 0x0206)),
        relocatable=rng.randrange(2),
    )
    return made, list(_BZIMAGE)


def _after_bzimage(data: bytes) -> tuple[int, bytes] | None:
    """What is in memory when `data` is loaded; None if it is not a kernel that can be."""
    sectors = data[0x1F1] or 4
    at = (sectors + 1) * 512
    size = min(_u(data, 0x1F4, 4) * 16, len(data) - at)
    if not size > 0:
        return None
    start = _HIGH
    version = _u(data, 0x206, 2)
    end = 0x202 + data[0x201]
    fields = data[:end].ljust(0x290, b"\0")
    if version >= 0x20A:
        start = _u(fields, 0x258, 8)
    if fields[0x234]:
        step = _u(fields, 0x230, 4)
        start = -(-max(start, _HIGH) // step) * step if step else start
    return start, data[at : at + size]


def _elf(rng: Random) -> tuple[bytes, list[Number]]:
    is_32bit = rng.random() < 0.3
    loads, at = [], _HIGH + 0x1000 * rng.randrange(8)
    entry = at
    for _ in range(rng.choice((1, 1, 2, 3))):
        part = rng.randbytes(rng.choice((16, 500, 2000)))
        memsz = len(part) + rng.choice((0, 0, 5000))
        loads.append(boot_images.Load(at, part, memsz=memsz))
        at += memsz + rng.choice((0, 0, 4096))
    rng.shuffle(loads)
    note = entry if is_32bit or rng.random() < 0.6 else None
    made = boot_images.Elf(loads, note, entry, is_32bit=is_32bit)
    if is_32bit:
        made.elf_class, made.machine, made.phoff, made.phentsize = 1, 3, 52, 32
    head, row = (52, 32) if is_32bit else (64, 56)
    numbers = list(_ELF32 if is_32bit else _ELF64)
    count = len(loads) + (note is not None)
    for index in range(count):
        numbers += fields(_ROW32 if is_32bit else _ROW64, head + row * index)
    built = made.build()
    if note is not None:
        numbers += fields("nsize:4 dsize:4 kind:4 name:4 desc:4", len(built) - 20)
    return built, numbers


def _after_elf(data: bytes) -> list[tuple[int, bytes]]:
    """Where each part of the file goes."""
    wide = data[4] == 2
    at, step, count = (
        (_u(data, 32, 8), _u(data, 54, 2), _u(data, 56, 2))
        if wide
        else (_u(data, 28, 4), _u(data, 42, 2), _u(data, 44, 2))
    )
    found = []
    for index in range(count):
        row = data[at + index * step :][:56]
        if wide:
            kind, _, offset, _, paddr, filesz, memsz, _ = struct.unpack_from("<IIQQQQQQ", row)
        else:
            kind, offset, _, paddr, filesz, memsz, _, _ = struct.unpack_from("<8I", row)
        if kind == 1 and memsz:
            assert offset + filesz <= len(data) and filesz <= memsz
            found.append((paddr, data[offset : offset + filesz]))
    return found


def _x86(rng: Random, note: list[str]) -> None:
    is_elf = rng.random() < 0.5
    made, numbers = _elf(rng) if is_elf else _bzimage(rng)
    data = bytearray(made)
    is_good = rng.random() < 0.2
    if not is_good:
        harm(rng, data, numbers, note)
    path = _room() / "kernel"
    path.write_bytes(data)
    initrd = None
    if rng.random() < 0.4:
        initrd = _room() / "initrd"
        text, numbers = _cpio(rng)
        ramdisk = bytearray(text)
        if rng.random() < 0.6:
            harm(rng, ramdisk, numbers, note)
        initrd.write_bytes(ramdisk)
        note.append(f"initrd: {bytes(ramdisk[:200])!r}")
    memory = _memory()
    try:
        entry = x86.load(
            memory,
            kernel=str(path),
            initrd=str(initrd) if initrd else None,
            cmdline=rng.choice(("", "console=ttyS0", "x" * 3000)),
            acpi=x86.AcpiConfig(FIXED_DEVICES),
        )
    except ConfigError as error:
        _one_line(error)
        assert not is_good or initrd or "x" in str(error) or "command line" in str(error), error
    else:
        assert entry is not None
        high = bytes(memory.regions[0].view[_HIGH:])
        expected = bytearray(SIZE - _HIGH)
        raw = bytes(data)
        parts = _after_elf(raw) if raw[:4] == b"\x7fELF" else [_after_bzimage(raw)]
        for part in parts:
            assert part is not None
            start, content = part
            assert start >= _HIGH and start + len(content) <= SIZE
            expected[start - _HIGH : start - _HIGH + len(content)] = content
        if initrd is not None:
            content = initrd.read_bytes()
            found = high.rfind(content)
            assert (found >= 0 and found % 4096 == 0) or not content, "no initrd"
            if content:
                tops = [max(0, a + len(c) - _HIGH) for a, c in parts if c]  # type: ignore[misc]
                lows = [a - _HIGH for a, c in parts if c]  # type: ignore[misc]
                assert found >= max(tops) or found + len(content) <= min(lows), "over the kernel"
                expected[found : found + len(content)] = content
        assert high == expected, "memory is another one"
    finally:
        memory.regions[0].view[:] = _ZEROS
    with suppress(ConfigError):
        release.release_of(str(path))
    with suppress(ConfigError):
        release.config_of(str(path))


# --- an initrd ------------------------------------------------------------------------------------


def _cpio(rng: Random) -> tuple[bytes, list[Number]]:
    text = b""
    for name in (b"init", b"dir/file", b"TRAILER!!!"):
        content = rng.randbytes(rng.randrange(50)) if name[:1] != b"T" else b""
        numbers = [1, 0o100755, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        head = rng.choice((b"070701", b"070702")) + b"".join(b"%08X" % one for one in numbers)
        text += head + name + b"\0"
        text += bytes(-len(text) % 4)
        text += content + bytes(-len(content) % 4)
    return text, [Number("namesize", 94, 8), Number("filesize", 54, 8), Number("magic", 0, 6)]


# --- payloads -------------------------------------------------------------------------------------

_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": functools.partial(gzip.compress, compresslevel=1),
    "bzip2": functools.partial(bz2.compress, compresslevel=1),
    "xz": functools.partial(lzma.compress, preset=0),
    "lzma": functools.partial(lzma.compress, format=lzma.FORMAT_ALONE, preset=0),
    "zstd": zstandard.ZstdCompressor(level=1, write_checksum=True).compress,
    "zstd, no sum": zstandard.ZstdCompressor(level=1).compress,
}


def _payload(rng: Random, note: list[str]) -> None:
    """The ELF in a bzImage, by each of the libraries' methods."""
    inside = boot_images.Elf().build() + rng.choice((b"", bytes(200_000), rng.randbytes(3000)))
    config = b"CONFIG_PCI=y\n# CONFIG_X is not set\n" * rng.randrange(30)
    if rng.random() < 0.3:
        inside += b"IKCFG_ST" + gzip.compress(config) + b"IKCFG_ED"
    name = rng.choice(list(_PACKERS))
    packed = bytearray(_PACKERS[name](inside))
    if is_bad := rng.random() < 0.6:
        harm(rng, packed, fields("a:4 b:4 c:4 d:4 e:4"), note)
    trailer = b"" if name == "gzip" else struct.pack("<I", len(inside))
    whole = bytes(packed) + trailer
    numbers = [*fields("payload_offset:4 payload_length:4", 0x248), Number("size", 0, 4)]
    data = bytearray(boot_images.bzimage(code=whole.ljust(600, b"\0"), payload=(0, len(whole))))
    if rng.random() < 0.2:
        is_bad = True
        harm(rng, data, numbers[:2], note)
    path, output = _room() / "kernel", _room() / "vmlinux"
    path.write_bytes(data)
    note.append(name)
    try:
        payload.unpack_vmlinux(str(path), str(output))
    except ConfigError as error:
        _one_line(error)
        assert is_bad, error
        assert not output.exists()
    else:
        found = output.read_bytes()
        assert is_bad or found == inside
        assert found[:4] == b"\x7fELF"
        output.unlink()
    assert {one.name for one in _room().iterdir()} <= {"kernel", "initrd"}, "half a file is left"
    with suppress(ConfigError):
        text = release.config_of(str(path))
        assert is_bad or text.encode() == (config if b"IKCFG_ST" in inside else b"")


# --- arm64 ----------------------------------------------------------------------------------------


def _arm64(rng: Random, note: list[str]) -> None:
    body = rng.randbytes(rng.choice((10, 3000))) + rng.choice((b"", bytes(100_000)))
    offset = 0x1000 * rng.randrange(3)
    size = rng.choice((MIB, 64 + len(body)))
    plain = boot_images.arm64_image(body, text_offset=offset, size=size)
    inner = fields(":8 text_offset:8 image_size:8 flags:8", 0)[0:] + fields("magic:4", 56)
    is_good = rng.random() < 0.25
    content = bytearray(plain)
    wrapping = rng.choice(("", "", "gzip", "zstd", "zboot gzip", "zboot zstd"))
    if not is_good and rng.random() < 0.6:
        harm(rng, content, inner, note)
    data = bytearray(content)
    numbers = list(inner)
    if wrapping:
        data = bytearray(_PACKERS[wrapping.removeprefix("zboot ")](bytes(content)))
        numbers = []
    if wrapping.startswith("zboot"):
        method = wrapping.removeprefix("zboot ").encode()
        data = bytearray(boot_images.zboot(bytes(data), method))
        numbers = fields("magic:2 :2 zimg:4 offset:4 size:4 :8 method:8")
    if not is_good and rng.random() < 0.6:
        harm(rng, data, numbers, note)
    note.append(wrapping)
    path = _room() / "kernel"
    path.write_bytes(data)
    memory = _memory()
    try:
        with ImageFile(str(path), "--kernel") as kernel:
            start, end = arm64.load(memory, kernel)
        found = bytes(memory.regions[0].view)
        assert 0 <= start < end <= SIZE
        if is_good:
            assert (start, end) == (offset, offset + size)
            assert found[start:].startswith(plain)
        assert not any(found[:start]) and not any(found[end:]), "outside of what it says"
    except ConfigError as error:
        _one_line(error)
        assert not is_good, error
    finally:
        memory.regions[0].view[:] = _ZEROS


# --- modules --------------------------------------------------------------------------------------

_SECTION = "name:4 type:4 flags:8 addr:8 offset:8 size:8 link:4 info:4 align:8 entsize:8"


def _module(rng: Random) -> tuple[bytes, list[Number], dict[str, bytes]]:
    """An object file with these sections."""
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
    numbers = [*fields("magic:4 class:1 data:1"), *fields("shoff:8", 0x28)]
    numbers += fields("shentsize:2 shnum:2 shstrndx:2", 0x3A)
    for index in range(len(rows)):
        numbers += fields(_SECTION, table + 64 * index)
    return ident + rest + body + b"".join(rows), numbers, sections


def _sections(data: bytes) -> list[tuple[int, int, bytes]]:
    """(name, type, content) of each section, as they stand there."""
    at, step, count = _u(data, 0x28, 8), _u(data, 0x3A, 2), _u(data, 0x3C, 2)
    found = []
    for index in range(count):
        name, kind, _, _, offset, size, _, _, _, _ = struct.unpack_from(
            "<2I4Q2I2Q", data, at + index * step
        )
        found.append((name, kind, data[offset : offset + size] if kind not in (0, 8) else b""))
    return found


def _modules(rng: Random, note: list[str]) -> None:
    made, numbers, sections = _module(rng)
    data = bytearray(made)
    if is_bad := rng.random() < 0.75:
        harm(rng, data, numbers, note)
    try:
        info = module_file.read_info("m.ko", bytes(data))
    except ConfigError as error:
        _one_line(error)
        assert is_bad, error
    else:
        assert is_bad or (info["license"], info["vermagic"]) == (["GPL"], ["6.1.0 SMP"])
    less = module_file.for_loading(bytes(data))
    assert len(less) <= len(data)
    if not is_bad:
        before, after = _sections(made), _sections(less)
        assert len(before) == len(after)
        for (name, kind, content), new in zip(before, after, strict=True):
            text = sections[".shstrtab"][name:].partition(b"\0")[0]
            is_gone = text.startswith((b".debug_", b".rela.debug_"))
            if is_gone and len(less) < len(data):
                assert new[1:] == (0, b"")
            else:
                assert new == (name, kind, content), text
        assert less == made or module_file.for_loading(less) == less


_WAYS: tuple[Callable[[Random, list[str]], Any], ...] = (
    *(_x86, _x86, _x86, _payload, _arm64, _arm64, _modules, _modules),
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
