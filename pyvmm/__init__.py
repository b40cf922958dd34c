"""pyvmm: a KVM microVM monitor in Python.

    from pyvmm import VM, Disk

    with VM(kernel="vmlinuz", initrd="initrd.img", disks=[Disk("root.img", snapshot=True)]) as vm:
        vm.wait_ready()
        print(vm.run(["uname", "-r"]).stdout)

docs/python-api.md tells the rest. The names below are imported only when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvmm.agent import (
        AgentError,
        Clock,
        CommandTimeout,
        Completed,
        Copied,
        Info,
        NoAgent,
        WrongAgent,
    )
    from pyvmm.api.aio import AsyncVM
    from pyvmm.api.async_pool import AsyncPool
    from pyvmm.api.command import Command
    from pyvmm.api.errors import (
        GuestEnded,
        GuestPanic,
        MonitorDied,
        Outcome,
        VMError,
        VMTimeout,
    )
    from pyvmm.api.events import Event
    from pyvmm.api.pool import Pool
    from pyvmm.api.vm import VM
    from pyvmm.control.protocol import ControlError
    from pyvmm.errors import ConfigError, HostError, PyvmmError
    from pyvmm.kinds.balloon import Spec as Balloon
    from pyvmm.kinds.net import Spec as Net
    from pyvmm.kinds.port import PortSpec as Port
    from pyvmm.kinds.rng import Spec as Rng
    from pyvmm.kinds.user import Spec as UserDevice
    from pyvmm.kinds.vsock import Spec as Vsock
    from pyvmm.spec.vm import DiskSpec as Disk
    from pyvmm.version import __version__ as __version__

# Name → the module, and its name there if that is another.
_PUBLIC = {
    "VM": ("pyvmm.api.vm", ""),
    "AsyncPool": ("pyvmm.api.async_pool", ""),
    "AsyncVM": ("pyvmm.api.aio", ""),
    "AgentError": ("pyvmm.agent", ""),
    "Balloon": ("pyvmm.kinds.balloon", "Spec"),
    "Clock": ("pyvmm.agent", ""),
    "Command": ("pyvmm.api.command", ""),
    "CommandTimeout": ("pyvmm.agent", ""),
    "Completed": ("pyvmm.agent", ""),
    "ConfigError": ("pyvmm.errors", ""),
    "ControlError": ("pyvmm.control.protocol", ""),
    "Copied": ("pyvmm.agent", ""),
    "Disk": ("pyvmm.spec.vm", "DiskSpec"),
    "Event": ("pyvmm.api.events", ""),
    "GuestEnded": ("pyvmm.api.errors", ""),
    "GuestPanic": ("pyvmm.api.errors", ""),
    "HostError": ("pyvmm.errors", ""),
    "Info": ("pyvmm.agent", ""),
    "MonitorDied": ("pyvmm.api.errors", ""),
    "Net": ("pyvmm.kinds.net", "Spec"),
    "NoAgent": ("pyvmm.agent", ""),
    "Outcome": ("pyvmm.api.errors", ""),
    "Pool": ("pyvmm.api.pool", ""),
    "Port": ("pyvmm.kinds.port", "PortSpec"),
    "PyvmmError": ("pyvmm.errors", ""),
    "Rng": ("pyvmm.kinds.rng", "Spec"),
    "UserDevice": ("pyvmm.kinds.user", "Spec"),
    "VMError": ("pyvmm.api.errors", ""),
    "VMTimeout": ("pyvmm.api.errors", ""),
    "Vsock": ("pyvmm.kinds.vsock", "Spec"),
    "WrongAgent": ("pyvmm.agent", ""),
}
__all__ = [
    "VM",
    "AgentError",
    "AsyncPool",
    "AsyncVM",
    "Balloon",
    "Clock",
    "Command",
    "CommandTimeout",
    "Completed",
    "ConfigError",
    "ControlError",
    "Copied",
    "Disk",
    "Event",
    "GuestEnded",
    "GuestPanic",
    "HostError",
    "Info",
    "MonitorDied",
    "Net",
    "NoAgent",
    "Outcome",
    "Pool",
    "Port",
    "PyvmmError",
    "Rng",
    "UserDevice",
    "VMError",
    "VMTimeout",
    "Vsock",
    "WrongAgent",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from pyvmm import version

        return version.__version__
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pyvmm' has no attribute {name!r}")
    from importlib import import_module

    module, there = _PUBLIC[name]
    found = globals()[name] = getattr(import_module(module), there or name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
