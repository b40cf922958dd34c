"""`pyvmm image build --from SOURCE NAME`: a Debian of one's own, or a saved container image."""

from __future__ import annotations

import os
import re
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.host import locks, user_cache
from pyvmm.images import bootable, builder, cache, machines, rootfs, user_image
from pyvmm.images.progress import Progress
from pyvmm.images.user_image import Process, UserImage

RELEASES = ("bookworm", "trixie", "sid")
SOURCES = "debian:bookworm|trixie|sid, oci-archive:FILE, docker-archive:FILE or oci:DIRECTORY"
_CONTAINERS = ("oci-archive", "docker-archive", "oci")
_MIB = 1 << 20
_SMALLEST, _LARGEST = 64 * _MIB, 16 << 40  # what mke2fs and ext4 can do
_DEBIAN_SIZE = 2048 * _MIB
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+([/=:][A-Za-z0-9+.:~-]+)?")


@dataclass(frozen=True)
class Order:
    """A request for an image. `source` is one of SOURCES; `size` in bytes, 0 for what is enough;
    `kernel` the name of a guest kernel. `packages`, `script` and `copies` (pairs of a path here
    and one in the image) are for Debian. `arch` is one of bootable.FOREIGN, whose kernel it then
    has, or ""."""

    name: str
    source: str
    packages: tuple[str, ...] = ()
    size: int = 0
    kernel: str = "6.1"
    script: str = ""
    copies: tuple[tuple[str, str], ...] = ()
    replace: bool = False
    arch: str = ""


class _Made(NamedTuple):
    """A source's part of the record."""

    made_from: str
    details: tuple[tuple[str, str], ...]
    cmdline: str = ""
    process: Process | None = None


def build(order: Order, progress: Progress) -> UserImage:
    """Make the image and put it in its place, the whole or nothing. Raises ConfigError."""
    catalogue = builder.Catalogue()
    _check(order, catalogue)
    if order.arch:
        order = replace(order, kernel=bootable.kernels_of(order.arch)[order.kernel])
    kind, _, rest = order.source.partition(":")
    make = _source(kind, rest, order)
    with cache.building(progress.waiting):
        _check_name_is_free(order)  # somebody may have been quicker
        needed = [f"kernel-{order.kernel}", f"initramfs-{order.kernel}"]
        needed += catalogue.needs_of_rootfs(order.arch or "amd64")
        if kind in _CONTAINERS:
            needed += ["programs-ext4", _busybox(order.arch)]
        work = builder.Builder(catalogue, progress)
        for name in builder.missing(catalogue, needed):
            work.build(name)
        with cache.new_folder(user_image.path(order.name)) as into:
            made = make(work, catalogue, into, progress)
            image = UserImage(
                name=order.name,
                made_from=made.made_from,
                made_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                kernel=order.kernel,
                cmdline=made.cmdline,
                has_agent=True,
                details=made.details,
                process=made.process,
            )
            user_image.write_record(image, into)
    return image


_Maker = Callable[[builder.Builder, builder.Catalogue, str, Progress], _Made]


def _source(kind: str, rest: str, order: Order) -> _Maker:
    if kind == "debian":
        if rest not in RELEASES:
            raise ConfigError(
                f"there is no Debian {rest!r} to build from",
                cure=f"choose from {', '.join(RELEASES)}",
                option="--from",
            )
        _check_files(order)
        return lambda *parts: _debian(order, rest, *parts)
    if kind not in _CONTAINERS:
        raise ConfigError(
            f"cannot build from {order.source!r:.120}", cure=f"use {SOURCES}", option="--from"
        )
    for given, option in (
        (order.packages, "--include"),
        (order.script, "--script"),
        (order.copies, "--copy"),
    ):
        if given:
            raise ConfigError(
                "is for Debian: a container image stays as it is",
                cure="leave it out",
                option=option,
            )
    from pyvmm.images.container import load

    path, name = load.split_source(kind, rest)
    return lambda *parts: _container(order, kind, path, name, *parts)


