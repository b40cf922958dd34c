"""The boot entry of a disk: a Boot Loader Specification entry, a unified kernel image, GRUB's or
EXTLINUX' configuration, or the newest kernel in /boot.

Sources: the Boot Loader Specification (uapi-group.org): type 1 entries, type 2 EFI unified kernel
images; loader.conf(5) of systemd-boot; Fedora's change "BootLoaderSpecByDefault", by which GRUB
reads entries, with its variables in them. All of it is a stranger's text, which becomes file names
in that file system, and words of the kernel command line.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple

from pyvmm.boot import extlinux, grub, unified_kernel
from pyvmm.boot.file_system import FileSystem, shown
from pyvmm.errors import ConfigError

System = FileSystem[Any]

_MOST_TEXT = 1 << 20  # bytes of a configuration
_MOST_SAVED = 64 << 10  # bytes of an environment block, and of what a unified kernel image says
_MOST_ENTRY = 64 << 10  # bytes of an entry of the Boot Loader Specification
_MOST_LINE = 8192  # characters of a command; a kernel takes 4096 at most
_MOST_ENTRIES = 256
_MOST_VENDORS = 16  # directories in an EFI system partition
_MOST_PATTERN = 128  # characters
_MOST_UNIFIED = 5 << 28  # bytes: of a kernel and an initrd
_MOST_IMAGES = 32  # unified kernel images
_FAR = 4 << 20  # bytes into an image: what is read of each of them is before
_PREFIXES = ("/boot", "")  # /boot in the root, or a file system of its own
_GRUB = ("grub", "grub2")
_EXTLINUX = (
    "extlinux.conf",
    "extlinux/extlinux.conf",
    "syslinux/syslinux.cfg",
    "syslinux/extlinux.conf",
    "syslinux.cfg",
    "EFI/syslinux/syslinux.cfg",
    "EFI/BOOT/syslinux.cfg",
)
_KERNELS = ("vmlinuz-", "kernel-", "bzImage-", "Image-")
_BARE_KERNELS = ("vmlinuz", "bzImage", "Image", "Image.gz")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_CURE = "name a kernel: --kernel, --initrd"


class BootEntry(NamedTuple):
    """A kernel and its initrds, as paths in `system`; `cmdline` has the words that it is to get,
    `source` is the file that says so. Of a unified kernel image all are one file, with
    `sections`."""

    system: System
    kernel: str
    initrds: tuple[str, ...]
    cmdline: tuple[str, ...]
    source: str
    sections: unified_kernel.Sections = MappingProxyType({})

    def read_kernel(self, most: int) -> Iterator[bytes]:
        """The kernel in pieces. Raises ConfigError for one of more than `most` bytes, or in a file
        system that is damaged."""
        if self.sections:
            return self._section(".linux", most)
        return self.system.read_file(self.kernel, most)

    def read_initrds(self, most: int) -> Iterator[bytes]:
        """The same of the initrds, one after the other."""
        if self.sections:
            yield from self._section(".initrd", most)
        for path in self.initrds:
            yield from self.system.read_file(path, most)

    @property
    def has_initrd(self) -> bool:
        """True if there is an initrd."""
        return bool(self.initrds) or ".initrd" in self.sections

    def _section(self, name: str, most: int) -> Iterator[bytes]:
        start, size = self.sections.get(name, (0, 0))
        if size > most:
            raise ConfigError(
                f"{shown(self.kernel)} in {self.system.where} has {size} bytes of {name}, more "
                f"than the {most} that it may have"
            )
        pieces = self.system.read_file(self.kernel, _MOST_UNIFIED)
        return unified_kernel.cut(pieces, start, size)


def find(systems: Sequence[System]) -> BootEntry | None:
    """The entry of the first of `systems` that has one; None if none does. Raises ConfigError
    for one that names what is not there."""
    for look in (_by_entries, _unified, _by_grub, _by_extlinux, _newest):
        for system in systems:
            found = look(system, systems)
            if found is not None:
                return found
    return None


# --- Boot Loader Specification --------------------------------------------------------------------


def _by_entries(system: System, systems: Sequence[System]) -> BootEntry | None:
    for prefix in _PREFIXES:
        folder = f"{prefix}/loader/entries"
        names = [name for name in system.names(folder) if name.endswith(".conf")]
        entries: dict[str, dict[str, list[str]]] = {}
        for name in names[:_MOST_ENTRIES]:
            if system.has(f"{folder}/{name}"):  # no link to nowhere
                fields = _fields(system.read_text(f"{folder}/{name}", _MOST_ENTRY))
                if "linux" in fields:  # no EFI program
                    entries[name.removesuffix(".conf")] = fields
        if not entries:
            continue
        newest_first = sorted(
            entries, key=lambda one: _natural(" ".join(entries[one].get("version", [one])))
        )[::-1]
        values, saved = _variables(system, prefix)
        name = _default_entry(system, prefix, newest_first, saved)
        fields, path = entries[name], f"{folder}/{name}.conf"
        words = _words(" ".join(fields.get("options", [])), path, values)
        initrds = _words(" ".join(fields.get("initrd", [])), path, values)
        kernel, *rest = [
            _place([system], prefix, one, path)
            for one in (fields["linux"][-1], *(one for one in initrds if one[:1] != "$"))
        ]
        paths = tuple(place for _, place in rest)
        return BootEntry(system, kernel[1], paths, _plain(words), path)
    return None


def _fields(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        words = line.split(None, 1)
        if len(words) == 2 and not words[0].startswith("#"):
            found.setdefault(words[0], []).append(words[1].strip())
    return found


def _default_entry(
    system: System, prefix: str, newest_first: Sequence[str], saved: Mapping[str, str]
) -> str:
    """The one that GRUB's environment block or systemd-boot's loader.conf names, or the newest."""
    wanted = saved.get("saved_entry", "")
    if wanted.isdecimal() and int(wanted[:4]) < len(newest_first):
        return newest_first[int(wanted[:4])]
    if wanted in newest_first:
        return wanted
    path = f"{prefix}/loader/loader.conf"
    if system.has(path):
        for pattern in _fields(_text(system, path)).get("default", [])[-1:]:
            pattern = pattern[:_MOST_PATTERN].removesuffix(".conf")
            for name in newest_first:
                if fnmatchcase(name[:_MOST_PATTERN], pattern):
                    return name
    return newest_first[0]


# --- unified kernel images ------------------------------------------------------------------------


def _unified(system: System, systems: Sequence[System]) -> BootEntry | None:
    best: tuple[list[tuple[int, int, str]], str, unified_kernel.Sections] | None = None
    for prefix in _PREFIXES:
        folder = f"{prefix}/EFI/Linux"
        names = [name for name in system.names(folder) if name.lower().endswith(".efi")]
        for name in names[:_MOST_IMAGES]:
            path = f"{folder}/{name}"
            if not system.has(path):
                continue
            pieces = system.read_file(path, _MOST_UNIFIED)
            head = b"".join(unified_kernel.cut(pieces, 0, unified_kernel.HEAD))
            sections = unified_kernel.sections(head)
            if not sections:
                continue
            version = ""
            if sections.get(".uname", (_FAR, 0))[0] < _FAR:
                version = _section_text(system, path, sections, ".uname")
            order = _natural(version or name)
            if best is None or order > best[0]:
                best = order, path, sections
    if best is None:
        return None
    _, path, sections = best
    text = _section_text(system, path, sections, ".cmdline")
    return BootEntry(system, path, (), _plain(_words(text, path)), path, sections)


def _section_text(system: System, path: str, sections: unified_kernel.Sections, name: str) -> str:
    start, size = sections.get(name, (0, 0))
    if not size:
        return ""
    pieces = system.read_file(path, _MOST_UNIFIED)
    data = b"".join(unified_kernel.cut(pieces, start, min(size, _MOST_SAVED)))
    return data.decode("utf-8", "replace").partition("\0")[0].replace("\n", " ").strip()


# --- GRUB -----------------------------------------------------------------------------------------


def _by_grub(system: System, systems: Sequence[System]) -> BootEntry | None:
    places = [(prefix, f"{prefix}/{name}") for prefix in _PREFIXES for name in _GRUB]
    vendors = system.names("/EFI")[:_MOST_VENDORS]
    for prefix, folder in (*places, *(("", f"/EFI/{vendor}") for vendor in vendors)):
        path = f"{folder}/grub.cfg"
        if not system.has(path):
            continue
        text = _text(system, path)
        values, saved = _variables(system, prefix, text)
        chosen = grub.chosen(text, saved)
        if chosen is None:
            continue
        words = _words(chosen.linux, path, values)
        if len(words) < 2:
            continue  # its kernel is a variable without a value
        names = [one for one in _words(chosen.initrd, path, values)[1:] if one[:1] != "$"]
        # An EFI system partition names what is in another one.
        others = [one for one in systems if one is not system]
        where, place = _place([system, *others], prefix, words[1], path)
        initrds = tuple(_place([where], prefix, one, path)[1] for one in names)
        return BootEntry(where, place, initrds, _plain(words[2:]), path)
    return None


def _variables(
    system: System, prefix: str, text: str | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """The variables of GRUB's configuration, which is `text` if it is known already, and those of
    its environment block alone."""
    saved: dict[str, str] = {}
    for name in _GRUB:
        folder = f"{prefix}/{name}"
        if not saved and system.has(f"{folder}/grubenv"):
            saved = grub.environment(system.read_text(f"{folder}/grubenv", _MOST_SAVED))
        if text is None and system.has(f"{folder}/grub.cfg"):
            text = _text(system, f"{folder}/grub.cfg")
    return grub.variables(text or "", saved), saved


# --- EXTLINUX -------------------------------------------------------------------------------------


def _by_extlinux(system: System, systems: Sequence[System]) -> BootEntry | None:
    for prefix in _PREFIXES:
        for name in _EXTLINUX:
            path = f"{prefix}/{name}"
            label = extlinux.chosen(_text(system, path)) if system.has(path) else None
            if label is None:
                continue
            folder = posixpath.dirname(path)
            kernel, *initrds = [
                _place([system], prefix, _beside(folder, one), path)[1]
                for one in (label.kernel, *label.initrds)
            ]
            words = _plain(_words(label.append, path))
            return BootEntry(system, kernel, tuple(initrds), words, path)
    return None


def _beside(folder: str, path: str) -> str:
    return path if path.startswith("/") else f"{folder}/{path}"


# --- none of them ---------------------------------------------------------------------------------


def _newest(system: System, systems: Sequence[System]) -> BootEntry | None:
    for folder in _PREFIXES:
        names = system.names(folder or "/")
        kernels = [one for one in names if one.startswith(_KERNELS) and "rescue" not in one]
        for some in (kernels, [one for one in names if one in _BARE_KERNELS]):
            there = [one for one in some if system.has(f"{folder}/{one}")]  # no links to nowhere
            if not there:
                continue
            kernel = max(there, key=_natural)
            version = kernel.partition("-")[2]
            usual = [f"initrd.img-{version}", f"initramfs-{version}.img", f"initrd-{version}"]
            usual += [f"initramfs-{version}", "initrd.img", "initramfs.img", "initramfs", "initrd"]
            initrds = [f"{folder}/{one}" for one in usual[0 if version else 4 :]]
            initrds = [one for one in initrds if system.has(one)]
            source = f"{folder}/{kernel}"
            return BootEntry(system, source, tuple(initrds[:1]), (), source)
    return None


# --- what they have in common ---------------------------------------------------------------------


def _text(system: System, path: str) -> str:
    return system.read_text(path, _MOST_TEXT)


def _words(line: str, path: str, values: Mapping[str, str] | None = None) -> list[str]:
    """The words of a command, with the values of its variables that are known."""
    size = len(line)

    def value(found: re.Match[str]) -> str:
        nonlocal size
        known = values or {}
        text = known.get(found[1] or found[2], found[0]) if size <= _MOST_LINE else ""
        size += len(text)
        return text

    if len(line) <= _MOST_LINE:
        line = _VARIABLE.sub(value, line)
    if max(size, len(line)) > _MOST_LINE:  # the time for a word grows with the square of its length
        raise ConfigError(f"{path} in the disk has a line of {size} characters", cure=_CURE)
    try:
        return shlex.split(line)
    except ValueError:
        raise ConfigError(f"{path} in the disk has a quote that never ends", cure=_CURE) from None


def _plain(words: Sequence[str]) -> tuple[str, ...]:
    """The words without those that need GRUB's variables, and what a kernel would take for two."""
    usable = [word for word in words if "$" not in word and '"' not in word]
    return tuple(f'"{word}"' if " " in word else word for word in usable)


def _place(systems: Sequence[System], prefix: str, path: str, source: str) -> tuple[System, str]:
    """Where the file is that `source` names, which is in the first of `systems`: in that one or
    another, by its own root or by /boot's."""
    path = re.sub(r"^\([^)]*\)", "", path)  # GRUB's name of a device
    for system in systems:
        for place in (path, f"{prefix}/{path.lstrip('/')}"):
            if "$" not in place and system.has(place):
                return system, place
    raise ConfigError(
        f"{source} in {systems[0].where} names {path!r:.120}, which is not in "
        f"{'that file system' if len(systems) == 1 else 'any file system of the disk'}",
        cure=_CURE,
    )


def _natural(text: str) -> list[tuple[int, int, str]]:
    """A key by which 6.10 comes after 6.9, and a release after its candidates."""
    pieces = re.findall(r"\d+|[a-zA-Z]+|~", text[:200])
    return [*map(_rank, pieces), (1, 0, "")]


def _rank(piece: str) -> tuple[int, int, str]:
    if piece.isdigit():
        return 3, int(piece), ""
    return (0 if piece == "~" else 2), 0, piece
