"""The facts that a kernel file tells of itself: its release, and the configuration that it was
built with.

A bzImage has its release in its header (Linux boot.rst, kernel_version), an ELF in its banner
alone.
"""

from __future__ import annotations

from pyvmm.boot import kernel_config
from pyvmm.boot.image_file import ImageFile
from pyvmm.boot.kernel_config import release_in
from pyvmm.boot.x86 import bzimage, detect

_DEBIAN = "(debian-kernel@"  # whose kernels have no CONFIG_IKCONFIG
_CHUNK = 4 << 20
_MOST = 1 << 30  # bytes of a kernel that are looked at; a file may have holes and no end


def release_of(path: str) -> str:
    """The release of the kernel at `path`, "" if it does not say. Raises ConfigError for a file
    that is not a kernel."""
    with ImageFile(path, "--kernel") as file:
        if detect.kind_of(file) == detect.BZIMAGE:
            return bzimage.parse(file).kernel_version.partition(" ")[0]
        return release_in(file.pieces(_CHUNK, _MOST))


def config_of(path: str) -> str:
    """The configuration in the kernel at `path`, "" if there is none. Raises ConfigError for a file
    that is not a kernel, or cannot be unpacked; OSError."""
    with ImageFile(path, "--kernel") as file:
        if detect.kind_of(file) == detect.ELF:
            return kernel_config.embedded(file.pieces(_CHUNK, _MOST))
        if _DEBIAN in bzimage.parse(file).kernel_version:
            return ""
        from pyvmm.boot.x86.payload import unpacked

        return kernel_config.embedded(unpacked(file))
