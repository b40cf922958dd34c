"""The kind of a kernel file, by its first bytes; a clear message for any other file."""

from __future__ import annotations

from pyvmm.boot import file_kinds
from pyvmm.boot.image_file import ImageFile

BZIMAGE = "bzImage"
ELF = "ELF"

_ELF_MAGIC = b"\x7fELF"


def kind_of(kernel: ImageFile) -> str:
    """`BZIMAGE` or `ELF`. Raises ConfigError that says what the file is instead."""
    head = kernel.read(0, file_kinds.HEAD)
    if head[:4] == _ELF_MAGIC:
        return ELF
    if head[0x202:0x206] == b"HdrS":
        return BZIMAGE
    wanted = "neither a bzImage (no HdrS signature) nor an ELF vmlinux"
    raise file_kinds.not_a_kernel(kernel, head, wanted, "/boot/vmlinuz-*")
