"""Kernel modules: which files a module needs, and in what order they must be loaded.

A folder of modules is one that depmod(8) has seen (…/lib/modules/RELEASE), such a folder before
that, or the tree that a kernel was built in. The order comes from modules.dep where depmod wrote it
(each line is "path: dependency dependency …", a module's dependencies complete and nearest first),
and from the modules' own .modinfo sections elsewhere. modules.builtin names what is part of the
kernel itself and needs no loading.
"""

from __future__ import annotations

import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from shlex import quote
from typing import Any

from pyvmm.errors import ConfigError
from pyvmm.host import files
from pyvmm.images import module_file

# bookworm's 6.1 has plain files, the 6.12 of backports xz, other distributions zstd or gzip
SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")
_MOST_MODULE = 128 << 20  # bytes; the largest of Debian's has 20 MiB
_GIVEN = 1 << 10  # bytes at a time, which zstd makes 32 MiB of at the most
_MOST_MODULES = 100_000  # in one folder; Debian's generic kernel has 4,000
_MOST_FILES = 1_000_000  # and directories
_MOST_PATH = 500  # characters of a module's, below its folder; the longest of Debian's have 90
_MOST_LOADED = 1000  # that are loaded together
_MOST_UNPACKED = 2 << 30  # bytes of all modules that are read
_MOST_LIST = 32 << 20  # bytes of one of depmod's lists; Debian's generic kernel's have 600 KiB
_NAME = re.compile(r"[A-Za-z0-9_.+]{1,64}")  # a module's: MODULE_NAME_LEN of <linux/moduleparam.h>
_RELEASE = re.compile(r"[!-~]{1,64}")  # a kernel's: __NEW_UTS_LEN of <linux/utsname.h>
_OPTION = "--modules"


class OtherRelease(ConfigError):
    """A module was built for another release than its kernel's, which will refuse it."""


class ModuleTree:
    """The modules of one kernel: `folder` is …/lib/modules/<release>, with depmod's files in it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.release = os.path.basename(os.path.realpath(folder))
        self._paths, self._needs = _parse_dep(_read(folder, "modules.dep"))
        self._builtin = {module_name(line) for line in _read(folder, "modules.builtin")}
        self._soft = _parse_softdep(_read_if_there(folder, "modules.softdep"))
        self._unpacked = 0
        self.knows_builtin = True

    def is_builtin(self, name: str) -> bool:
        return _normal(name) in self._builtin

    def has(self, name: str) -> bool:
        """True if it is there, as a file or built in."""
        return _normal(name) in self._paths or self.is_builtin(name)

    @property
    def cure(self) -> str:
        """What to do about a module that is not there."""
        return "switch them on in the kernel's configuration, and build and install it again"

    def load_order(self, names: Iterable[str]) -> list[str]:
        """Module names in an order in which each can be loaded; built-in ones are left out.

        Raises ConfigError for a module this kernel has neither as a file nor built in.
        """
        order: dict[str, None] = {}
        above: set[str] = set()  # what waits for the modules that it needs
        left: list[tuple[str, Iterator[str]]] = [("", map(_normal, names))]
        while left:
            name, before = left[-1]
            needed = next(before, None)
            if needed is None:
                left.pop()
                above.discard(name)
                if name:
                    order[name] = None
            elif not (needed in self._builtin or needed in order or needed in above):
                if needed not in self._paths:
                    raise ConfigError(f"the kernel {self.release} has no module {needed!r:.80}")
                if len(order) + len(above) == _MOST_LOADED:
                    raise ConfigError(f"{next(iter(order), needed)} needs too many modules")
                above.add(needed)
                left.append((needed, iter(self._before(needed))))
        return list(order)

    def contents(self, name: str) -> bytes:
        """The module's own bytes, uncompressed (with its signature, which the kernel checks).

        Raises ConfigError for any other file: whoever made the tree may have put a link to one
        there, which is not to get into a guest.
        """
        path = os.path.join(self.folder, self._paths[_normal(name)])
        try:
            module = _unpacked(path, _read_bytes(path, _MOST_MODULE))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}", option=_OPTION) from None
        if not module.startswith(module_file.MAGIC):
            raise module_file.no_module(path)
        self._unpacked += len(module)
        if self._unpacked > _MOST_UNPACKED:
            raise ConfigError(
                f"the modules in {self.folder} have more than {_MOST_UNPACKED >> 30} GiB together",
                option=_OPTION,
            )
        return module

    def _needs_of(self, name: str) -> list[str]:
        """The modules that `name` cannot be loaded without, the deepest last."""
        return self._needs[name]

    def _soft_needs_of(self, name: str) -> list[str]:
        """The modules that are better loaded before it, under names that may be aliases."""
        return self._soft.get(name, [])

    def _before(self, name: str) -> Iterator[str]:
        """The modules that are loaded before `name`, as far as it is known, in this order."""
        for soft in self._soft_needs_of(name):
            yield from (one for one in (soft, f"{soft}_generic") if one in self._paths)
        yield from reversed(self._needs_of(name))  # the deepest dependency comes last


class UnreadTree(ModuleTree):
    """Modules that depmod has not seen: they say themselves what they need."""

    def __init__(self, folder: str, paths: Mapping[str, str], release: str) -> None:
        """`paths` are their files, relative to `folder`, by their names."""
        self.folder = folder
        self.release = release
        self._paths = {
            name: path
            for name, path in paths.items()
            if _NAME.fullmatch(name) and len(path) <= _MOST_PATH
        }
        self._unpacked = 0
        lines = _read_if_there(folder, "modules.builtin")
        self.knows_builtin = bool(lines)
        self._builtin = {module_name(line) for line in lines}
        self._info: dict[str, dict[str, list[str]]] = {}
        if not self.release and self._paths:
            magic = self._info_of(next(iter(self._paths))).get("vermagic", [""])[0]
            self.release = _release(magic.partition(" ")[0])

    @property
    def paths(self) -> list[str]:
        """Its modules' files, relative to its folder."""
        return sorted(self._paths.values())

    @property
    def cure(self) -> str:
        """See ModuleTree."""
        if not is_build_tree(self.folder):
            return super().cure
        tree = quote(self.folder)
        if not self._paths:
            return f"make -C {tree} modules (none are built), or switch them on to be built in"
        return f"switch them on in {self.folder}/.config, and: make -C {tree}"

    def check(self) -> None:
        """Raise OtherRelease if its modules are of another release than the kernel, as far as the
        first of them tells; ConfigError if that is none."""
        for name in islice(self._paths, 1):
            self._info_of(name)

    def _needs_of(self, name: str) -> list[str]:
        texts = self._info_of(name).get("depends", [])
        return [_normal(one) for text in texts for one in text.split(",") if one]

    def _soft_needs_of(self, name: str) -> list[str]:
        texts = self._info_of(name).get("softdep", [])
        return [one for text in texts for one in _before(text)]

    def _info_of(self, name: str) -> dict[str, list[str]]:
        if name not in self._info:
            path = os.path.join(self.folder, self._paths[name])
            self._info[name] = module_file.read_info(path, self.contents(name))
            self._check_release(path, self._info[name]["vermagic"][0])
        return self._info[name]

    def _check_release(self, path: str, magic: str) -> None:
        """Raise OtherRelease if the kernel will refuse the module whose vermagic is `magic` (Linux
        kernel/module/version.c, same_magic)."""
        first, *features = magic.split() or [""]
        built_for = _release(first)
        is_by_symbols = "modversions" in features
        if self.release and built_for not in ("", self.release) and not is_by_symbols:
            cure = "build and install it again: make modules modules_install"
            if is_build_tree(self.folder):
                # What is built next has the tree's release, which the kernel need not have.
                is_kernels = build_release(self.folder) == self.release
                what = ("build it again", " modules") if is_kernels else ("build both again", "")
                cure = f"{what[0]}: make -C {quote(self.folder)}{what[1]}"
            raise OtherRelease(
                f"{path} was built for Linux {built_for}, and the kernel is {self.release}",
                cure=cure,
                option=_OPTION,
            )


