"""The state of a whole machine as plain data, and a machine that goes on from there.

Guest memory is not in it. Each component has its own pair `save` and `restore` beside its code;
here is their order, and what the machine must be like meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from pyvmm.errors import ConfigError, DriverError, HostError
from pyvmm.host.saved import Saved
from pyvmm.machine.builder import Parts
from pyvmm.machine.machine import Machine
from pyvmm.spec.vm import MAX_DEVICES
from pyvmm.virtio.device import VirtioDevice

Places = tuple[tuple[int, int] | None, ...]
_MOST_SLOT = 31  # of a PCI bus; PciHost looks at the rest


def save(machine: Machine) -> dict[str, Any]:
    """The state of `machine`, which is paused: no vCPU runs, all queues are held.

    Raises ConfigError, which names it, for a device that cannot be saved or is busy; HostError.
    """
    parts = machine.parts
    prepared = parts.prepared
    assert parts.kvm is not None
    try:
        devices = [transport.save() for transport in parts.transports]
    except DriverError as error:
        raise ConfigError(f"a device cannot be saved now: {error}", cure="try again") from None
    return {
        "board": prepared.board.save(parts.kvm, parts.vm, machine.on_vcpus),
        "platform": {name: device.save() for name, device in parts.platform.items()},
        "pci": None if parts.pci is None else parts.pci.save(),
        "devices": devices,
        **_places(parts),
    }


def _places(parts: Parts) -> dict[str, Any]:
    """The names of devices and their places on PCI, if some have come or gone since the start."""
    pci, transports = parts.pci, parts.transports
    if pci is None:
        return {}
    places = [pci.place_of(transport) for transport in transports]
    numbers = [place[0] for place in places if place is not None]
    if not parts.prepared.late and numbers == list(range(1, 1 + len(numbers))):
        return {}
    rows = [
        {"name": transport.device.name, "slot": place and place[0], "start": place and place[1]}
        for transport, place in zip(transports, places, strict=True)
    ]
    return {"places": rows}


def read_places(saved: Saved, devices: Sequence[VirtioDevice], transport: str) -> Places:
    """What GoesOn has of the state `saved`, for the open `devices` of a machine with that
    `transport`; they get the names that they had. Raises ConfigError."""
    if not saved.has("places"):
        return ()
    rows = list(saved.tables("places", MAX_DEVICES))
    if len(rows) != len(devices):
        raise saved.wrong(f"there are places of {len(rows)} devices, not {len(devices)}")
    places: list[tuple[int, int] | None] = []
    names: set[str] = set()
    for row, device in zip(rows, devices, strict=True):
        name = row.text("name", 64)
        if re.fullmatch(r"[\w.-]+", name, re.ASCII) is None or name in names:
            raise row.wrong(f"a device cannot be called {name!r}")
        names.add(name)
        device.name = name
        if row.get("slot") is not None:
            places.append((row.integer("slot", _MOST_SLOT, 1), row.bits("start", 64)))
        elif transport == "pci":
            raise row.wrong("slot is missing")
        else:
            places.append(None)
    return tuple(places)


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


def start_clock(parts: Parts, saved: Saved) -> None:
    """The vCPUs of `parts`, which `restore` was called for, are about to run for the first time.

    Between that and this the monitor enters its box, and a VM of a pool waits. To a guest whose
    clock has gone on meanwhile that is a task that ran for so long: Linux then holds back those of
    real-time priority. Raises ConfigError, HostError.
    """
    parts.prepared.board.start_clock(parts.vm, saved.table("board"))
