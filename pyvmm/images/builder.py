"""The images, what each is made from, and how missing ones get made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property

from pyvmm.errors import ConfigError
from pyvmm.host import user_cache
from pyvmm.images import (
    agent,
    apt,
    cache,
    foreign_rootfs,
    initramfs,
    kernel,
    lock,
    programs,
    recipes,
    rootfs,
)
from pyvmm.images.lock import Pin
from pyvmm.images.patches import mend
from pyvmm.images.progress import Progress

_SUPERSEDED = "{}: some pinned versions are no longer on the mirror; using what it has"
_ROOTFS_SCRIPTS = (
    *("pyvmm-init", "pyvmm-network", "pyvmm-network.service", "pyvmm-agent.service"),
    "customize",
)
_MUSL = "musl-"  # the programs that have the C library of agents for another architecture
_VERSION = 1  # part of every image's key: count up when the code makes an image differently


class Catalogue:
    """The images the recipes describe, by name: agent, kernel-6.1, initramfs-6.1, rootfs-minbase …

    An image's key is a hash over its recipe, its pins, the scripts in it and the images it is
    made from.
    """

    def __init__(self, where: str | None = None) -> None:
        self.recipes = recipes.load(where)
        self.lock = lock.read(self.recipes.lock_file)

    def names(self) -> list[str]:
        """All of them; an image comes after those it is made from."""
        return [
            "agent",
            *(f"kernel-{name}" for name in self.recipes.kernels),
            *(f"programs-{name}" for name in self.recipes.programs),
            *(f"agent-{name}" for name in self.recipes.agents),
            *map(initramfs.base, ("", *self.recipes.agents)),
            *(f"initramfs-{name}" for name in self.recipes.booted_kernels),
            *(f"rootfs-{name}" for name in self.recipes.rootfs),
        ]

    def path(self, name: str) -> str:
        """The image's folder in the cache, there or not. Raises ConfigError for an unknown name."""
        return cache.image(name, self.key(name))

    def needs(self, name: str) -> list[str]:
        """The inputs that it is made from, and what these are made from."""
        kind, _, which = name.partition("-")
        if kind == "agent":
            return [f"programs-{_MUSL}{which}"] if which else []
        if kind == "rootfs":
            return self.needs_of_rootfs(self.recipes.rootfs[which].architecture)
        if kind != "initramfs":
            return []
        kernel = self.kernel_of(name)
        own = self._compiled(kernel.architecture) if kernel is not None else ["agent"]
        # A foreign one without an agent is still made anew with ours.
        below = [f"kernel-{which}"] if which in self.recipes.kernels else []
        return [*(own or ["agent"]), *below]

    def needs_of_rootfs(self, architecture: str) -> list[str]:
        """What a root disk for `architecture` is made from."""
        found = self._compiled(architecture)
        if architecture == "amd64":
            return found
        # The machine in which its packages are configured.
        machine = (f"programs-emulator-{architecture}", f"kernel-{architecture}")
        return [*found, *machine, f"initramfs-{architecture}"]

    def _compiled(self, architecture: str) -> list[str]:
        """The guest's agent and what it is made from; none where there is no compiler."""
        if architecture == "amd64":
            return ["agent"]
        name = f"agent-{architecture}"
        return [*self.needs(name), name] if architecture in self.recipes.agents else []

    def toolchain(self, architecture: str) -> agent.Toolchain | None:
        """The compiler for guests of `architecture`; None where there is none."""
        if architecture == "amd64":
            return agent.NATIVE
        if architecture not in self.recipes.agents:
            return None
        musl = os.path.join(self.path(f"programs-{_MUSL}{architecture}"), "root")
        return agent.Toolchain(architecture, musl)

    def key(self, name: str) -> str:
        kind, which = self._split(name)
        parts: list[object] = [_VERSION, name, self.pins(name)]
        # Not the machine in which packages are configured: it leaves nothing in them.
        architecture = self.recipes.rootfs[which].architecture if kind == "rootfs" else ""
        of_it = self._compiled(architecture) if architecture else self.needs(name)
        parts += [self.key(need) for need in of_it]
        if kind == "agent":
            parts += [*agent.FLAGS, *agent.LINKING]
            files = (*agent.HEADERS, *agent.SOURCES)
            parts += [self._script(agent.FOLDER, file) for file in files]
        elif kind == "kernel":
            parts.append(self.recipes.kernels[which].stated())
        elif kind == "programs":
            parts.append(self.recipes.programs[which].stated())
        elif kind == "initramfs":
            recipe = self.recipes.initramfs.for_kernel(self.recipes.kernels.get(which))
            parts += [asdict(recipe), *agent.FLAGS, *agent.LINKING]
            parts += [self._script(*names) for names in initramfs.SOURCES]
        else:
            recipe_of_root = self.recipes.rootfs[which]
            parts += [self.recipes.release, recipe_of_root.stated()]
            parts += [self._script("rootfs", file) for file in _ROOTFS_SCRIPTS]
            if recipe_of_root.is_foreign:
                parts.append(self._script("rootfs", foreign_rootfs.SCRIPT))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def pins(self, name: str) -> list[Pin]:
        return self.lock.get(self.lock_name(name), [])

    def lock_name(self, name: str) -> str:
        """Under which name the lock file has the image's packages: all initramfs of one
        architecture share a busybox."""
        kernel = self.kernel_of(name)
        is_foreign = kernel is not None and kernel.is_foreign
        return "initramfs" if name.startswith("initramfs-") and not is_foreign else name

    def kernel_of(self, name: str) -> recipes.KernelRecipe | None:
        """The recipe of the kernel that the image is, or is made for; None for neither. An
        initramfs without modules for another architecture may be any kernel's of that."""
        kind, _, which = name.partition("-")
        if kind == "initramfs":
            which = which.removeprefix("base-")
        return self.recipes.kernels.get(which) if kind in ("kernel", "initramfs") else None

    def at_once(self) -> list[str]:
        """Those that are built where all are asked for."""
        disks, programs = self.recipes.rootfs.items(), self.recipes.programs.items()
        later = {f"rootfs-{name}" for name, one in disks if one.only_by_name}
        later |= {f"programs-{name}" for name, one in programs if one.only_by_name}
        return [name for name in self.names() if name not in later]

    def is_optional(self, name: str) -> bool:
        """True if the image may be missing where all of them are built."""
        kind, _, which = name.partition("-")
        if kind == "programs":
            programs = self.recipes.programs[which]
            return programs.optional or programs.only_by_name
        if kind == "rootfs":
            return self.recipes.rootfs[which].only_by_name
        if kind == "agent":
            return bool(which)
        kernel = self.kernel_of(name)
        return kernel is not None and kernel.optional

    def _split(self, name: str) -> tuple[str, str]:
        if name not in self.names():
            known = ", ".join(self.names())
            raise ConfigError(f"there is no image {name!r}", cure=f"there are {known}")
        kind, _, which = name.partition("-")
        return kind, which

    def _script(self, *names: str) -> str:
        with open(self.recipes.file(*names), encoding="utf-8") as file:
            return file.read()


