"""The kinds of files, by their first bytes, that are given in place of a kernel or an initrd."""

from __future__ import annotations

import os

from pyvmm.boot.image_file import ImageFile
from pyvmm.errors import ConfigError

HEAD = 0x4008  # bytes: up to where a bootable disk's or a file system's signature may stand

ELF_MAGIC = b"\x7fELF"
EM_386, EM_ARM, EM_X86_64, EM_AARCH64 = 3, 40, 62, 183  # <linux/elf-em.h>
ELF_MACHINES = {
    EM_386: "32-bit x86",
    EM_X86_64: "64-bit x86",
    EM_ARM: "32-bit Arm",
    EM_AARCH64: "arm64",
    243: "RISC-V",
    21: "POWER",
    22: "s390",
}
"""The architectures by the numbers in ELF headers (System V ABI, "ELF Header")."""
RUN_ON = {"x86_64": (EM_X86_64, EM_386), "aarch64": (EM_AARCH64, EM_ARM)}
"""The numbers of those that a machine runs, by uname(2)'s name of it."""
_ELF_HEAD = 20  # bytes: up to the end of e_machine

_X86, _ARM64 = (0x202, b"HdrS"), (0x38, b"ARM\x64")  # offset and magic number of Linux's headers
_CPIO = (b"070701", b"070702")
_CPIO_HEADER = 110  # bytes: the magic, and 13 fields of 8 hexadecimal digits
_TRAILER = b"TRAILER!!!"
_MOST_FILES = 200_000  # of an archive, that are looked at

# How to get at what is inside a compressed file, by its first bytes.
_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gzip -dc"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
    (b"\xfd7zXZ\0", "xz", "xz -dc"),
    (b"BZh", "bzip2", "bzip2 -dc"),
    (b"\x5d\0\0", "lzma", "xz --format=lzma -dc"),
    (b"\x02\x21\x4c\x18", "lz4", "lz4 -dc"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc"),
    (b"\x89LZO", "lzo", "lzop -dc"),
)
_UNPACK = "unpack it: mkdir DIRECTORY && {}; and give DIRECTORY to --kernel"
_TAR = _UNPACK.format("tar -C DIRECTORY -xf FILE")
_RPM = _UNPACK.format("rpm2cpio FILE | cpio -idD DIRECTORY")
_OTHERS = (
    (*_X86, "a kernel for x86", "use --arch x86_64, or another kernel"),
    (*_ARM64, "a kernel for arm64", "use --arch arm64, or another kernel"),
    (0, b"070701", "a cpio archive, that is an initrd", "give it to --initrd"),
    (0, b"070702", "a cpio archive, that is an initrd", "give it to --initrd"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image (uImage)", "use the kernel that it was made of"),
    (0, b"QFI\xfb", "a QCOW2 disk image", "give disks to --disk"),
    (0, b"!<arch>\n", "a Debian package or ar archive", _UNPACK.format("dpkg -x FILE DIRECTORY")),
    (0, b"\xed\xab\xee\xdb", "an RPM package", _RPM),
    (257, b"ustar", "a tar archive", _TAR),
    (0x38, b"RSC\x05", "a kernel for RISC-V", "use one for x86 or arm64"),
    (0x438, b"\x53\xef", "an ext2/3/4 file system", "give disks to --disk"),
)


def elf_machine(path: str) -> int | None:
    """The number of the architecture that the ELF file at `path` is for; None if it is none, or
    cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            head = os.read(fd, _ELF_HEAD)
        finally:
            os.close(fd)
    except OSError:
        return None
    if len(head) < _ELF_HEAD or not head.startswith(ELF_MAGIC):
        return None
    return int.from_bytes(head[18:20], "big" if head[5] == 2 else "little")


def not_a_kernel(kernel: ImageFile, head: bytes, wanted: str, example: str) -> ConfigError:
    """The error for a file that begins with `head`, up to HEAD bytes of it, and is not the `wanted`
    kind of kernel; `example` is one that is."""
    name = os.path.basename(kernel.path)
    is_archive = ".tar" in name or name.endswith(".tgz")
    for magic, what, command in _COMPRESSED:
        if head.startswith(magic) and is_archive:
            return kernel.error(f"{kernel.path} is a tar archive", _TAR)
        if head.startswith(magic):
            return kernel.error(
                f"{kernel.path} is {what}-compressed",
                f"decompress it first ({command} {kernel.path} > kernel); "
                "if it is an initrd, give it to --initrd",
            )
    for offset, magic, what, cure in _OTHERS:
        if head[offset : offset + len(magic)] == magic:
            return kernel.error(f"{kernel.path} is {what}", cure)
    return kernel.error(f"{kernel.path} is {wanted}", f"give it a Linux kernel, such as {example}")


def check_initrd(initrd: ImageFile) -> None:
    """Raise ConfigError if the file is a kernel, or a damaged cpio archive; of what else it is, the
    guest is the judge."""
    head = initrd.read(0, 0x206)
    linux = any(head[offset : offset + len(magic)] == magic for offset, magic in (_X86, _ARM64))
    if linux or head.startswith(ELF_MAGIC):
        raise initrd.error(f"{initrd.path} is a kernel", "give it to --kernel")
    if head.startswith(_CPIO):
        _check_cpio(initrd)


def _check_cpio(initrd: ImageFile) -> None:
    """Of the first archive in the file: others may follow it, compressed ones too. The format is
    that of Linux Documentation/driver-api/early-userspace/buffer-format.rst."""
    at = 0
    for _ in range(_MOST_FILES):
        header = initrd.read(at, _CPIO_HEADER)
        try:
            if len(header) < _CPIO_HEADER or not header.startswith(_CPIO):
                raise ValueError
            size, name_size = (int(header[place : place + 8], 16) for place in (54, 94))
        except ValueError:
            raise initrd.error(
                f"{initrd.path} is a damaged initrd: its cpio archive breaks off at byte {at}",
                "copy or build it again",
            ) from None
        name = initrd.read(at + _CPIO_HEADER, min(name_size, len(_TRAILER) + 1))
        if name.startswith(_TRAILER):
            return
        at += -(-(_CPIO_HEADER + name_size) // 4) * 4
        at += -(-size // 4) * 4
