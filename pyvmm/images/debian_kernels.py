"""Debian's kernels by a version or a release: fetched at the first use, and then kept.

"debian:6.1"                    a recipe's kernel, pinned in the lock file
"debian:trixie", "debian:sid"   what that release has at the first use
"debian:6.17"                   that series, from whichever release has it
"debian:trixie=6.12.57-1"       that very version, or none

$XDG_CACHE_HOME/pyvmm/kernels/NAME/    bzImage, vmlinux, config, lib/modules/RELEASE, packages

That of another architecture is NAME_ARCH, and has no vmlinux.

apt checks signatures and checksums, as for every image.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.host import user_cache
from pyvmm.images import apt, builder, built, cache, found_before, kernel, tools
from pyvmm.images.lock import Pin
from pyvmm.images.progress import Progress

PREFIX = "debian:"
_PACKAGES = {"": "linux-image-cloud-amd64", "arm64": "linux-image-arm64"}  # by `arch`
_TRIXIE = ("trixie", "trixie-updates", "trixie-security")
# Release → where apt looks; None for the recipes' own suites. The order is that of a search.
_SUITES: dict[str, tuple[str, ...] | None] = {
    "bookworm": None,
    "bookworm-backports": None,
    "trixie": _TRIXIE,
    "trixie-backports": (*_TRIXIE, "trixie-backports"),
    "sid": ("sid",),
}
_SERIES = re.compile(r"[0-9]{1,2}(\.[0-9]{1,3}){0,2}")
_VERSION = re.compile(r"[0-9][A-Za-z0-9.+~-]{0,62}")
USE = f"use a series such as debian:6.12, or debian:{'|'.join(_SUITES)}, with =VERSION to pin it"


class Found(NamedTuple):
    """A kernel that is there: the path of the ELF, or for another architecture of Debian's file; of
    its configuration and of its modules, and of an initramfs where one has been made for it
    already."""

    kernel: str
    config: str
    modules: str
    initrd: str | None = None


def find(name: str, *, refresh: bool = False, arch: str = "") -> Found:
    """The kernel that `name` ("debian:6.1") stands for, fetched where it is missing, or if
    `refresh` is true; for guests of `arch`, one of bootable.FOREIGN or "". Raises ConfigError for a
    name that Debian has no kernel for."""
    wanted, _, version = name.removeprefix(PREFIX).partition("=")
    _check(name, wanted, version)
    if not version and not refresh and wanted in _recipes(arch):
        return _of_recipe(wanted, arch)
    place = folder(name, arch)
    if refresh or not os.path.isdir(place):
        _fetch(name, wanted, version, place, refresh=refresh, arch=arch)
    return _in(place, "bzImage" if arch else "vmlinux")


def _in(place: str, file: str, initrd: str | None = None) -> Found:
    config, modules = os.path.join(place, "config"), kernel.modules_folder(place)
    return Found(os.path.join(place, file), config, modules, initrd)


def headers(name: str) -> str:
    """The folder to build modules for the kernel `name` in (make -C FOLDER M=…), fetched if it is
    missing. The tools in it run on a Debian of that kernel's release, or a later one, and want its
    gcc. Raises ConfigError, also where the mirror has them no more."""
    found = find(name)
    release = os.path.basename(found.modules)
    place = os.path.join(user_cache.folder(), "headers", release)
    target = os.path.join(place, "usr", "src", f"linux-headers-{release}")
    if os.path.isdir(target):
        return target
    with open(os.path.join(os.path.dirname(found.config), "packages"), encoding="utf-8") as file:
        version = file.readline().split()[1]
    progress = Progress()
    with cache.building(progress.waiting):
        work = builder.Builder(builder.Catalogue(), progress)
        client, pins = _search_headers(name, release, version, work)
        with cache.new_folder(place) as into, cache.workspace() as room:
            with progress.step(f"{name}: fetching {pins[0].package} {version}"):
                packages = client.download_all(pins, room)
            for package in packages:
                tools.run(["dpkg-deb", "-x", package, into], "cannot unpack the kernel's headers")
            # It names the other package's Makefile by its place in a system.
            makefile = os.path.join(into, "usr", "src", f"linux-headers-{release}", "Makefile")
            with open(makefile, encoding="utf-8") as file:
                text = file.read()
            with open(makefile, "w", encoding="utf-8") as file:
                file.write(text.replace("/usr/src/", f"{place}/usr/src/"))
    return target


def _search_headers(
    name: str, release: str, version: str, work: builder.Builder
) -> tuple[apt.Apt, list[Pin]]:
    wanted = name.removeprefix(PREFIX).partition("=")[0]
    for _, client in _clients(wanted, work):
        pins = client.headers(release, version)
        if pins:
            return client, pins
    raise ConfigError(
        f"the mirror has no headers for the kernel {release} {version}",
        cure=f"fetch a kernel that it has: pyvmm image build {name}",
        option="--kernel",
    )


def folder(name: str, arch: str = "") -> str:
    """The folder in which the kernel `name`, for guests of `arch`, is kept once it was fetched."""
    kept = name.removeprefix(PREFIX) + (f"_{arch}" if arch else "")
    return os.path.join(user_cache.folder(), "kernels", kept)


def names() -> list[str]:
    """Of those that have been fetched, sorted: "debian:sid", "debian:sid_arm64"."""
    try:
        found = os.listdir(os.path.join(user_cache.folder(), "kernels"))
    except OSError:
        return []
    return sorted(f"{PREFIX}{name}" for name in found)


def remove(name: str) -> None:
    """Remove one that was fetched. Raises ConfigError if it is not there."""
    if name not in names():
        there = ", ".join(names())
        raise ConfigError(
            f"no kernel {name!r:.80} has been fetched", cure=f"there are {there}" if there else ""
        )
    with cache.building(Progress().waiting):
        cache.remove(folder(name))


def remove_all() -> list[str]:
    """Remove all that were fetched; their folders. The cache is the caller's (cache.building)."""
    gone = [folder(name) for name in names()]
    for place in gone:
        cache.remove(place)
    return gone


