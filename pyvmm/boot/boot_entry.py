"""The boot entry of a disk: a Boot Loader Specification entry, GRUB's configuration, or the newest
kernel in /boot.

Sources: the Boot Loader Specification (uapi-group.org), type 1 entries; the GNU GRUB manual
("Multi-boot manual config", `linux`, `initrd`). GRUB's configuration is a script, which is not run:
its first entry, or the one of a plain `set default=N`, is taken as it stands. All of it is a
stranger's text, which becomes file names in that file system, and words of the kernel command line.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from pyvmm.boot.file_system import FileSystem
from pyvmm.errors import ConfigError

System = FileSystem[Any]

_MOST_TEXT = 1 << 20  # bytes of a configuration
_MOST_LINE = 8192  # characters of a command; a kernel takes 4096 at most
_MOST_ENTRIES = 256
_PREFIXES = ("/boot", "")  # /boot in the root, or a file system of its own
_GRUB = ("grub/grub.cfg", "grub2/grub.cfg")
_LINUX, _INITRD = ("linux", "linux16", "linuxefi"), ("initrd", "initrd16", "initrdefi")
_CURE = "name a kernel: --kernel, --initrd"


class BootEntry(NamedTuple):
    """A kernel and its initrds, as paths in `system`; `cmdline` has the words that it is to get,
    `source` is the file that says so."""

    system: System
    kernel: str
    initrds: tuple[str, ...]
    cmdline: tuple[str, ...]
    source: str


def find(systems: Sequence[System]) -> BootEntry | None:
    """The entry of the first of `systems` that has one; None if none does. Raises ConfigError
    for one that names what is not there."""
    for look in (_by_entries, _by_grub, _newest):
        for system in systems:
            found = look(system)
            if found is not None:
                return found
    return None


# --- Boot Loader Specification --------------------------------------------------------------------


def _by_entries(system: System) -> BootEntry | None:
    best: tuple[list[tuple[int, int, str]], BootEntry] | None = None
    for prefix in _PREFIXES:
        folder = f"{prefix}/loader/entries"
        names = [name for name in system.names(folder) if name.endswith(".conf")]
        for name in names[:_MOST_ENTRIES]:
            path = f"{folder}/{name}"
            if not system.has(path):
                continue  # a link to nowhere
            fields = _fields(_text(system, path))
            if "linux" not in fields:
                continue  # an EFI program
            order = _natural(" ".join(fields.get("version", [name])))
            if best is not None and order <= best[0]:
                continue
            words = [word for text in fields.get("options", []) for word in _words(text, path)]
            named = [one for one in " ".join(fields.get("initrd", [])).split() if one[0] != "$"]
            kernel, *initrds = [
                _place(system, prefix, one, path) for one in (fields["linux"][-1], *named)
            ]
            best = order, BootEntry(system, kernel, tuple(initrds), _plain(words), path)
    return None if best is None else best[1]


def _fields(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        words = line.split(None, 1)
        if len(words) == 2 and not words[0].startswith("#"):
            found.setdefault(words[0], []).append(words[1].strip())
    return found


# --- GRUB -----------------------------------------------------------------------------------------


def _by_grub(system: System) -> BootEntry | None:
    for prefix in _PREFIXES:
        for name in _GRUB:
            path = f"{prefix}/{name}"
            if not system.has(path):
                continue
            chosen = _grub_entry(_text(system, path), path)
            if chosen is None:
                continue
            kernel, initrds, words = chosen
            places = [_place(system, prefix, one, path) for one in (kernel, *initrds)]
            return BootEntry(system, places[0], tuple(places[1:]), _plain(words), path)
    return None


def _grub_entry(text: str, path: str) -> tuple[str, list[str], list[str]] | None:
    """(kernel, initrds, words) of the default entry."""
    entries: list[tuple[str, list[str], list[str]]] = []
    default = 0
    within = False
    for line in text.splitlines():
        line = line.strip()
        word = line.partition(" ")[0].partition("\t")[0]
        if word == "menuentry":
            within = True
        elif found := re.fullmatch(r"set default=[\"']?(\d{1,3})[\"']?", line):
            default = int(found[1])
        elif within and word in _LINUX:
            words = _words(line, path)[1:]
            if words:
                entries.append((words[0], [], words[1:]))
                within = False
        elif entries and not within and word in _INITRD and not entries[-1][1]:
            entries[-1] = (entries[-1][0], _words(line, path)[1:], entries[-1][2])
        if len(entries) == _MOST_ENTRIES:
            break
    if not entries:
        return None
    return entries[default] if default < len(entries) else entries[0]


def _words(line: str, path: str) -> list[str]:
    if len(line) > _MOST_LINE:  # the time for a word grows with the square of its length
        raise ConfigError(f"{path} in the disk has a line of {len(line)} characters", cure=_CURE)
    try:
        return shlex.split(line)
    except ValueError:
        raise ConfigError(f"{path} in the disk has a quote that never ends", cure=_CURE) from None


# --- neither of them ------------------------------------------------------------------------------


def _newest(system: System) -> BootEntry | None:
    for folder in _PREFIXES:
        names = system.names(folder or "/")
        kernels = [one for one in names if one.startswith("vmlinuz-") and "rescue" not in one]
        kernels = [one for one in kernels if system.has(f"{folder}/{one}")]  # no links to nowhere
        if not kernels:
            continue
        kernel = max(kernels, key=_natural)
        version = kernel.removeprefix("vmlinuz-")
        usual = (f"initrd.img-{version}", f"initramfs-{version}.img", f"initrd-{version}")
        initrds = [f"{folder}/{one}" for one in usual if system.has(f"{folder}/{one}")]
        source = f"{folder}/{kernel}"
        return BootEntry(system, source, tuple(initrds[:1]), (), source)
    return None


# --- what they have in common ---------------------------------------------------------------------


def _text(system: System, path: str) -> str:
    return system.read_text(path, _MOST_TEXT)


def _plain(words: Sequence[str]) -> tuple[str, ...]:
    """The words without those that need GRUB's variables, and what a kernel would take for two."""
    usable = [word for word in words if "$" not in word and '"' not in word]
    return tuple(f'"{word}"' if " " in word else word for word in usable)


def _place(system: System, prefix: str, path: str, source: str) -> str:
    """The path in `system` of the file that `source` names: by its own root, or by /boot's."""
    path = re.sub(r"^\([^)]*\)", "", path)  # GRUB's name of a device
    for place in (path, f"{prefix}/{path.lstrip('/')}"):
        if "$" not in place and system.has(place):
            return place
    raise ConfigError(
        f"{source} in {system.where} names {path!r:.120}, which is not in that file system",
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
