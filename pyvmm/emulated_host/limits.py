"""How large an emulated host this machine can carry."""

from __future__ import annotations

from pyvmm.emulated_host.spec import OWN_MEMORY_MIB
from pyvmm.errors import ConfigError


def available_mib() -> int | None:
    """Memory in MiB that new programs may use, swap included; None if the kernel does not say."""
    fields = {}
    for line in _read("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) if rest.split() else 0
    if "MemAvailable" not in fields:
        return None
    available = (fields["MemAvailable"] + fields.get("SwapFree", 0)) // 1024
    # A container's own limit (cgroup v2, its root as seen from inside).
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    used = _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        available = min(available, (int(limit) - int(used)) >> 20)
    return available


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


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
