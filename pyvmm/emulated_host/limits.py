"""The size of the largest emulated host that this machine can carry."""

from __future__ import annotations

from pyvmm.emulated_host.spec import OWN_MEMORY_MIB
from pyvmm.errors import ConfigError
from pyvmm.host.syscalls import read_or_empty


def available_mib() -> int | None:
    """Memory in MiB that new programs may use, swap included; None if the kernel does not say."""
    fields = {}
    for line in read_or_empty("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) if rest.split() else 0
    if "MemAvailable" not in fields:
        return None
    available = (fields["MemAvailable"] + fields.get("SwapFree", 0)) // 1024
    # A container's own limit (cgroup v2, its root as seen from inside).
    limit = read_or_empty("/sys/fs/cgroup/memory.max").strip()
    used = read_or_empty("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        in_use = int(used) - _reclaimable()
        available = min(available, (int(limit) - in_use) >> 20)
    return available


def _reclaimable() -> int:
    """Bytes of the container's page cache, which memory.current counts and the kernel drops when
    somebody needs them: after an image build that is all there is."""
    lines = (line.split() for line in read_or_empty("/sys/fs/cgroup/memory.stat").splitlines())
    return sum(int(line[1]) for line in lines if line[:1] in (["inactive_file"], ["active_file"]))


def check_memory(memory_mib: int) -> None:
    """Raise ConfigError if an emulated host of `memory_mib` does not fit into this machine."""
    available = available_mib()
    if available is not None and memory_mib > available:
        raise ConfigError(
            f"the emulated KVM host needs {memory_mib} MiB (the guest's memory and "
            f"{OWN_MEMORY_MIB} more), but this machine has {available} MiB to give",
            cure="give the guest less memory",
            option="--memory",
        )