def _check(order: Order, catalogue: builder.Catalogue) -> None:
    user_image.check_name(order.name)
    if order.name in bootable.built_in() or order.name in catalogue.names():
        raise ConfigError(
            f"{order.name} is an image of pyvmm's own", cure="give yours another name"
        )
    if order.arch not in ("", *bootable.FOREIGN):
        raise ConfigError(
            f"there are no images for {order.arch!r:.40} beside this machine's",
            cure=f"choose from {', '.join(bootable.FOREIGN)}",
            option="--arch",
        )
    kernels = list(catalogue.recipes.guest_kernels)
    if order.arch:
        kernels = list(bootable.kernels_of(order.arch))
    if order.kernel not in kernels:
        raise ConfigError(
            f"there is no kernel {order.kernel!r}{f' for {order.arch}' if order.arch else ''}",
            cure=f"choose from {', '.join(kernels)}",
            option="--kernel",
        )
    for package in order.packages:
        if not _PACKAGE.fullmatch(package):
            raise ConfigError(f"no package is called {package!r:.100}", option="--include")
    if order.size and not _SMALLEST <= order.size <= _LARGEST:
        raise ConfigError(
            f"no root disk has {order.size} bytes", cure="use 64M to 16384G", option="--size"
        )
    _check_name_is_free(order)


def _check_files(order: Order) -> None:
    """Before minutes are spent on what they are for."""
    for source, _ in order.copies:
        if not os.path.lexists(source):
            raise ConfigError(f"there is no {source}", cure="check the path", option="--copy")
    if order.script and not os.path.isfile(order.script):
        raise ConfigError(f"there is no file {order.script}", option="--script")


def _check_name_is_free(order: Order) -> None:
    if not os.path.lexists(user_image.path(order.name)):
        return
    if not order.replace:
        raise ConfigError(
            f"there is an image called {order.name}",
            cure=f"give this one another name, or replace that one: --force (or pyvmm image rm "
            f"{order.name})",
        )


# --- Debian ---------------------------------------------------------------------------------------


def _debian(
    order: Order,
    release: str,
    work: builder.Builder,
    catalogue: builder.Catalogue,
    into: str,
    progress: Progress,
) -> _Made:
    suites = catalogue.recipes.suites
    if release != catalogue.recipes.release:
        updates = () if release == "sid" else (f"{release}-updates", f"{release}-security")
        suites = (release, *updates)
    packages = ("busybox-static", *order.packages)
    with cache.workspace() as room:
        plan = rootfs.Plan(
            name=order.name,
            release=release,
            packages=packages,
            size=(order.size or _DEBIAN_SIZE) // _MIB,
            variant="systemd" if "systemd-sysv" in packages else "own",
            agent=work.agent(order.arch or "amd64"),
            additions=_pack(order.copies, room),
            script=_own_copy(order.script, room),
            architecture=order.arch or "amd64",
        )
        installed = rootfs.build(
            *(plan, catalogue.recipes, work.client(suites, plan.architecture), into, progress),
            machine=work.machine(plan.architecture),
        )
    with open(os.path.join(into, "packages"), "w", encoding="utf-8") as file:
        file.writelines(f"{package} {version}\n" for package, version in installed)
    versions = dict(installed)
    details = [("packages", str(len(installed)))]
    details += [(package, versions[package]) for package in order.packages if package in versions]
    return _Made(order.source, tuple(details))


def _own_copy(script: str, room: str) -> str:
    """The path of a copy of `script` that mmdebstrap's hooks can name. Raises ConfigError."""
    if not script:
        return ""
    try:
        with open(script, "rb") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"{script}: {error.strerror}", option="--script") from None
    if not text.startswith(b"#!"):
        text = b"#!/bin/sh -eu\n" + text
    path = os.path.join(room, "script")
    with open(path, "wb") as file:
        file.write(text)
    return path


def _pack(copies: tuple[tuple[str, str], ...], room: str) -> str:
    """The path of a tar archive that puts the copies in their places, as root's. Raises
    ConfigError."""
    if not copies:
        return ""
    path = os.path.join(room, "additions.tar")
    os.chmod(room, 0o755)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for source, target in copies:
            try:
                archive.add(source, arcname=_place(source, target), filter=_as_roots)
            except OSError as error:
                raise ConfigError(
                    f"cannot read {error.filename or source}: {error.strerror}", option="--copy"
                ) from None
    return path


