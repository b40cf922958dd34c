"""Take the ELF vmlinux out of a bzImage: ``python -m pyvmm.boot.x86.payload BZIMAGE VMLINUX``.

A bzImage unpacks itself in the guest, which takes memory and, where the guest is emulated, seconds.
What it holds is an ELF with a PVH note, which starts at once. Source: Linux boot.rst,
payload_offset and payload_length; the compressors are those of Linux scripts/Makefile.lib, which
append the unpacked size in four bytes (gzip has it in its own trailer).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pyvmm.boot.image_file import ImageFile
from pyvmm.boot.x86 import bzimage, detect
from pyvmm.errors import ConfigError

_ELF_MAGIC = b"\x7fELF"
_MAX_UNPACKED = 1 << 30
_SIZE_FIELD = 4


def unpack_vmlinux(path: str, output: str) -> None:
    """Write the ELF vmlinux in the bzImage at `path` to the file `output`, whole or not at all.

    The file may be longer than the ELF: relocations, which only the bzImage needs, follow it.
    Raises ConfigError for a file that is no bzImage, a payload that is damaged, or a compressor
    that this machine has no program for.
    """
    with ImageFile(path, "--kernel") as kernel:
        if detect.kind_of(kernel) != detect.BZIMAGE:
            raise kernel.error(f"{path} is an ELF already")
        vmlinux = _unpack(kernel, _payload(kernel))
        if not vmlinux.startswith(_ELF_MAGIC):
            raise kernel.error(f"{path}: what it unpacks to is not an ELF file")
    partial = f"{output}.{os.getpid()}.part"
    try:
        with open(partial, "wb") as file:
            file.write(vmlinux)
        os.replace(partial, output)
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {os.strerror(error.errno or 0)}") from None
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def _payload(kernel: ImageFile) -> bytes:
    image = bzimage.parse(kernel)
    offset = image.setup_size + image.payload_offset
    if not image.payload_length or image.payload_offset + image.payload_length > image.code_size:
        raise kernel.error(f"{kernel.path} is damaged: its payload does not lie within it")
    return kernel.read(offset, image.payload_length)


def _unpack(kernel: ImageFile, payload: bytes) -> bytes:
    if payload.startswith(_ELF_MAGIC):
        return payload  # CONFIG_KERNEL_UNCOMPRESSED
    unpacker = next((known for magic, known in _UNPACKERS if payload.startswith(magic)), None)
    if unpacker is None:
        raise kernel.error(f"{kernel.path} has a payload of an unknown kind: {payload[:6].hex()}")
    size = int.from_bytes(payload[-_SIZE_FIELD:], "little")
    if not 0 < size <= _MAX_UNPACKED:
        raise kernel.error(f"{kernel.path} is damaged: its payload would unpack to {size} bytes")
    vmlinux = unpacker(kernel, payload, size + 1)  # one more shows that there is more
    if len(vmlinux) != size:
        raise kernel.error(
            f"{kernel.path} is damaged: its payload does not unpack to the {size} bytes it says"
        )
    return vmlinux


_Unpacker = Callable[[ImageFile, bytes, int], bytes]  # the file, its payload, most bytes wanted


def _gzip(kernel: ImageFile, payload: bytes, most: int) -> bytes:
    import zlib

    return _guarded(
        kernel, lambda: zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(payload, most)
    )


def _bzip2(kernel: ImageFile, payload: bytes, most: int) -> bytes:
    import bz2

    return _guarded(kernel, lambda: bz2.BZ2Decompressor().decompress(payload, most))


def _xz(kernel: ImageFile, payload: bytes, most: int) -> bytes:
    import lzma  # reads .xz and the older .lzma alike, with the x86 branch filter

    return _guarded(kernel, lambda: lzma.LZMADecompressor().decompress(payload, most))


def _guarded(kernel: ImageFile, unpack: Callable[[], bytes]) -> bytes:
    try:
        return unpack()
    except Exception as error:  # zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, …
        raise kernel.error(f"{kernel.path} has a damaged payload: {error}") from None


def _command(program: str, package: str) -> _Unpacker:
    """An unpacker that pipes through `program`, which Debian has in `package`."""

    def unpack(kernel: ImageFile, payload: bytes, most: int) -> bytes:
        import subprocess

        try:
            done = subprocess.run(
                [program, "-dc"], input=payload[:-_SIZE_FIELD], capture_output=True, check=False
            )
        except FileNotFoundError:
            raise kernel.error(
                f"{kernel.path} is compressed with {program}, which is not installed",
                f"apt install {package}",
            ) from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise kernel.error(f"{kernel.path} has a damaged payload: {said}")
        return done.stdout

    return unpack


_UNPACKERS: tuple[tuple[bytes, _Unpacker], ...] = (
    (b"\x1f\x8b", _gzip),
    (b"BZh", _bzip2),
    (b"\xfd7zXZ\0", _xz),
    (b"\x5d\0\0", _xz),
    (b"\x02\x21\x4c\x18", _command("lz4", "lz4")),  # the legacy frame, which the kernel uses
    (b"\x28\xb5\x2f\xfd", _command("zstd", "zstd")),
    (b"\x89LZO", _command("lzop", "lzop")),
)


def main(arguments: list[str]) -> int:
    """The command line of this module; the exit code."""
    if len(arguments) != 2:
        print("usage: python -m pyvmm.boot.x86.payload BZIMAGE VMLINUX", file=sys.stderr)
        return 2
    try:
        unpack_vmlinux(*arguments)
    except ConfigError as error:
        print(f"pyvmm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
