"""The state of a whole machine as plain data, and a machine that goes on from there.

Guest memory is not in it. Each component has its own pair `save` and `restore` beside its code;
here is their order, and what the machine must be like meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyvmm.errors import ConfigError, DriverError, HostError
from pyvmm.host.saved import Saved
from pyvmm.machine.builder import Parts
from pyvmm.machine.machine import Machine
from pyvmm.machine.pci_host import COME_OR_GONE, WITH_ALL
from pyvmm.spec.vm import MAX_DEVICES


def save(machine: Machine) -> dict[str, Any]:
    """The state of `machine`, which is paused: no vCPU runs, all queues are held.

    Raises ConfigError, which names it, for a device that cannot be saved or is busy; HostError.
    """
    parts = machine.parts
    prepared = parts.prepared
    if prepared.late or parts.kvm is None:
        raise ConfigError(COME_OR_GONE, cure=WITH_ALL)
    try:
        devices = [transport.save() for transport in parts.transports]
    except DriverError as error:
        raise ConfigError(f"a device cannot be saved now: {error}", cure="try again") from None
    return {
        "board": prepared.board.save(parts.kvm, parts.vm, machine.on_vcpus),
        "platform": {name: device.save() for name, device in parts.platform.items()},
        "pci": None if parts.pci is None else parts.pci.save(),
        "devices": devices,
    }


def restore(parts: Parts, saved: Saved, warn: Callable[[str], None]) -> None:
    """Have `parts`, whose vCPUs have not run, go on where `save` was called: the workers of its
    devices do so at once. `warn` hears of what is not as it was.

    Raises ConfigError for state that cannot be or that this machine cannot have; HostError.
    """
    assert parts.kvm is not None
    # vCPUs and interrupt controllers first: what devices interrupt for as they go on is kept then.
    try:
        parts.prepared.board.restore(parts.kvm, parts.vm, parts.vcpus, saved.table("board"), warn)
    except HostError as error:
        raise ConfigError(
            f"this machine's KVM refuses the saved state: {error}",
            cure="restore it on a machine like the one it was saved on",
        ) from None
    platform = saved.table("platform")
    for name, device in parts.platform.items():
        device.restore(platform.table(name))
    # The bus before its functions' transports: without bus mastering their workers must not begin.
    if parts.pci is not None:
        parts.pci.restore(saved.table("pci"))
    states = list(saved.tables("devices", MAX_DEVICES))
    if len(states) != len(parts.transports):
        raise saved.wrong(f"there are {len(states)} devices, not {len(parts.transports)}")
    for transport, state in zip(parts.transports, states, strict=True):
        state.place = f"{saved.place}, {transport.device.name}"
        transport.restore(state)
    # Last, so that its interrupt is not among those that a state replaces.
    parts.prepared.board.tell_of_copy(parts.vm, parts.prepared.memory)
