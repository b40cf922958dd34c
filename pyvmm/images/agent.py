"""The guest's agent, in C, compiled into a static program that runs in any guest.

musl instead of Debian's usual C library: the program is 100 KiB and not 800, runs where there is no
other file (its getpwnam reads /etc/passwd and loads nothing), and its licence (MIT) asks nothing of
whoever passes an image on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pyvmm.images import tools
from pyvmm.images.progress import Progress
from pyvmm.images.recipes import Recipes

FILE = "pyvmm-agent"
FOLDER = "agent"
HEADERS = ("agent.h", "command.h")
SOURCES = ("pyvmm-agent.c", "frames.c", "launch.c", "command.c", "files.c", "machine.c")
WARNINGS = (
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wformat=2",
    "-Wconversion",
    "-Wshadow",
    "-Wmissing-prototypes",
)
FLAGS = ("-std=gnu11", "-O2", *WARNINGS, "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong")
# musl-gcc finds musl's headers only; the kernel's come after them.
_KERNEL_HEADERS = ("-idirafter", "/usr/include", "-idirafter", "/usr/include/x86_64-linux-gnu")
# Without -pie: musl-gcc knows no static one.
LINKING = ("-static", "-Wl,-z,relro,-z,now", "-s")


def build(recipes: Recipes, into: str, progress: Progress) -> None:
    """Write `into`/pyvmm-agent. Raises ConfigError."""
    sources = [recipes.file(FOLDER, source) for source in SOURCES]
    with progress.step("agent: compiling (musl-gcc)"):
        compile_static(sources, os.path.join(into, FILE), "compiling the guest's agent")


def compile_static(sources: Sequence[str], target: str, what: str) -> None:
    """Make the static program `target` of C files; `what` is for messages. Raises ConfigError."""
    command = ["musl-gcc", *FLAGS, *_KERNEL_HEADERS, *LINKING, "-o", target, *sources]
    tools.run(command, what)
    os.chmod(target, 0o755)


def read(folder: str) -> bytes:
    """The program, of the image in `folder`."""
    with open(os.path.join(folder, FILE), "rb") as file:
        return file.read()
