"""Kernel modules: which files a module needs, and in what order they must be loaded.

A folder of modules is one that depmod(8) has seen (…/lib/modules/RELEASE), such a folder before
that, or the tree that a kernel was built in. The order comes from modules.dep where depmod wrote it
(each line is "path: dependency dependency …", a module's dependencies complete and nearest first),
and from the modules' own .modinfo sections elsewhere. modules.builtin names what is part of the
kernel itself and needs no loading.
"""

from __future__ import annotations

import io
import lzma
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress

from pyvmm.errors import ConfigError

# bookworm's 6.1 has plain files, the 6.12 of backports xz, other distributions zstd or gzip
SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")
_MOST_MODULE = 128 << 20  # bytes; the largest of Debian's has 20 MiB
_MOST_MODULES = 100_000  # in one folder; Debian's generic kernel has 4,000
_OPTION = "--modules"


class ModuleTree:
    """The modules of one kernel: `folder` is …/lib/modules/<release>, with depmod's files in it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.release = os.path.basename(os.path.realpath(folder))
        self._paths, self._needs = _parse_dep(_read(folder, "modules.dep"))
        self._builtin = {module_name(line) for line in _read(folder, "modules.builtin")}
        self._soft = _parse_softdep(_read_if_there(folder, "modules.softdep"))
        self.knows_builtin = True

    def is_builtin(self, name: str) -> bool:
        return _normal(name) in self._builtin

    def has(self, name: str) -> bool:
        """Whether it is there, as a file or built in."""
        return _normal(name) in self._paths or self.is_builtin(name)

    def load_order(self, names: Iterable[str]) -> list[str]:
        """Module names in an order in which each can be loaded; built-in ones are left out.

        Raises ConfigError for a module this kernel has neither as a file nor built in.
        """
        order: list[str] = []
        for name in names:
            self._visit(_normal(name), order, set())
        return order

    def contents(self, name: str) -> bytes:
        """The module's own bytes, uncompressed (with its signature, which the kernel checks)."""
        path = os.path.join(self.folder, self._paths[_normal(name)])
        try:
            with open(path, "rb") as file:
                data = file.read(_MOST_MODULE + 1)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}", option=_OPTION) from None
        if len(data) > _MOST_MODULE:
            raise ConfigError(f"{path} has more than 128 MiB", option=_OPTION)
        try:
            return _unpacked(path, data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}", option=_OPTION) from None

    def _needs_of(self, name: str) -> list[str]:
        """The modules that `name` cannot be loaded without, the deepest last."""
        return self._needs[name]

    def _soft_needs_of(self, name: str) -> list[str]:
        """What it is better loaded after, under names that may be aliases."""
        return self._soft.get(name, [])

    def _visit(self, name: str, order: list[str], above: set[str]) -> None:
        if name in self._builtin or name in order or name in above:
            return
        if name not in self._paths:
            raise ConfigError(f"the kernel {self.release} has no module {name!r:.80}")
        above = above | {name}
        for soft in self._soft_needs_of(name):
            for known in (soft, f"{soft}_generic"):
                if known in self._paths:
                    self._visit(known, order, above)
        for needed in reversed(self._needs_of(name)):  # the deepest dependency comes last
            self._visit(needed, order, above)
        order.append(name)


class UnreadTree(ModuleTree):
    """Modules that depmod has not seen: they say themselves what they need."""

    def __init__(self, folder: str, paths: Mapping[str, str], release: str) -> None:
        """`paths` are their files, relative to `folder`, by their names."""
        self.folder = folder
        self.release = release
        self._paths = dict(paths)
        lines = _read_if_there(folder, "modules.builtin")
        self.knows_builtin = bool(lines)
        self._builtin = {module_name(line) for line in lines}
        self._info: dict[str, dict[str, list[str]]] = {}
        if not self.release and self._paths:
            magic = self._info_of(next(iter(self._paths))).get("vermagic", [""])[0]
            self.release = magic.partition(" ")[0]

    def _needs_of(self, name: str) -> list[str]:
        texts = self._info_of(name).get("depends", [])
        return [_normal(one) for text in texts for one in text.split(",") if one]

    def _soft_needs_of(self, name: str) -> list[str]:
        texts = self._info_of(name).get("softdep", [])
        return [one for text in texts for one in _before(text)]

    def _info_of(self, name: str) -> dict[str, list[str]]:
        if name not in self._info:
            path = os.path.join(self.folder, self._paths[name])
            self._info[name] = read_info(path, self.contents(name))
        return self._info[name]


