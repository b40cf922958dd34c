"""/dev/kvm: what this machine's KVM can do, and new virtual machines."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import syscalls
from pyvmm.kvm import capabilities, uapi
from pyvmm.kvm.vm import Vm

EMULATED = "use --kvm=emulated"


class Kvm(syscalls.Closable):
    """An open /dev/kvm. `fd` is the file descriptor, `vcpu_mmap_size` the bytes of a kvm_run."""

    def __init__(self, fd: int) -> None:
        """Own `fd`; `open` is how to get one."""
        self.fd = fd
        self.vcpu_mmap_size = syscalls.ioctl(
            fd, uapi.KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE"
        )

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> Kvm:
        """Open `path` and see that it speaks KVM's API version 12.

        Raises ConfigError where the user can help it (absent, no permission, not KVM), with what to
        do; HostError for the rest.
        """
        fd = _open_device(path)
        try:
            _check_version(fd, path)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION: 0 if it is absent, else 1 or the value that belongs to it."""
        return syscalls.ioctl(self.fd, uapi.KVM_CHECK_EXTENSION, capability, "KVM_CHECK_EXTENSION")

    def check_required(self, more: Sequence[capabilities.Requirement]) -> None:
        """Raise ConfigError that names each capability pyvmm needs and this KVM lacks; `more` is
        what it needs on one architecture."""
        capabilities.check(self.check_extension, (*capabilities.REQUIRED, *more))

    @property
    def max_vcpus(self) -> int:
        """The most vCPUs that one VM may have. Source: KVM_CAP_MAX_VCPUS, else KVM_CAP_NR_VCPUS."""
        return (
            self.check_extension(uapi.KVM_CAP_MAX_VCPUS)
            or self.check_extension(uapi.KVM_CAP_NR_VCPUS)
            or 4  # KVM's documentation: assume 4 where neither is known
        )

    def create_vm(self, kind: int = 0) -> Vm:
        """A new VM without memory, devices or vCPUs. `kind` is what an architecture's KVM takes as
        the machine type. Raises HostError."""
        fd = syscalls.ioctl(self.fd, uapi.KVM_CREATE_VM, kind, "KVM_CREATE_VM")
        return Vm(fd, self.vcpu_mmap_size)

    def close(self) -> None:
        """Close /dev/kvm; VMs live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open_device(path: str) -> int:
    try:
        return syscalls.open_file(path, os.O_RDWR)
    except HostError as error:
        if error.errno == errno.ENOENT:
            raise ConfigError(
                f"{path} is not there: no KVM on this machine",
                cure=f"load the module kvm_intel or kvm_amd, or {EMULATED}",
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(
                f"no permission to open {path}",
                cure=f"{_way_in(path)}, or {EMULATED}",
            ) from None
        if error.errno == errno.EISDIR:
            raise _not_kvm(path) from None
        # ENODEV, ENXIO: the node is there but no module behind it.
        raise HostError(error.errno, f"open {path}", cure=EMULATED) from None


def _way_in(path: str) -> str:
    """What gives an ordinary user the rights to open `path`."""
    import grp

    group = "kvm"  # that of systemd's rules for udev
    with suppress(OSError, KeyError):
        status = os.stat(path)
        if not status.st_gid or status.st_mode & 0o060 != 0o060:
            return f"have root let you (chmod 666 {path}, or a rule for udev)"
        group = grp.getgrgid(status.st_gid).gr_name
    return f"add yourself to group {group} (sudo usermod -aG {group} $USER, then log in again)"


def _check_version(fd: int, path: str) -> None:
    try:
        version = syscalls.ioctl(fd, uapi.KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION")
    except HostError:
        raise _not_kvm(path) from None
    if version != uapi.KVM_API_VERSION:
        raise ConfigError(
            f"{path} has KVM API version {version}, not {uapi.KVM_API_VERSION}",
            cure=f"use a newer host kernel, or {EMULATED}",
        )


def _not_kvm(path: str) -> ConfigError:
    return ConfigError(f"{path} is not a KVM device", cure=f"name the real one, or {EMULATED}")
