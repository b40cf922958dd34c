"""The guest's initramfs: a static busybox, the init script, and the modules init may load.

It is not compressed: it is 3 MB, and under emulation the kernel takes longer to unpack it than the
monitor takes to read it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from pyvmm.host import cpio
from pyvmm.images import apt, cache, tools
from pyvmm.images.lock import Pin
from pyvmm.images.modules import ModuleTree
from pyvmm.images.progress import Progress
from pyvmm.images.recipes import InitramfsRecipe, Recipes

FILE = "initramfs.cpio"
_FOLDERS = ("bin", "dev", "modules", "proc", "root", "sys")


def build(
    name: str,
    recipes: Recipes,
    modules: str,
    agent: bytes,
    pin: Pin,
    client: apt.Apt,
    into: str,
    progress: Progress,
) -> None:
    """Write `into`/initramfs.cpio for the kernel whose module folder is `modules`, with the
    program `agent` in it."""
    with cache.workspace() as room:
        with progress.step(f"{name}: fetching {pin.package} {pin.version}"):
            package = client.download(pin, room)
            tools.run(["dpkg-deb", "-x", package, room], "cannot unpack busybox")
        with open(os.path.join(room, "bin", "busybox"), "rb") as file:
            busybox = file.read()
    with open(recipes.file("initramfs", "init"), "rb") as file:
        init = file.read()
    with progress.step(f"{name}: writing the archive"):
        tree = ModuleTree(modules)
        content = cpio.archive(entries(recipes.initramfs, tree, busybox, init, agent))
        with open(os.path.join(into, FILE), "wb") as file:
            file.write(content)


def entries(
    recipe: InitramfsRecipe, modules: ModuleTree, busybox: bytes, init: bytes, agent: bytes
) -> Iterator[cpio.Entry]:
    """The archive's files. `modules/LIST` names the modules of a list in their loading order."""
    for folder in _FOLDERS:
        yield cpio.directory(folder)
    yield cpio.character_device("dev/console", 5, 1)  # where init's output goes before devtmpfs
    yield cpio.regular("bin/busybox", busybox, 0o755)
    for applet in recipe.applets:
        yield cpio.symlink(f"bin/{applet}", "busybox")
    yield cpio.regular("init", init, 0o755)
    yield cpio.regular("bin/pyvmm-agent", agent, 0o755)
    orders = {name: modules.load_order(wanted) for name, wanted in recipe.modules.items()}
    for name, order in orders.items():
        yield cpio.regular(f"modules/{name}", "".join(f"{module}\n" for module in order).encode())
    for module in dict.fromkeys(module for order in orders.values() for module in order):
        yield cpio.regular(f"modules/{module}.ko", modules.contents(module))
