"""How a guest kernel is told where its virtio-mmio devices are: ACPI, its command line, or both.

docs/decisions/0050-virtio-discovery.md says why the rule is this one.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from pyvmm.boot import cmdline as command_line
from pyvmm.boot.image_file import ImageFile
from pyvmm.boot.x86.acpi import VirtioMmioDevice
from pyvmm.errors import ConfigError

AUTO, ACPI, CMDLINE, BOTH = CHOICES = ("auto", "acpi", "cmdline", "both")

_ACPI_ID = b"LNRO0005"  # in the driver's acpi_match_table
_PARAMETER = b"virtio_mmio.device"  # the name under which the built-in driver takes the parameter


def parameters(devices: Sequence[VirtioMmioDevice]) -> list[str]:
    """Command line parameters for `devices`, for a kernel with CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES.

    Linux drivers/virtio/virtio_mmio.c, "Module parameters": size@base:irq.
    """
    return [f"virtio_mmio.device={dev.size}@{dev.base:#x}:{dev.gsi}" for dev in devices]


def choose(wish: str, kernel: ImageFile, *, elf: bool, banner: str, cmdline: str) -> str:
    """`ACPI`, `CMDLINE` or `BOTH` for a kernel, from the user's `wish` and what is known of it.

    `banner` is the version text of a bzImage. Raises ConfigError for a wish that is not known.
    """
    if wish not in CHOICES:
        raise ConfigError(
            f"{wish!r} is no way to find virtio devices",
            cure="choose one of " + ", ".join(CHOICES),
            option="--virtio-discovery",
        )
    if wish != AUTO:
        return wish
    if _acpi_is_off(cmdline):
        return CMDLINE
    if elf:
        return _look_inside(kernel)
    # Debian's kernels never have CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES and would only complain of the
    # parameter. Of others nothing is known: what is in a bzImage is compressed.
    return ACPI if "debian" in banner.lower() else BOTH


def _acpi_is_off(cmdline: str) -> bool:
    return "acpi=off" in command_line.split(cmdline)


def _look_inside(kernel: ImageFile) -> str:
    with mmap.mmap(kernel.fd, 0, prot=mmap.PROT_READ) as content:
        if content.find(_ACPI_ID) >= 0:
            return ACPI
        # The driver is in the kernel and knows no ACPI; or it is a module, which may know either.
        return CMDLINE if content.find(_PARAMETER) >= 0 else BOTH