def missing(catalogue: Catalogue, names: Iterable[str]) -> list[str]:
    """Those of `names`, and of what they are made from, that are not in the cache, in order."""
    wanted = {
        need: catalogue.path(need) for name in names for need in (*catalogue.needs(name), name)
    }
    return [
        name for name in catalogue.names() if name in wanted and not os.path.isdir(wanted[name])
    ]


def build(
    catalogue: Catalogue,
    names: Sequence[str],
    progress: Progress,
    *,
    locked: bool = False,
    spare: bool = False,
) -> None:
    """Make those of `names` that are not in the cache. Raises ConfigError.

    `locked` makes it an error when the mirror no longer has a pinned version; otherwise what it
    has is taken, and said. With `spare` an optional image that cannot be made is left out, with
    those that are made from it, and that is said too.
    """
    if not missing(catalogue, names):
        return
    with cache.building(progress.waiting):
        todo = missing(catalogue, names)
        if not todo:
            return
        builder = Builder(catalogue, progress, locked=locked)
        left_out: set[str] = set()
        for name in todo:
            if not left_out.isdisjoint(catalogue.needs(name)):
                left_out.add(name)
                continue
            try:
                builder.build(name)
            except ConfigError as error:
                if not (spare and catalogue.is_optional(name)):
                    raise
                progress.notice(f"{name} is left out: {error}")
                left_out.add(name)


