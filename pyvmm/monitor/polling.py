"""How long the devices of a VM may poll before they sleep."""

from __future__ import annotations

from pyvmm.host import processors
from pyvmm.host.syscalls import read_or_empty

_KVM = "/sys/module/kvm/parameters/halt_poll_ns"
_USUAL_NS = 200_000  # KVM's own choice on x86
_MOST_NS = 1_000_000
_SLOWNESS = 10  # of an emulated host, at the least: what a guest does between two requests as well


def poll_ns(cpus: int) -> int:
    """For how many nanoseconds a device of a VM with `cpus` vCPUs may poll: as long as KVM does on
    this machine for a vCPU that halts, if there is a processor more than there are vCPUs.

    Who wants no polling on a machine switches off KVM's, and ours with it
    (Documentation/virt/kvm/halt-polling.rst).
    """
    if processors.usable() < cpus + 1:
        return 0
    text = read_or_empty(_KVM).strip()
    found = min(int(text), _MOST_NS) if text.isdecimal() else _USUAL_NS
    return found * _SLOWNESS if processors.are_emulated() else found
