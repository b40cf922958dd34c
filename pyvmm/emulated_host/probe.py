"""What an emulated KVM host needs of this machine, and whether it is there."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from pyvmm.emulated_host.find import BUSYBOX_CURE, find_image
from pyvmm.emulated_host.launch import QEMU_CURE, SETPRIV_CURE
from pyvmm.emulated_host.limits import available_mib
from pyvmm.emulated_host.programs import find_program
from pyvmm.emulated_host.spec import OWN_MEMORY_MIB, EmulatedHostSpec
from pyvmm.errors import ConfigError

_OLDEST_QEMU = (7, 2)
_DEVICES = ("virtio-9p-pci", "virtio-serial-pci", "virtserialport", "virtio-blk-pci")
_SMALLEST_GUEST_MIB = 128


class Check(NamedTuple):
    """One thing that was looked at: what was found, whether it will do, and what helps if not."""

    name: str
    ok: bool
    found: str
    cure: str = ""


def probe(qemu: str = EmulatedHostSpec.qemu) -> list[Check]:
    """Everything that an emulated host needs, found or not. It takes about 0.3 s."""
    return [
        *_check_qemu(qemu),
        _check_program("setpriv", SETPRIV_CURE),
        _check_program("busybox", BUSYBOX_CURE),
        _check_image(),
        _check_memory(),
    ]


def _check_qemu(name: str) -> Iterator[Check]:
    path = find_program(name)
    if path is None:
        yield Check(name, False, "not found", QEMU_CURE)
        return
    version = _version(_output(path, "--version"))
    text = ".".join(map(str, version)) or "of unknown version"
    yield Check(name, version >= _OLDEST_QEMU, f"{path}, {text}", "QEMU 7.2 or newer is needed")
    devices = _output(path, "-device", "help")
    missing = [device for device in _DEVICES if f'"{device}"' not in devices]
    found = f"lacks {', '.join(missing)}" if missing else "9p, serial ports, disks"
    yield Check("QEMU's devices", not missing, found, QEMU_CURE)
    models = _output(path, "-accel", "tcg", "-cpu", "help")
    yield Check("QEMU's AMD SVM", "svm" in models.split(), "emulated by TCG", QEMU_CURE)


def _check_program(name: str, cure: str) -> Check:
    path = find_program(name)
    return Check(name, path is not None, path or "not found", cure)


def _check_image() -> Check:
    try:
        image = find_image()
    except ConfigError as error:
        return Check("emulated host's kernel", False, error.message, error.cure)
    return Check("emulated host's kernel", True, image.kernel)


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


def _version(text: str) -> tuple[int, ...]:
    """(7, 2, 22) out of "QEMU emulator version 7.2.22 (Debian …)"; () if there is no version."""
    words = text.split()
    if "version" not in words[:-1]:
        return ()
    numbers = words[words.index("version") + 1].split(".")
    return tuple(int(number) for number in numbers if number.isdigit())