class Builder:
    """Makes images; the cache's lock is held by the caller."""

    def __init__(self, catalogue: Catalogue, progress: Progress, *, locked: bool = False) -> None:
        self._catalogue = catalogue
        self._recipes = catalogue.recipes
        self._progress = progress
        self._locked = locked
        self._clients: dict[str, apt.Apt] = {}
        cache.require_room()

    @cached_property
    def _apt(self) -> apt.Apt:
        """apt for the guests' release; its lists are fetched when it is first wanted."""
        client = apt.Apt(os.path.join(user_cache.folder(), "apt"), self._recipes.suites)
        step = self._progress.step("fetching Debian's package lists")
        with cache.explain_os_errors(), step:
            client.update()
        return client

    @property
    def suites(self) -> Sequence[str]:
        """Of the guests' release."""
        return self._recipes.suites

    def build(self, name: str) -> None:
        catalogue = self._catalogue
        cache.require_room()
        with cache.new_image(name, catalogue.key(name)) as into:
            if name.partition("-")[0] == "agent":
                toolchain = catalogue.toolchain(name.partition("-")[2] or "amd64")
                assert toolchain is not None
                agent.build(name, self._recipes, into, self._progress, toolchain)
                packages = []
            elif name.startswith("rootfs-"):
                packages = self._build_rootfs(name, into)
            elif name.startswith("programs-"):
                packages = self._build_programs(name, into)
            else:
                packages = self._build_from_packages(name, into)
            with open(os.path.join(into, "packages"), "w", encoding="utf-8") as file:
                file.writelines(f"{package} {version}\n" for package, version in packages)

    def current(self, name: str) -> list[Pin]:
        """The image's packages as the mirror has them now, to be pinned."""
        if name.startswith("programs-"):
            return self._newest_programs(name)
        if not name.startswith("rootfs-"):
            return self._newest(name)
        recipe = self._recipes.rootfs[name.removeprefix("rootfs-")]
        if recipe.is_foreign:
            client = self._client_of_rootfs(name)
            return client.minbase(recipe.packages, self._recipes.release)
        with cache.workspace() as room:
            packages = self._make_rootfs(name, [], room)
        found = self._apt.lookup(packages)
        return [found[package] for package, _ in packages]

    def _build_programs(self, name: str, into: str) -> list[tuple[str, str]]:
        pins = self._catalogue.pins(name)
        recipe = self._recipes.programs[name.removeprefix("programs-")]
        client = self.client(recipe.suites, recipe.architecture)
        if not apt.usable(client, name, pins, locked=self._locked):
            if pins:
                self._progress.notice(_SUPERSEDED.format(name))
            pins = self._newest_programs(name)
        programs.build(name, pins, client, into, self._progress)
        mend(os.path.join(into, "root"), recipe.patches, pins, self._progress)
        return [(pin.package, pin.version) for pin in pins]

    def _newest_programs(self, name: str) -> list[Pin]:
        recipe = self._recipes.programs[name.removeprefix("programs-")]
        client = self.client(recipe.suites, recipe.architecture)
        if recipe.alone:
            return [client.newest(package, recipe.suites[-1]) for package in recipe.packages]
        return client.closure(recipe.packages)

    def client(self, suites: Sequence[str], architecture: str = "amd64") -> apt.Apt:
        """apt for `suites`, its lists fetched."""
        is_native = architecture == "amd64"
        if is_native and tuple(suites) == tuple(self._recipes.suites):
            return self._apt
        name = f"apt-{'+'.join(suites)}" + ("" if is_native else f"-{architecture}")
        folder = os.path.join(user_cache.folder(), name)
        if folder not in self._clients:
            client = apt.Apt(folder, suites, architecture)
            of = "" if is_native else f" of {architecture}"
            step = self._progress.step(f"fetching {suites[0]}'s package lists{of}")
            with cache.explain_os_errors(), step:
                client.update()
            self._clients[folder] = client
        return self._clients[folder]

    def _client_of(self, kernel: recipes.KernelRecipe) -> apt.Apt:
        return self.client(kernel.suites or self._recipes.suites, kernel.architecture)

    def _client_for(self, name: str) -> apt.Apt:
        """The one for the package of a kernel or an initramfs: busybox is from the guests' release
        unless the kernel is foreign."""
        kernel = self._catalogue.kernel_of(name)
        if kernel is not None and (name.startswith("kernel-") or kernel.is_foreign):
            return self._client_of(kernel)
        return self._apt

    def _build_from_packages(self, name: str, into: str) -> list[tuple[str, str]]:
        pins = self._choose(name)
        client = self._client_for(name)
        recipe = self._catalogue.kernel_of(name)
        if recipe is not None and name.startswith("kernel-"):
            foreign = recipe.is_foreign
            kernel.build(name, pins, client, into, self._progress, is_foreign=foreign)
            mend(into, recipe.patches, pins, self._progress)
        else:
            which = name.removeprefix("initramfs-")
            has_modules = which in self._recipes.kernels
            below = self._catalogue.path(f"kernel-{which}") if has_modules else ""
            modules = kernel.modules_folder(below) if has_modules else None
            architecture = "amd64" if recipe is None else recipe.architecture
            toolchain = self._catalogue.toolchain(architecture)
            program = b"" if toolchain is None else self._agent_program(architecture)
            under = recipe if has_modules else None
            initramfs.build(
                *(name, self._recipes, under, modules, program, pins[0]),
                *(client, into, self._progress, toolchain),
            )
        return [(pin.package, pin.version) for pin in pins]

    def _choose(self, name: str) -> list[Pin]:
        pins = self._catalogue.pins(name)
        if apt.usable(self._client_for(name), name, pins, locked=self._locked):
            return pins
        found = self._newest(name)
        if pins:
            self._progress.notice(
                f"{name}: the pinned {pins[0].package} {pins[0].version} is no longer on the "
                f"mirror; using {found[0].package} {found[0].version}"
            )
        return found

    def _newest(self, name: str) -> list[Pin]:
        client = self._client_for(name)
        recipe = self._catalogue.kernel_of(name)
        if recipe is not None and name.startswith("kernel-"):
            newest = client.newest(recipe.package, recipe.suite)
            if not newest.version.startswith(recipe.series):
                raise ConfigError(f"{name}: {recipe.suite} has Linux {newest.version} by now")
            return client.kernel(newest)
        foreign = recipe is not None and recipe.is_foreign
        suite = recipe.suites[0] if recipe is not None and foreign else self._recipes.release
        return [client.newest(self._recipes.initramfs.busybox, suite)]

    def agent(self, architecture: str = "amd64") -> str:
        """The path of the guest's agent, which has been built."""
        name = "agent" if architecture == "amd64" else f"agent-{architecture}"
        return os.path.join(self._catalogue.path(name), agent.FILE)

    def _agent_program(self, architecture: str) -> bytes:
        return agent.read(os.path.dirname(self.agent(architecture)))

    def machine(self, architecture: str) -> foreign_rootfs.Machine | None:
        """The emulated machine in which packages of `architecture` are configured, which has been
        built; None for this machine's own."""
        if architecture == "amd64":
            return None
        kinds = ("programs-emulator", "kernel", "initramfs")
        emulator, below, archive = (self._catalogue.path(f"{one}-{architecture}") for one in kinds)
        return foreign_rootfs.Machine(
            tuple(programs.qemu_command(emulator, foreign_rootfs.QEMU[architecture])),
            os.path.join(below, "bzImage"),
            os.path.join(archive, initramfs.FILE),
        )

    def _client_of_rootfs(self, name: str) -> apt.Apt:
        recipe = self._recipes.rootfs[name.removeprefix("rootfs-")]
        return self.client(self.suites, recipe.architecture)

    def _make_rootfs(self, name: str, pins: Sequence[Pin], into: str) -> list[tuple[str, str]]:
        variant = name.removeprefix("rootfs-")
        architecture = self._recipes.rootfs[variant].architecture
        plan = rootfs.plan(variant, self._recipes, self.agent(architecture), pins)
        machine = self.machine(architecture)
        client = self._client_of_rootfs(name)
        return rootfs.build(plan, self._recipes, client, into, self._progress, machine)

    def _build_rootfs(self, name: str, into: str) -> list[tuple[str, str]]:
        pins = self._catalogue.pins(name)
        if not apt.usable(self._client_of_rootfs(name), name, pins, locked=self._locked):
            if pins:
                self._progress.notice(_SUPERSEDED.format(name))
            pins = []
        packages = self._make_rootfs(name, pins, into)
        if self._locked and sorted(packages) != sorted(pin[:2] for pin in pins):
            raise ConfigError(
                f"{name}: other packages than the pinned ones were installed",
                cure="refresh with: pyvmm image lock",
            )
        return packages


def refresh_lock(catalogue: Catalogue, progress: Progress) -> None:
    """Pin what the mirror has now, in the lock file."""
    with cache.building(progress.waiting):
        builder = Builder(catalogue, progress)
        fresh: lock.Lock = {}
        for name in catalogue.names():
            where = catalogue.lock_name(name)
            if name.partition("-")[0] == "agent" or where in fresh:
                continue
            try:
                fresh[where] = builder.current(name)
            except ConfigError as error:
                if not catalogue.is_optional(name):
                    raise
                progress.notice(f"{name} keeps its pins: {error}")
                fresh[where] = catalogue.pins(name)
    lock.write(catalogue.recipes.lock_file, fresh)