def find(folder: str, release: str) -> ModuleTree:
    """The modules in `folder`: …/lib/modules/RELEASE, a folder that this is in, or the tree of a
    kernel's build. `release` is the kernel's, which chooses between several; "" if nobody knows.

    Raises ConfigError for a folder without modules.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder} is not a directory", cure="check the path", option=_OPTION)
    if is_build_tree(folder):
        return _build_tree(folder)
    if is_installed(folder):
        return _installed(folder)
    for below in ("", "lib/modules", "usr/lib/modules"):
        place = os.path.join(folder, below)
        found = [name for name in _names(place) if is_installed(os.path.join(place, name))]
        if not found:
            continue
        if release in found:
            return _installed(os.path.join(place, release))
        if len(found) == 1:
            return _installed(os.path.join(place, found[0]))
        raise ConfigError(
            f"{place} has the modules of {', '.join(sorted(found)[:4])}, and none of the kernel"
            f"{' ' if release else ''}{release}",
            cure="name one of them: --modules DIR/RELEASE",
            option=_OPTION,
        )
    raise ConfigError(
        f"there are no kernel modules in {folder}",
        cure="name …/lib/modules/RELEASE, or a kernel's build tree after `make modules`",
        option=_OPTION,
    )


def _names(place: str) -> list[str]:
    try:
        return os.listdir(place)
    except OSError:
        return []


def is_build_tree(folder: str) -> bool:
    """True if a kernel is, or could be, built in `folder`."""
    return any(
        os.path.isfile(os.path.join(folder, *names))
        for names in (("include", "config", "kernel.release"), ("Kbuild",), (".config",))
    )


def is_installed(place: str) -> bool:
    """True if `place` is the folder of one release's modules, …/lib/modules/RELEASE."""
    there = {name for name in _names(place) if name.startswith(("modules.", "kernel"))}
    return "modules.dep" in there or (
        "kernel" in there and not there.isdisjoint(("modules.order", "modules.builtin"))
    )


def _installed(place: str) -> ModuleTree:
    if os.path.isfile(os.path.join(place, "modules.dep")):
        return ModuleTree(place)
    paths = {module_name(path): path for path in _files_of_modules(place)}
    return UnreadTree(place, paths, os.path.basename(os.path.realpath(place)))


