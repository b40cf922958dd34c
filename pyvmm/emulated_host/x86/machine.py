"""The x86 machine: an AMD processor with nested paging, emulated by QEMU's TCG."""

from __future__ import annotations

# Loaded before the command's root is mounted, and beside that, by another CPU.
ROOT_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "virtio_blk")
KVM_MODULES = ("kvm_amd", "tun")

# The TSC of an emulated CPU is the machine's own, so the kernel need not doubt it; there is no
# hardware whose flaws it would have to work around.
KERNEL_PARAMETERS = (
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check nokaslr"
)


def machine_arguments(cpus: int, memory_mib: int) -> list[str]:
    """QEMU's arguments for the machine, its CPUs and its RAM."""
    return [
        *("-machine", "q35"),
        *("-accel", "tcg,thread=multi"),
        *("-cpu", "max,+svm,+npt"),
        *("-smp", str(cpus)),
        *("-m", str(memory_mib)),
    ]
