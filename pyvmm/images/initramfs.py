"""The guest's initramfs: a static busybox, the init script and its helpers, and the modules that
these may load.

It is not compressed: it is 3 MB, and under emulation the kernel takes longer to unpack it than the
monitor takes to read it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from pyvmm.host import cpio
from pyvmm.images import agent as agent_program
from pyvmm.images import apt, cache, tools
from pyvmm.images.agent import Toolchain
from pyvmm.images.lock import Pin
from pyvmm.images.modules import ModuleTree
from pyvmm.images.progress import Progress
from pyvmm.images.recipes import InitramfsRecipe, KernelRecipe, Recipes

FILE = "initramfs.cpio"
BASE = "initramfs-base"  # the image without any modules; `fresh_initramfs` puts them behind it
HELPERS = ("find-root", "load-drivers")  # each of one C file
SOURCES = (
    ("initramfs", "init"),
    ("initramfs", "shared-root"),
    *(("initramfs", f"{helper}.c") for helper in HELPERS),
    ("rootfs", "pyvmm-network"),
)
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
            for helper in HELPERS:
                target = os.path.join(room, helper)
                with progress.step(f"{name}: compiling {helper} ({toolchain.name})"):
                    compile_helper(recipes, helper, target, toolchain)
                programs[f"bin/{helper}"] = _read(target)
    with progress.step(f"{name}: writing the archive"):
        tree = None if modules is None else ModuleTree(modules)
        content = cpio.archive(entries(recipes.initramfs.for_kernel(kernel), tree, programs))
        with open(os.path.join(into, FILE), "wb") as file:
            file.write(content)


def _busybox(root: str) -> str:
    """Its place in an unpacked package: in /usr since trixie."""
    places = [os.path.join(root, folder, "busybox") for folder in ("bin", "usr/bin")]
    return next(filter(os.path.exists, places), places[0])


def compile_helper(
    recipes: Recipes, name: str, target: str, toolchain: Toolchain = agent_program.NATIVE
) -> None:
    """Make `target`, the program of `HELPERS` that is called `name`. Raises ConfigError."""
    source = recipes.file("initramfs", f"{name}.c")
    agent_program.compile_static([source], target, f"compiling {name}", toolchain)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def entries(
    recipe: InitramfsRecipe, modules: ModuleTree | None, programs: Mapping[str, bytes]
) -> Iterator[cpio.Entry]:
    """The archive's files: `programs` by their paths, busybox's applets, and the modules, if there
    are any."""
    for folder in _FOLDERS:
        yield cpio.directory(folder)
    yield cpio.character_device("dev/console", 5, 1)  # where init's output goes before devtmpfs
    for path, content in programs.items():
        yield cpio.regular(path, content, 0o755)
    for applet in recipe.applets:
        yield cpio.symlink(f"bin/{applet}", "busybox")
    if modules is not None:
        yield from module_entries(recipe.modules, modules)


def module_entries(lists: Mapping[str, Sequence[str]], modules: ModuleTree) -> Iterator[cpio.Entry]:
    """The files of modules: `modules/LIST` names those of a list in their loading order. Raises
    ConfigError for one that is not there."""
    orders = {name: modules.load_order(wanted) for name, wanted in lists.items()}
    for name, order in orders.items():
        yield cpio.regular(f"modules/{name}", "".join(f"{module}\n" for module in order).encode())
    for module in dict.fromkeys(module for order in orders.values() for module in order):
        yield cpio.regular(f"modules/{module}.ko", modules.contents(module))