def _place(source: str, target: str) -> str:
    """The name in the archive: a file whose target ends with a slash goes into that directory."""
    name = target.strip("/")
    if target.endswith("/") and not os.path.isdir(source):
        name = os.path.join(name, os.path.basename(source))
    return name or "."


def _as_roots(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


# --- Containers -----------------------------------------------------------------------------------


def _container(
    order: Order,
    kind: str,
    path: str,
    name: str | None,
    work: builder.Builder,
    catalogue: builder.Catalogue,
    into: str,
    progress: Progress,
) -> _Made:
    from pyvmm.images.container import disk, guest, load, manifest, process

    with cache.workspace() as room:
        architecture = order.arch or manifest.NATIVE
        tree, image = load.load(kind, path, name, room, _room(order), progress, architecture)
        with load.named(path):
            runs = process.read(image.config, tree)
            guest.prepare(tree, runs, _programs(work, catalogue, order.arch), name=order.name)
            size = order.size or disk.size_for(tree)
            total = sum(node.size for _, node in tree.walk())
            with progress.bar(f"{order.name}: making the ext4 file system", total) as advance:
                tools_image = catalogue.path("programs-ext4")
                target = os.path.join(into, user_image.DISK)
                disk.make(tree, target, size, tools_image, advance)
        tree.spool.close()
    details = (("digest", image.digest), ("layers", str(len(image.layers))))
    return _Made(order.source, details, guest.CMDLINE, runs)


def _room(order: Order) -> int:
    """The bytes of files that there may be: as many as asked for, or a third of the room there is.

    They are written twice, into the spool and into the file system.
    """
    if order.size:
        return order.size
    status = os.statvfs(user_cache.folder())
    return min(status.f_bavail * status.f_frsize // 3, 64 << 30)


def _busybox(arch: str) -> str:
    """The image with the first program of a container's guest."""
    return f"programs-busybox-{arch}" if arch else "programs-busybox"


def _programs(work: builder.Builder, catalogue: builder.Catalogue, arch: str) -> dict[str, bytes]:
    """The guest's first programs, by name."""
    from pyvmm.images.container import guest

    busybox = os.path.join(catalogue.path(_busybox(arch)), "root", "bin", "busybox")
    scripts = {name: catalogue.recipes.file("rootfs", f"pyvmm-{name}") for name in guest.SCRIPTS}
    found = {}
    for name, path in {"busybox": busybox, "agent": work.agent(arch or "amd64"), **scripts}.items():
        with open(path, "rb") as file:
            found[name] = file.read()
    return found


# --- and away with them ---------------------------------------------------------------------------


def remove(name: str, running: Sequence[str], *, force: bool = False) -> None:
    """Remove a user's image. Raises ConfigError if VMs need it, unless `force`; those then cannot
    go on. `running` are the VMs that run now."""
    user_image.check_name(name)
    if not os.path.lexists(user_image.path(name)):
        own = name in bootable.built_in()
        cure = "pyvmm image prune removes what is out of use" if own else "see: pyvmm image list"
        what = "is one of pyvmm's own" if own else "is not there"
        raise ConfigError(f"the image {name} {what}", cure=cure)
    users = machines.using(name)
    if users and not force:
        alive = sorted(set(users) & set(running))
        what = (
            f"{', '.join(alive)} run on it" if alive else f"{', '.join(users)} keep changes to it"
        )
        raise ConfigError(
            f"the image {name} is in use: {what}",
            cure=f"first: pyvmm rm {' '.join(users)}; or use --force, and they cannot go on",
        )
    who = "" if force else _who_reads(os.path.join(user_image.path(name), user_image.DISK))
    if who:
        raise ConfigError(
            f"the image {name} is in use by {who}", cure="end that first, or use --force"
        )
    with cache.building(Progress().waiting):
        cache.remove(user_image.path(name))


def _who_reads(disk: str) -> str:
    """The process that has the disk open for a VM, such as one that keeps nothing; "" if none."""
    try:
        fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        free = locks.lock_image(fd, read_only=False)
        return "" if free else locks.holder(fd) or "another process"
    except locks.LocksUnsupported:
        return ""
    finally:
        os.close(fd)
