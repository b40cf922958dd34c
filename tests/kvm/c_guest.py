"""Guests without an operating system that are written in C, built for the tests that run them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pyvmm.machine.board.x86 import layout

_FLAGS = (
    *("cc", "-O1", "-static", "-nostdlib", "-ffreestanding", "-fno-pie", "-no-pie"),
    *("-mgeneral-regs-only", "-mno-red-zone", "-fno-stack-protector", "-fcf-protection=none"),
    *("-Wl,-Ttext=0x200000,-e,run,--build-id=none,-z,noseparate-code", "-Wall", "-Werror"),
)


def c_guest(source: str, folder: Path, *devices: str) -> str:
    """The kernel that is made of `source`, a file beside this one, in `folder`. `devices` are what
    it calls the addresses of the first virtio-mmio devices."""
    target = folder / Path(source).stem
    bases = (layout.VIRTIO_MMIO_BASE + n * layout.VIRTIO_MMIO_STRIDE for n in range(len(devices)))
    places = [f"-D{name}={base:#x}ull" for name, base in zip(devices, bases, strict=True)]
    path = Path(__file__).with_name(source)
    subprocess.run([*_FLAGS, *places, "-o", str(target), str(path)], check=True)
    return str(target)
