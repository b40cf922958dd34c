"""The ELF kernel inside a bzImage.

QEMU enters an ELF kernel directly, by its PVH note. A bzImage would first unpack itself, which
costs three seconds under emulation for an XZ kernel, but only one, and only once, here.
"""

from __future__ import annotations

import struct

from pyvmm.errors import ConfigError

# Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header"
_SETUP_SECTS = 0x1F1
_MAGIC = 0x202
_PROTOCOL = 0x206
_PAYLOAD = 0x248  # payload_offset and payload_length, protocol 2.08 and later
_ELF = b"\x7fELF"
_XZ = b"\xfd7zXZ\0"
_MOST_UNPACKED = _MOST_MEMORY = 256 << 20  # bytes; Debian's kernels have 60 MiB


def vmlinux(kernel: bytes) -> bytes | None:
    """The ELF kernel in `kernel`, a bzImage or an ELF file already.

    None if it is compressed with something else than XZ: QEMU then boots the bzImage as it is.
    Raises ConfigError if it is not a kernel at all.
    """
    if kernel.startswith(_ELF):
        return kernel
    if len(kernel) < _PAYLOAD + 8 or kernel[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise ConfigError("the emulated host's kernel is neither a bzImage nor an ELF file")
    if int.from_bytes(kernel[_PROTOCOL : _PROTOCOL + 2], "little") < 0x208:
        return None
    offset, length = struct.unpack_from("<II", kernel, _PAYLOAD)
    start = (1 + (kernel[_SETUP_SECTS] or 4)) * 512 + offset
    payload = kernel[start : start + length]
    if not payload.startswith(_XZ):
        return None
    import lzma  # needed once for each kernel

    # Four bytes with the unpacked size follow the XZ stream; LZMADecompressor stops before them.
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_MEMORY)
    try:
        unpacked = decompressor.decompress(payload, _MOST_UNPACKED)
    except lzma.LZMAError:
        unpacked = b""
    if not decompressor.eof:
        raise ConfigError("the emulated host's kernel is damaged or cut off")
    return unpacked if unpacked.startswith(_ELF) else None
