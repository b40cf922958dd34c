"""The guest's agent, in C, compiled into a static program that runs in any guest.

musl instead of Debian's usual C library: the program is 100 KiB and not 800, runs where there is no
other file (its getpwnam reads /etc/passwd and loads nothing), and its licence (MIT) asks nothing of
whoever passes an image on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

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
_CROSS_COMPILERS = {"arm64": "aarch64-linux-gnu"}  # by Debian's name of the architecture
# Without -pie: musl-gcc knows no static one.
LINKING = ("-static", "-Wl,-z,relro,-z,now", "-s")


@dataclass(frozen=True)
class Toolchain:
    """The compiler of what runs in guests: musl-gcc, or for another `architecture` a cross compiler
    with the musl that is unpacked in the folder `musl`."""

    architecture: str = "amd64"
    musl: str = ""

    @property
    def name(self) -> str:
        """The compiler's program."""
        if self.architecture == "amd64":
            return "musl-gcc"
        return f"{_CROSS_COMPILERS[self.architecture]}-gcc"

    def command(self, sources: Sequence[str], target: str) -> list[str]:
        """The command line that makes the static program `target`. Raises ConfigError."""
        if self.architecture == "amd64":
            return [self.name, *FLAGS, *_KERNEL_HEADERS, *LINKING, "-o", target, *sources]
        triplet = _CROSS_COMPILERS[self.architecture]
        place = triplet.replace("-gnu", "-musl")
        headers, libraries = f"{self.musl}/usr/include/{place}", f"{self.musl}/usr/lib/{place}"
        own = tools.run([self.name, "-print-file-name=include"], self.name).strip()
        # What musl-gcc does by its specs file, which names places of an installed musl.
        return [
            *(self.name, *FLAGS, *LINKING, "-nostdinc", "-nostdlib"),
            *("-isystem", headers, "-isystem", own, "-idirafter", f"/usr/{triplet}/include"),
            *("-o", target, f"{libraries}/crt1.o", f"{libraries}/crti.o", *sources),
            *(f"-L{libraries}", "-lc", "-lgcc", "-lc", f"{libraries}/crtn.o"),
        ]


NATIVE = Toolchain()


def build(
    name: str, recipes: Recipes, into: str, progress: Progress, toolchain: Toolchain = NATIVE
) -> None:
    """Write `into`/pyvmm-agent, the image called `name`. Raises ConfigError."""
    sources = [recipes.file(FOLDER, source) for source in SOURCES]
    with progress.step(f"{name}: compiling ({toolchain.name})"):
        target = os.path.join(into, FILE)
        compile_static(sources, target, "compiling the guest's agent", toolchain)


def compile_static(
    sources: Sequence[str], target: str, what: str, toolchain: Toolchain = NATIVE
) -> None:
    """Make the static program `target` of C files; `what` is for messages. Raises ConfigError."""
    tools.run(toolchain.command(sources, target), what)
    os.chmod(target, 0o755)


def read(folder: str) -> bytes:
    """The program, of the image in `folder`."""
    with open(os.path.join(folder, FILE), "rb") as file:
        return file.read()
