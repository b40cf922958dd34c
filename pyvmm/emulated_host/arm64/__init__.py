"""The arm64 emulated host: QEMU's machine `virt`, whose processor has EL2: KVM works in it."""

from __future__ import annotations

from pyvmm.errors import ConfigError

__all__ = [
    "GIC_VERSION",
    "KVM_MODULES",
    "ROOT_MODULES",
    "SAVES_STATE",
    "frequency_khz",
    "kernel_parameters",
    "machine_arguments",
    "vmlinux",
]

# Debian's kernel has KVM built in.
ROOT_MODULES: tuple[str, ...] = (
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_blk",
)
KVM_MODULES: tuple[str, ...] = ("tun", "vhost_net")

SAVES_STATE = False

GIC_VERSION = 3
"""Of the machine's interrupt controller, and of that which KVM then has for guests: 3 or 2."""

_KERNEL_PARAMETERS = " ".join(
    (
        "console=ttyAMA0 quiet panic=-1",
        # As on x86: translated code is used again, and there is no hardware whose flaws matter.
        "nokaslr norandmaps mitigations=off",
        "cryptomgr.notests apparmor=0 audit=0",
    )
)

# Pointer authentication and vectors of any length take most of TCG's time where a kernel finds
# them. Without 52-bit addresses (lpa2), page tables have a level less.
CPU = "max,pauth=off,sve=off,lpa2=off"

# Linux Documentation/arch/arm64/booting.rst, "Call the kernel image"
_MAGIC_OFFSET, _MAGIC = 56, b"ARM\x64"


def vmlinux(kernel: bytes) -> None:
    """QEMU starts Debian's file as it is. Raises ConfigError if it is not a kernel."""
    if kernel[_MAGIC_OFFSET : _MAGIC_OFFSET + len(_MAGIC)] != _MAGIC:
        raise ConfigError("the emulated host's kernel is not a kernel for arm64")


def frequency_khz() -> None:
    """The emulated timer says how fast it runs."""


def kernel_parameters(tsc_khz: int | None) -> str:
    """The kernel's command line."""
    return _KERNEL_PARAMETERS


def machine_arguments(cpus: int, memory_mib: int) -> list[str]:
    """QEMU's arguments for the machine, its CPUs and its RAM."""
    return [
        *("-machine", f"virt,virtualization=on,gic-version={GIC_VERSION}"),
        *("-accel", "tcg,thread=multi"),
        *("-cpu", CPU),
        *("-smp", str(cpus)),
        *("-m", str(memory_mib)),
    ]
