"""The ways to tell a guest kernel of its virtio-mmio devices: ACPI, its command line, or both.

docs/decisions/0050-virtio-discovery.md says why the rule is this one.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyvmm.boot import cmdline as command_line
from pyvmm.boot.image_file import ImageFile
from pyvmm.boot.x86.acpi import VirtioMmioDevice
from pyvmm.errors import ConfigError

AUTO, ACPI, CMDLINE, BOTH = CHOICES = ("auto", "acpi", "cmdline", "both")

_ACPI_ID = b"LNRO0005"  # in the driver's acpi_match_table
_PARAMETER = b"virtio_mmio.device"  # the name under which the built-in driver takes the parameter
_DEBIAN = "debian-kernel@"  # in linux_banner, which says who built the kernel
_DEBIAN_BANNER = b"(debian-kernel@"
_CHUNK = 4 << 20
_OVERLAP = 64


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
            f"{wish!r} is not a way to find virtio devices",
            cure="choose one of " + ", ".join(CHOICES),
            option="--discovery",
        )
    if wish != AUTO:
        return wish
    if _acpi_is_off(cmdline):
        return CMDLINE
    if elf:
        return _look_inside(kernel)
    # Debian's kernels never have CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES and would only complain of the
    # parameter. Of others nothing is known: what is in a bzImage is compressed.
    return ACPI if _DEBIAN in banner else BOTH


def _acpi_is_off(cmdline: str) -> bool:
    return "acpi=off" in command_line.split(cmdline)


def _look_inside(kernel: ImageFile) -> str:
    """The facts that an uncompressed kernel tells of itself."""
    takes_parameter = False
    for offset in range(0, kernel.size, _CHUNK):
        chunk = kernel.read(offset, _CHUNK + _OVERLAP)
        if _ACPI_ID in chunk or _DEBIAN_BANNER in chunk:
            return ACPI
        takes_parameter = takes_parameter or _PARAMETER in chunk
    # Either the driver is in the kernel and knows no ACPI, or it is a module, of which nothing is
    # known here.
    return CMDLINE if takes_parameter else BOTH
