"""The emulated KVM host: QEMU's TCG as a machine with a real /dev/kvm, for where there is none.

Its Linux sees the machine's own file system (read-only; what is written goes to a RAM disk), so a
command runs in it with the same Python, the same checkout and the same images, and its standard
streams, its exit code and its writes to disk images come back out.
"""

from __future__ import annotations

from pyvmm.emulated_host.host import EmulatedHost, run
from pyvmm.emulated_host.spec import (
    DEFAULT_CPUS,
    OWN_MEMORY_MIB,
    EmulatedHostError,
    EmulatedHostSpec,
    HostDisk,
    HostFolder,
    HostImage,
    HostListener,
    HostSink,
    HostStream,
)

__all__ = [
    "DEFAULT_CPUS",
    "OWN_MEMORY_MIB",
    "EmulatedHost",
    "EmulatedHostError",
    "EmulatedHostSpec",
    "HostDisk",
    "HostFolder",
    "HostImage",
    "HostListener",
    "HostSink",
    "HostStream",
    "run",
]
