"""A kernel module's file: what it says of itself, and how it gets smaller.

It is an ELF object that has not been linked (elf(5)). Its section .modinfo has "name=value" texts;
those for a debugger, which the kernel does not read, may be twenty times as large as all others.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from pyvmm.errors import ConfigError

MAGIC = b"\x7fELF"
_SIGNED = b"~Module signature appended~\n"  # Linux include/linux/module_signature.h
_FOR_DEBUGGERS = (b".debug_", b".rela.debug_", b".rel.debug_")
_NOT_USED, _WITHOUT_BYTES = 0, 8  # SHT_NULL, SHT_NOBITS
_MOST_INFO = 4 << 20  # bytes of a .modinfo section; that of a driver with many aliases has 200 KiB
_MOST_ALIGNMENT = 1 << 16  # bytes


class _Form(NamedTuple):
    """The places of an ELF header, and the forms of numbers, by EI_CLASS."""

    header: int  # its size
    table_at: int  # e_shoff
    address: str
    sizes_at: int  # e_shentsize, e_shnum, e_shstrndx
    section: str


_FORMS = {1: _Form(52, 0x20, "I", 0x2E, "10I"), 2: _Form(64, 0x28, "Q", 0x3A, "2I4Q2I2Q")}


class _Section(NamedTuple):
    """A section header (Elf64_Shdr)."""

    name_at: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


class _Object:
    """The sections of an ELF file. Raises ValueError, KeyError and struct.error for what is
    damaged."""

    def __init__(self, data: bytes) -> None:
        if not data.startswith(MAGIC) or len(data) < 64:
            raise ValueError
        self.data = data
        self.order = ">" if data[5] == 2 else "<"
        self.form = _FORMS[data[4]]
        (self._start,) = struct.unpack_from(
            self.order + self.form.address, data, self.form.table_at
        )
        self._step, self._count, strings = struct.unpack_from(
            f"{self.order}3H", data, self.form.sizes_at
        )
        if strings >= self._count:
            raise ValueError
        self._names = self._section(strings).offset

    def _section(self, index: int) -> _Section:
        at = self._start + index * self._step
        if at > len(self.data):
            raise ValueError
        return _Section(*struct.unpack_from(self.order + self.form.section, self.data, at))

    def sections(self) -> Iterator[_Section]:
        return map(self._section, range(self._count))

    def is_called(self, section: _Section, *beginnings: bytes) -> bool:
        """True if its name begins with one of `beginnings`."""
        return self.data.startswith(beginnings, self._names + section.name_at)


def read_info(path: str, data: bytes) -> dict[str, list[str]]:
    """A module's own description (its .modinfo: "name=value" texts), by name. Raises ConfigError
    for what is not a module; `path` is its name there."""
    try:
        texts = _modinfo(_Object(data))
    except (struct.error, KeyError, ValueError):
        raise no_module(path) from None
    found: dict[str, list[str]] = {}
    for text in texts.split(b"\0"):
        name, equals, value = text.decode("ascii", "replace").partition("=")
        if equals:
            found.setdefault(name, []).append(value)
    if "vermagic" not in found:
        raise no_module(path)
    return found


def _modinfo(module: _Object) -> bytes:
    for section in module.sections():
        if module.is_called(section, b".modinfo\0"):
            end = section.offset + section.size
            if section.size > _MOST_INFO or end > len(module.data):
                raise ValueError
            return module.data[section.offset : end]
    return b""


def no_module(path: str) -> ConfigError:
    """The error that says so of the file `path`."""
    return ConfigError(f"{path} is not a kernel module", cure="build it again", option="--modules")


def for_loading(data: bytes) -> bytes:
    """The module `data` without the sections that only a debugger reads. Each section keeps its
    number, so that all else stays as it is.

    One with a signature is left alone, as that counts every byte; so is one without such sections,
    or whose headers are damaged, which the kernel is to judge.
    """
    if data.endswith(_SIGNED):
        return data
    try:
        return _without_debugging(_Object(data)) or data
    except (struct.error, KeyError, ValueError):
        return data


def _without_debugging(module: _Object) -> bytes | None:
    """None if nothing would be gained."""
    data, form = module.data, module.form
    sections = list(module.sections())
    dropped = {one for one in sections if module.is_called(one, *_FOR_DEBUGGERS)}
    if not dropped:
        return None
    made = bytearray(data[: form.header])
    headers = []
    for section in sections:
        if section in dropped:
            section = _Section(section.name_at, _NOT_USED, *[0] * 8)
        elif section.kind not in (_NOT_USED, _WITHOUT_BYTES):
            if section.offset + section.size > len(data) or section.alignment > _MOST_ALIGNMENT:
                raise ValueError
            made += bytes(-len(made) % (section.alignment or 1))
            start, end = section.offset, section.offset + section.size
            section = section._replace(offset=len(made))
            made += data[start:end]
            if len(made) > len(data):  # sections may overlap
                return None
        headers.append(struct.pack(module.order + form.section, *section))
    made += bytes(-len(made) % 8)
    struct.pack_into(module.order + form.address, made, form.table_at, len(made))
    struct.pack_into(f"{module.order}H", made, form.sizes_at, len(headers[0]))
    made += b"".join(headers)
    return bytes(made) if len(made) < len(data) else None
