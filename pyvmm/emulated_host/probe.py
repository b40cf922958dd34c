"""The needs that an emulated KVM host has of this machine, and checks that they are met."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from pyvmm.emulated_host.find import BUSYBOX_CURE, find_image
from pyvmm.emulated_host.launch import SETPRIV_CURE
from pyvmm.emulated_host.limits import available_mib
from pyvmm.emulated_host.spec import OWN_MEMORY_MIB, HostImage
from pyvmm.errors import ConfigError
from pyvmm.host.programs import find_program

_DEVICES = ("virtio-9p-pci", "virtio-serial-pci", "virtserialport", "virtio-blk-pci")
_SMALLEST_GUEST_MIB = 128
_REBUILD = "remove the folder of programs-emulator (`pyvmm image list --all`); it is made anew"


class Check(NamedTuple):
    """One thing that was looked at: what was found, whether it will do, and what helps if not."""

    name: str
    ok: bool
    found: str
    cure: str = ""


def probe() -> list[Check]:
    """Everything that an emulated host needs, found or not. It takes about 0.3 s."""
    return [
        _check_program("setpriv", SETPRIV_CURE),
        _check_program("busybox", BUSYBOX_CURE),
        *_check_image(),
        _check_memory(),
    ]


def _check_image() -> Iterator[Check]:
    try:
        image = find_image()
    except ConfigError as error:
        yield Check("QEMU and kernel", False, error.message, error.cure)
        return
    yield from check_qemu(image)
    yield Check("kernel", True, image.kernel)


def check_qemu(image: HostImage) -> Iterator[Check]:
    """Check that the image's QEMU runs here and has all that is asked of it."""
    version = _output(*image.qemu, "--version").partition("\n")[0]
    yield Check("QEMU", bool(version), version or "does not run", _REBUILD)
    # Not "-device help": that loads every module that lies in /usr/lib/qemu, of whatever version.
    missing = [name for name in _DEVICES if not _output(*image.qemu, "-device", f"{name},help")]
    found = f"lacks {', '.join(missing)}" if missing else "9p, serial ports, disks"
    yield Check("QEMU's devices", not missing, found, _REBUILD)
    models = _output(*image.qemu, "-accel", "tcg", "-cpu", "help")
    yield Check("QEMU's AMD SVM", "svm" in models.split(), "emulated by TCG", _REBUILD)


def _check_program(name: str, cure: str) -> Check:
    path = find_program(name)
    return Check(name, path is not None, path or "not found", cure)


def _check_memory() -> Check:
    available = available_mib()
    needed = OWN_MEMORY_MIB + _SMALLEST_GUEST_MIB
    found = "unknown" if available is None else f"{available} MiB to give"
    ok = available is None or available >= needed
    return Check("memory", ok, found, f"free {needed} MiB")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
