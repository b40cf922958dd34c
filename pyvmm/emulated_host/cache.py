"""Kernel and initial RAM disk, made once and kept under the user's cache directory.

A file's name holds a hash of all that it was made from, so a stale one is never used; it appears
under that name only when it is whole.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from hashlib import blake2b

from pyvmm.emulated_host.architecture import emulated_machine
from pyvmm.emulated_host.initramfs import archive, archive_parts
from pyvmm.emulated_host.spec import HostImage
from pyvmm.errors import ConfigError
from pyvmm.host import user_cache

_ELF = b"\x7fELF"


@dataclass(frozen=True)
class BootFiles:
    """The files that QEMU boots: the paths of the kernel and of the initial RAM disk."""

    kernel: str
    initramfs: str


def cache_directory() -> str:
    """The files' directory. Raises ConfigError for a user without a home directory."""
    return os.path.join(user_cache.folder(), "emulated-host")


def boot_files(image: HostImage, directory: str | None = None) -> BootFiles:
    """The files to boot `image` with, made now if they are not in the cache.

    Raises ConfigError if a part of the image is missing or is not what it should be.
    """
    directory = directory or cache_directory()
    try:
        with open(image.kernel, "rb") as file:
            kernel = file.read(len(_ELF))
            if kernel != _ELF:
                kernel += file.read()
    except OSError as error:
        raise ConfigError(
            f"cannot read the emulated host's kernel {image.kernel}: {error.strerror}"
        ) from None
    return BootFiles(_unpacked(kernel, image, directory), _initramfs(image, directory))


def _unpacked(kernel: bytes, image: HostImage, directory: str) -> str:
    if kernel == _ELF:
        return image.kernel
    name = os.path.join(directory, f"vmlinux-{hash_of(kernel)}")
    if os.path.exists(name):
        return name
    elf = emulated_machine(image.architecture).vmlinux(kernel)
    return image.kernel if elf is None else _write(name, elf)


def _initramfs(image: HostImage, directory: str) -> str:
    parts = archive_parts(image)
    key = hash_of(*(part for name, data in parts.files.items() for part in (name.encode(), data)))
    name = os.path.join(directory, f"initramfs-{key}.cpio")
    return name if os.path.exists(name) else _write(name, archive(parts))


def _write(name: str, content: bytes) -> str:
    partial = f"{name}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, name)
    except OSError as error:
        with contextlib.suppress(OSError):  # The first failure is the one to report.
            os.unlink(partial)
        raise ConfigError(
            f"cannot write {name}: {error.strerror}",
            cure="set XDG_CACHE_HOME to a directory with 100 MB of room",
        ) from None
    return name


def hash_of(*parts: bytes) -> str:
    """24 hexadecimal digits for all `parts`."""
    digest = blake2b(digest_size=12)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
