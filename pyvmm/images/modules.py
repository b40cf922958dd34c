"""Kernel modules: which files a module needs, and in what order they must be loaded.

The order comes from modules.dep, which depmod(8) wrote for the unpacked kernel package: each line
is "path: dependency dependency …" with a module's dependencies complete and nearest first.
modules.builtin names what is part of the kernel itself and needs no loading.
"""

from __future__ import annotations

import lzma
import os
from collections.abc import Iterable

from pyvmm.errors import ConfigError

SUFFIXES = (".ko", ".ko.xz")  # bookworm's 6.1 has plain files, the 6.12 of backports xz
_MOST_MODULE = 128 << 20  # bytes; the largest of Debian's has 20 MiB


class ModuleTree:
    """The modules of one kernel: `folder` is …/lib/modules/<release>, with depmod's files in it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.release = os.path.basename(folder)
        self._paths, self._needs = _parse_dep(_read(folder, "modules.dep"))
        self._builtin = {module_name(line) for line in _read(folder, "modules.builtin")}

    def is_builtin(self, name: str) -> bool:
        return _normal(name) in self._builtin

    def load_order(self, names: Iterable[str]) -> list[str]:
        """Module names in an order in which each can be loaded; built-in ones are left out.

        Raises ConfigError for a module this kernel has neither as a file nor built in.
        """
        order: list[str] = []
        for name in names:
            self._visit(_normal(name), order)
        return order

    def contents(self, name: str) -> bytes:
        """The module's own bytes, uncompressed (with its signature, which the kernel checks)."""
        path = os.path.join(self.folder, self._paths[_normal(name)])
        with open(path, "rb") as file:
            data = file.read()
        return unpacked(data) if path.endswith(".xz") else data

    def _visit(self, name: str, order: list[str]) -> None:
        if name in self._builtin or name in order:
            return
        if name not in self._needs:
            raise ConfigError(f"the kernel {self.release} has no module {name!r}")
        for needed in reversed(self._needs[name]):  # the deepest dependency comes last
            self._visit(needed, order)
        order.append(name)


def unpacked(data: bytes) -> bytes:
    """A module that is compressed with xz. Raises ConfigError."""
    one = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_MODULE)
    try:
        module = one.decompress(data, _MOST_MODULE)
    except lzma.LZMAError as error:
        raise ConfigError(f"a kernel module is damaged: {error}") from None
    if not one.eof:
        raise ConfigError("a kernel module is cut short, or unpacks to more than 128 MiB")
    return module


def module_name(path: str) -> str:
    """ "kernel/drivers/block/virtio_blk.ko.xz" → "virtio_blk"; the kernel takes - for _."""
    name = os.path.basename(path.strip())
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            name = name.removesuffix(suffix)
            break
    return _normal(name)


def _normal(name: str) -> str:
    return name.replace("-", "_")


def _parse_dep(lines: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    paths: dict[str, str] = {}
    needs: dict[str, list[str]] = {}
    for line in lines:
        path, _, rest = line.partition(":")
        name = module_name(path)
        paths[name] = path.strip()
        needs[name] = [module_name(needed) for needed in rest.split()]
    return paths, needs


def _read(folder: str, name: str) -> list[str]:
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            return [line for line in file if line.strip()]
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing", cure="run depmod on the unpacked kernel") from None
