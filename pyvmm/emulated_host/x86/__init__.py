"""The x86-64 emulated host: QEMU's machine, its kernel and the modules behind /dev/kvm."""

from pyvmm.emulated_host.x86.kernel import vmlinux
from pyvmm.emulated_host.x86.machine import (
    KVM_MODULES,
    ROOT_MODULES,
    SAVES_STATE,
    kernel_parameters,
    machine_arguments,
)
from pyvmm.emulated_host.x86.tsc import frequency_khz

__all__ = [
    "KVM_MODULES",
    "ROOT_MODULES",
    "SAVES_STATE",
    "frequency_khz",
    "kernel_parameters",
    "machine_arguments",
    "vmlinux",
]