def remove_headers_without_kernel(of_recipes: Sequence[str]) -> list[str]:
    """Remove what was fetched to build modules for kernels that neither are in the folders
    `of_recipes` nor were fetched; the folders. The cache is the caller's."""
    kernels = [*of_recipes, *map(folder, names())]
    there = {
        release
        for place in kernels
        if os.path.isdir(modules := os.path.join(place, "lib", "modules"))
        for release in os.listdir(modules)
    }
    place = os.path.join(user_cache.folder(), "headers")
    found = os.listdir(place) if os.path.isdir(place) else []
    gone = [os.path.join(place, name) for name in sorted(found) if name not in there]
    for headers in gone:
        cache.remove(headers)
    return gone


def _check(name: str, wanted: str, version: str) -> None:
    usable = wanted in _SUITES or _SERIES.fullmatch(wanted)
    pinned = "=" in name
    if not usable or (pinned and not _VERSION.fullmatch(version)):
        raise ConfigError(f"there is no kernel {name!r:.80}", cure=USE, option="--kernel")


def _recipes(arch: str) -> Collection[str]:
    from pyvmm.images import bootable, recipes

    return bootable.kernels_of(arch) if arch else recipes.load().guest_kernels


def _of_recipe(wanted: str, arch: str) -> Found:
    if arch:
        from pyvmm.images import bootable

        path, initrd = bootable.boot_files(bootable.kernels_of(arch)[wanted], make=True)
        return _in(*os.path.split(path), initrd)
    paths = found_before.find(f"{PREFIX}{wanted}")
    if paths is None or len(paths) != 4:
        folders = built.folders([f"kernel-{wanted}", f"initramfs-{wanted}"], make=True)
        paths = list(_in(folders[0], "vmlinux")[:3])
        paths.append(os.path.join(folders[1], "initramfs.cpio"))
        found_before.remember(f"{PREFIX}{wanted}", paths)
    return Found(*paths)


def _fetch(name: str, wanted: str, version: str, place: str, *, refresh: bool, arch: str) -> None:
    progress = Progress()
    with cache.building(progress.waiting):
        if os.path.isdir(place) and not refresh:
            return  # Somebody was quicker.
        work = builder.Builder(builder.Catalogue(), progress)
        client, pins = _search(name, wanted, version, work, arch)
        with cache.new_folder(place) as into:
            kernel.build(name, pins, client, into, progress, is_foreign=bool(arch))
            with open(os.path.join(into, "packages"), "w", encoding="utf-8") as file:
                file.writelines(f"{' '.join(pin)}\n" for pin in pins)


def _search(
    name: str, wanted: str, version: str, work: builder.Builder, arch: str
) -> tuple[apt.Apt, list[Pin]]:
    """The release that has the kernel, and its packages. Raises ConfigError if nobody has it."""
    seen: list[str] = []
    package = _PACKAGES[arch]
    for release, client in _clients(wanted, work, arch):
        if version:
            pin = client.lookup([(package, version)]).get(package)
        else:
            pin = client.newest(package, release)
        if pin is None:
            continue
        if wanted in _SUITES or f"{pin.version}.".startswith((f"{wanted}.", f"{wanted}-")):
            return client, client.kernel(pin)
        seen.append(f"{release} {pin.version}")
    there = f"there are {', '.join(seen)}" if seen else USE
    what = f"{name.removeprefix(PREFIX)}{f' for {arch}' if arch else ''}"
    raise ConfigError(f"the mirror has no kernel {what}", cure=there, option="--kernel")


def _clients(wanted: str, work: builder.Builder, arch: str = "") -> Iterator[tuple[str, apt.Apt]]:
    for release, suites in _SUITES.items():
        if wanted == release or wanted not in _SUITES:
            yield release, work.client(suites or work.suites, arch or "amd64")