def _files_of_modules(place: str) -> Iterator[str]:
    """Below `place`, and relative to it. Raises ConfigError for more than anybody has."""
    folders, left, modules = [""], _MOST_FILES, _MOST_MODULES
    while folders:
        folder = folders.pop()
        found: list[os.DirEntry[str]] = []
        with suppress(OSError), os.scandir(os.path.join(place, folder)) as entries:
            found = sorted(islice(entries, left + 1), key=lambda entry: entry.name)
        below = []
        for entry in found:
            path = os.path.join(folder, entry.name)
            if entry.is_dir(follow_symlinks=False):
                below += [path] if len(path) < _MOST_PATH else []
            elif entry.name.endswith(SUFFIXES):
                modules -= 1
                yield path
        folders += reversed(below)
        left -= len(found)
        for what, most, rest in (("files", _MOST_FILES, left), ("modules", _MOST_MODULES, modules)):
            if rest < 0:
                raise ConfigError(f"{place} has more than {most} {what}", option=_OPTION)


def _build_tree(folder: str) -> ModuleTree:
    """The tree of a build: modules.order names an object or a module a line."""
    paths = {}
    for line in _read_if_there(folder, "modules.order")[:_MOST_MODULES]:
        listed = line.strip()
        listed = listed.removesuffix(".o") + ".ko" if listed.endswith(".o") else listed
        # Trees of Linux before 5.3 put "kernel/" in front. A folder of that name is in each.
        for path in (listed, listed.removeprefix("kernel/")):
            if path.startswith("/") or ".." in path.split("/") or not path.endswith(".ko"):
                continue
            if os.path.isfile(os.path.join(folder, path)):
                paths[module_name(path)] = path
                break
    return UnreadTree(folder, paths, build_release(folder))


def build_release(folder: str) -> str:
    """The release that a kernel's build tree is of, such as "6.12.1-dirty"; "" if it does not
    say."""
    return _release("".join(_read_if_there(folder, "include/config/kernel.release")[:1]).strip())


def _release(text: str) -> str:
    """`text` as a kernel's release, if it can be one; else ""."""
    return text if _RELEASE.fullmatch(text) else ""


def _unpacked(path: str, data: bytes) -> bytes:
    if path.endswith(".xz"):
        return unpacked(data)
    if path.endswith(".gz"):
        return _decompressed(zlib.decompressobj(zlib.MAX_WBITS | 16), data)
    return _unzstd(data) if path.endswith(".zst") else data


def unpacked(data: bytes) -> bytes:
    """A module that is compressed with xz. Raises ConfigError."""
    return _decompressed(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_MODULE), data)


def _decompressed(one: Any, data: bytes) -> bytes:
    try:
        module: bytes = one.decompress(data, _MOST_MODULE)
    except (lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"a kernel module is damaged: {error}") from None
    if not one.eof:
        raise _cut_short()
    return module


def _unzstd(data: bytes) -> bytes:
    import zstandard

    # Not its stream_reader, which ends without a word where the data does.
    one = zstandard.ZstdDecompressor(max_window_size=_MOST_MODULE).decompressobj()
    pieces = []
    left = _MOST_MODULE
    try:
        for at in range(0, len(data), _GIVEN):
            pieces.append(one.decompress(data[at : at + _GIVEN]))
            left -= len(pieces[-1])
            if one.eof or left < 0:
                break
    except zstandard.ZstdError as error:
        raise ConfigError(f"a kernel module is damaged: {error}") from None
    if not one.eof or left < 0:
        raise _cut_short()
    return b"".join(pieces)


def _cut_short() -> ConfigError:
    return ConfigError("a kernel module is cut short, or unpacks to more than 128 MiB")


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
        if not _NAME.fullmatch(name):
            continue
        paths[name] = path.strip()
        needs[name] = [module_name(needed) for needed in rest.split()]
    return paths, needs


def _parse_softdep(lines: Iterable[str]) -> dict[str, list[str]]:
    """modprobe.d(5): "softdep NAME pre: NAME … post: NAME …"."""
    found: dict[str, list[str]] = {}
    for line in lines:
        words = line.split(None, 2)
        if len(words) == 3 and words[0] == "softdep":
            found.setdefault(_normal(words[1]), []).extend(_before(words[2]))
    return found


def _before(text: str) -> list[str]:
    words = text.partition("post:")[0].replace("pre:", " ").split()
    return [_normal(word.removeprefix("crypto-")) for word in words]


def _read(folder: str, name: str) -> list[str]:
    path = os.path.join(folder, name)
    text = _read_bytes(path, _MOST_LIST).decode("utf-8", "replace")
    return [line for line in text.split("\n") if line.strip()]


def _read_bytes(path: str, most: int) -> bytes:
    try:
        return files.read_regular(path, most)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing", cure="run depmod on the unpacked kernel") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", option=_OPTION) from None


def _read_if_there(folder: str, name: str) -> list[str]:
    with suppress(ConfigError):
        return _read(folder, name)
    return []
