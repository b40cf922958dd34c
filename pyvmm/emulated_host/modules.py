"""The kernel modules that the emulated host loads, in their order, and made fast to load."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from pyvmm.errors import ConfigError

# include/linux/module_signature.h: after the signature come 12 bytes that describe it and this.
_SIGNATURE_MAGIC = b"~Module signature appended~\n"
_SIGNATURE_INFO = 12
_SUFFIXES = (".ko", ".ko.xz")


@dataclass(frozen=True)
class Module:
    """A module to load: its `name` as the file has it, and the `path` of the file."""

    name: str
    path: str

    def loadable(self, data: bytes) -> bytes:
        """`data`, the file's content, uncompressed and without its signature.

        Checking signatures takes long under emulation, and the emulated kernel does not insist.
        """
        if self.path.endswith(".xz"):
            from pyvmm.images.modules import unpacked  # rarely needed

            data = unpacked(data)
        return without_signature(data)


def without_signature(module: bytes) -> bytes:
    """`module` less the signature at its end; as it is if there is none."""
    if not module.endswith(_SIGNATURE_MAGIC):
        return module
    info = len(module) - len(_SIGNATURE_MAGIC) - _SIGNATURE_INFO
    length = int.from_bytes(module[info + 8 : info + 12], "big")
    return module[: info - length] if 0 <= length <= info else module


def load_order(modules_dir: str, wanted: Iterable[str]) -> list[Module]:
    """The modules `wanted` with all that they depend on, each after its dependencies.

    Reads modules.dep (depmod(8)). A wanted module that is built into the kernel needs no loading.
    Raises ConfigError if one does not exist.
    """
    dependencies = _read_dependencies(modules_dir)
    paths = {_name(path): path for path in dependencies}
    built_in = _built_in(modules_dir)
    order: list[str] = []
    for name in wanted:
        if name in paths:
            # A line lists the nearest dependencies first; the last one must be loaded first.
            order += [*reversed(dependencies[paths[name]]), paths[name]]
        elif name not in built_in:
            raise ConfigError(
                f"the emulated host's kernel has no module {name} in {modules_dir}",
                cure="use Debian's generic kernel (linux-image-amd64), not the cloud flavour",
            )
    order = _sorted_by_dependency(dict.fromkeys(order), dependencies)
    return [Module(_name(path), os.path.join(modules_dir, path)) for path in order]


def _sorted_by_dependency(paths: Iterable[str], dependencies: dict[str, list[str]]) -> list[str]:
    # modules.dep promises no order among the dependencies of one line, so go by their own lines.
    done: dict[str, None] = {}

    def visit(path: str) -> None:
        for needed in dependencies.get(path, ()):
            if needed not in done:
                visit(needed)
        done.setdefault(path)

    for path in paths:
        visit(path)
    return list(done)


def _read_dependencies(modules_dir: str) -> dict[str, list[str]]:
    path = os.path.join(modules_dir, "modules.dep")
    try:
        with open(path) as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", cure="depmod(8) of package kmod makes it"
        ) from None
    return {module: needs.split() for module, _, needs in (line.partition(":") for line in lines)}


def _built_in(modules_dir: str) -> set[str]:
    try:
        with open(os.path.join(modules_dir, "modules.builtin")) as file:
            return {_name(line) for line in file.read().splitlines()}
    except OSError:
        return set()


def _name(path: str) -> str:
    base = os.path.basename(path)
    for suffix in _SUFFIXES:
        if base.endswith(suffix):
            return base.removesuffix(suffix).replace("-", "_")
    return base
