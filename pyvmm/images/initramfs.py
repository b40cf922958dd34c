"""The guest's initramfs: a static busybox, the init script and its helpers, and the modules that
these may load.

It is not compressed: it is 4 MB, and under emulation the kernel takes longer to unpack it than the
monitor takes to read it. But while it is unpacked a guest has it twice in its memory, so the
modules of devices that few guests have are (decision 0530).
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator, Mapping, Sequence

from pyvmm.host import cpio
from pyvmm.images import agent as agent_program
from pyvmm.images import apt, cache, module_file, tools
from pyvmm.images.agent import Toolchain
from pyvmm.images.lock import Pin
from pyvmm.images.modules import ModuleTree
from pyvmm.images.progress import Progress
from pyvmm.images.recipes import InitramfsRecipe, KernelRecipe, Recipes

FILE = "initramfs.cpio"
HELPERS = ("find-root", "load-drivers")  # one program: it is whichever it is called by
SOURCES = (
    ("initramfs", "init"),
    ("initramfs", "shared-root"),
    ("initramfs", "helpers.h"),
    ("initramfs", "helpers.c"),
    *(("initramfs", f"{helper}.c") for helper in HELPERS),
    ("rootfs", "pyvmm-network"),
)
_HELPERS_FILE = "pyvmm-helpers"
_FOLDERS = ("bin", "dev", "modules", "proc", "root", "sys")


def build(
    name: str,
    recipes: Recipes,
    kernel: KernelRecipe | None,
    modules: str | None,
    agent: bytes,
    pin: Pin,
    client: apt.Apt,
    into: str,
    progress: Progress,
    toolchain: Toolchain | None,
) -> None:
    """Write `into`/initramfs.cpio for `kernel`, whose module folder is `modules`, with the program
    `agent` in it; without modules for None. What we compile ourselves is missing where there is no
    `toolchain` for it."""
    with cache.workspace() as room:
        with progress.step(f"{name}: fetching {pin.package} {pin.version}"):
            package = client.download(pin, room)
            tools.run(["dpkg-deb", "-x", package, room], "cannot unpack busybox")
        programs = {
            "bin/busybox": _read(_busybox(room)),
            "init": _read(recipes.file("initramfs", "init")),
            "shared-root": _read(recipes.file("initramfs", "shared-root")),
            "bin/pyvmm-network": _read(recipes.file("rootfs", "pyvmm-network")),
        }
        if toolchain is not None:
            programs["bin/pyvmm-agent"] = agent
            what = f"{name}: compiling {' and '.join(HELPERS)} ({toolchain.name})"
            with progress.step(what):
                target = compile_helpers(recipes, room, toolchain)
            programs[f"bin/{_HELPERS_FILE}"] = _read(target)
    with progress.step(f"{name}: writing the archive"):
        tree = None if modules is None else ModuleTree(modules)
        content = cpio.archive(entries(recipes.initramfs.for_kernel(kernel), tree, programs))
        with open(os.path.join(into, FILE), "wb") as file:
            file.write(content)


def base(arch: str) -> str:
    """The image without any modules, which `fresh_initramfs` puts behind it, for guests of `arch`;
    "" is this machine's."""
    return f"initramfs-base-{arch}" if arch else "initramfs-base"


def _busybox(root: str) -> str:
    """Its place in an unpacked package: in /usr since trixie."""
    places = [os.path.join(root, folder, "busybox") for folder in ("bin", "usr/bin")]
    return next(filter(os.path.exists, places), places[0])


def compile_helpers(
    recipes: Recipes, folder: str, toolchain: Toolchain = agent_program.NATIVE
) -> str:
    """Make the program that is all of `HELPERS`, in `folder`, with a link by the name of each; its
    path. Raises ConfigError."""
    target = os.path.join(folder, _HELPERS_FILE)
    names = ("helpers", *HELPERS)
    sources = [recipes.file("initramfs", f"{name}.c") for name in names]
    agent_program.compile_static(sources, target, "compiling the initramfs's programs", toolchain)
    for name in HELPERS:
        os.symlink(_HELPERS_FILE, os.path.join(folder, name))
    return target


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def entries(
    recipe: InitramfsRecipe, modules: ModuleTree | None, programs: Mapping[str, bytes]
) -> Iterator[cpio.Entry]:
    """The archive's files: `programs` by their paths, the other names of busybox and our helpers,
    and the modules, if there are any."""
    for folder in _FOLDERS:
        yield cpio.directory(folder)
    yield cpio.character_device("dev/console", 5, 1)  # where init's output goes before devtmpfs
    for path, content in programs.items():
        yield cpio.regular(path, content, 0o755)
    for applet in recipe.applets:
        yield cpio.symlink(f"bin/{applet}", "busybox")
    if f"bin/{_HELPERS_FILE}" in programs:
        for helper in HELPERS:
            yield cpio.symlink(f"bin/{helper}", _HELPERS_FILE)
    if modules is not None:
        yield from module_entries(recipe.modules, modules, recipe.compressed)


def module_entries(
    lists: Mapping[str, Sequence[str]], modules: ModuleTree, compressed: Sequence[str] = ()
) -> Iterator[cpio.Entry]:
    """The files of modules: `modules/LIST` names those of a list in their loading order. A module
    that only lists named in `compressed` have is a .ko.gz. What only a debugger reads is left out.
    Raises ConfigError for one that is not there."""
    orders = {name: modules.load_order(wanted) for name, wanted in lists.items()}
    for name, order in orders.items():
        yield cpio.regular(f"modules/{name}", "".join(f"{module}\n" for module in order).encode())
    plain = {one for name, order in orders.items() if name not in compressed for one in order}
    for module in dict.fromkeys(module for order in orders.values() for module in order):
        content = module_file.for_loading(modules.contents(module))
        if module in plain:
            yield cpio.regular(f"modules/{module}.ko", content)
        else:
            # With level 9 the types that BPF reads take 15 times as long, at each start of a tree.
            yield cpio.regular(f"modules/{module}.ko.gz", gzip.compress(content, 6, mtime=0))