def find(folder: str, release: str) -> ModuleTree:
    """The modules in `folder`: …/lib/modules/RELEASE, a folder that this is in, or the tree of a
    kernel's build. `release` is the kernel's, which chooses between several; "" if nobody knows.

    Raises ConfigError for a folder without modules.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder} is no directory", cure="check the path", option=_OPTION)
    if is_build_tree(folder):
        return _build_tree(folder)
    if _is_release(folder):
        return _installed(folder)
    for below in ("", "lib/modules", "usr/lib/modules"):
        place = os.path.join(folder, below)
        found = [name for name in _names(place) if _is_release(os.path.join(place, name))]
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
    """Whether a kernel is, or could be, built in `folder`."""
    return any(
        os.path.isfile(os.path.join(folder, *names))
        for names in (("include", "config", "kernel.release"), ("Kbuild",), (".config",))
    )


def _is_release(place: str) -> bool:
    there = {name for name in _names(place) if name.startswith(("modules.", "kernel"))}
    return "modules.dep" in there or (
        "kernel" in there and not there.isdisjoint(("modules.order", "modules.builtin"))
    )


def _installed(place: str) -> ModuleTree:
    if os.path.isfile(os.path.join(place, "modules.dep")):
        return ModuleTree(place)
    paths: dict[str, str] = {}
    for at, folders, files in os.walk(place):
        folders.sort()
        for name in sorted(files):
            if name.endswith(SUFFIXES):
                paths[module_name(name)] = os.path.relpath(os.path.join(at, name), place)
        if len(paths) > _MOST_MODULES:
            raise ConfigError(f"{place} has more than {_MOST_MODULES} modules", option=_OPTION)
    return UnreadTree(place, paths, os.path.basename(os.path.realpath(place)))


def _build_tree(folder: str) -> ModuleTree:
    """The tree of a build: modules.order names an object or a module a line."""
    paths = {}
    for line in _read_if_there(folder, "modules.order")[:_MOST_MODULES]:
        path = line.strip().removeprefix("kernel/")
        path = path.removesuffix(".o") + ".ko" if path.endswith(".o") else path
        if path.endswith(".ko") and os.path.isfile(os.path.join(folder, path)):
            paths[module_name(path)] = path
    return UnreadTree(folder, paths, build_release(folder))


def build_release(folder: str) -> str:
    """What a kernel's build tree is the tree of, such as "6.12.1-dirty"; "" if it does not say."""
    return "".join(_read_if_there(folder, "include/config/kernel.release")[:1]).strip()


def read_info(path: str, data: bytes) -> dict[str, list[str]]:
    """What a module says of itself (its .modinfo: "name=value" texts), by name. Raises ConfigError
    for what is no module; `path` is its name there."""
    from elftools.elf.elffile import ELFFile

    try:
        section = ELFFile(io.BytesIO(data)).get_section_by_name(".modinfo")
        texts = b"" if section is None else section.data()
    except Exception as error:  # whatever a damaged file makes the library raise
        raise ConfigError(
            f"{path} is no kernel module: {type(error).__name__}",
            cure="build it again",
            option=_OPTION,
        ) from None
    found: dict[str, list[str]] = {}
    for text in texts.split(b"\0"):
        name, equals, value = text.decode("ascii", "replace").partition("=")
        if equals:
            found.setdefault(name, []).append(value)
    if "vermagic" not in found:
        raise ConfigError(f"{path} is no kernel module", cure="build it again", option=_OPTION)
    return found


def _unpacked(path: str, data: bytes) -> bytes:
    if path.endswith(".xz"):
        return unpacked(data)
    if path.endswith(".gz"):
        return _gunzipped(data)
    return _unzstd(data) if path.endswith(".zst") else data


def unpacked(data: bytes) -> bytes:
    """A module that is compressed with xz. Raises ConfigError."""
    one = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_MODULE)
    try:
        module = one.decompress(data, _MOST_MODULE)
    except lzma.LZMAError as error:
        raise ConfigError(f"a kernel module is damaged: {error}") from None
    if not one.eof:
        raise _cut_short()
    return module


def _gunzipped(data: bytes) -> bytes:
    one = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        module = one.decompress(data, _MOST_MODULE)
    except zlib.error as error:
        raise ConfigError(f"a kernel module is damaged: {error}") from None
    if not one.eof:
        raise _cut_short()
    return module


def _unzstd(data: bytes) -> bytes:
    import zstandard

    one = zstandard.ZstdDecompressor(max_window_size=_MOST_MODULE)
    module = b""
    try:
        with one.stream_reader(data) as reader:
            module = reader.read(_MOST_MODULE + 1)
            whole = reader.tell() and len(module) <= _MOST_MODULE
        size = zstandard.frame_content_size(data)
    except zstandard.ZstdError as error:
        raise ConfigError(f"a kernel module is damaged: {error}") from None
    if not whole or (size >= 0 and size != len(module)):
        raise _cut_short()
    return module


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
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return [line for line in file if line.strip()]
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing", cure="run depmod on the unpacked kernel") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", option=_OPTION) from None


def _read_if_there(folder: str, name: str) -> list[str]:
    with suppress(ConfigError):
        return _read(folder, name)
    return []
