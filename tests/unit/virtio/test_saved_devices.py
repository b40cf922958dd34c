"""Every kind of virtio device, saved in the middle of its work and restored as a new one, over both
rings; and states that cannot be."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from every_device import KINDS, EveryRig, every_device
from rings import offering

from pyvmm.errors import ConfigError
from pyvmm.host.saved import Saved
from pyvmm.kinds import registry
from pyvmm.testing.mmio_driver import NEEDS_RESET, Ring
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.net.device import NetDevice
from pyvmm.virtio.net.vhost_device import VhostNetDevice

REFUSED = {
    "user": "cannot be in a snapshot: nobody knows what state it has",
}
SAVED = sorted(set(KINDS) - set(REFUSED))
each = pytest.mark.parametrize("ring", ["split", "packed"])
each_device = pytest.mark.parametrize("name", SAVED)


@contextmanager
def held(rig: EveryRig) -> Iterator[None]:
    """No queue moves inside."""
    queues = rig.driver.transport.negotiation.active_queues
    for queue in reversed(queues):
        assert queue.claim(20)
    try:
        yield
    finally:
        for queue in queues:
            queue.lock.release()


def saved_of(rig: EveryRig) -> dict[str, Any]:
    with held(rig):
        state: dict[str, Any] = json.loads(json.dumps(rig.driver.transport.save()))
    return state


def workers_of(device: VirtioDevice) -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(f"{device.name}-")]


@contextmanager
def fresh(rig: EveryRig, ring: Ring) -> Iterator[tuple[VirtioDevice, MmioTransport]]:
    """Another device of the kind, on the memory of the first, which has stopped."""
    rig.driver.transport.close()
    with rig.kind.make() as device:
        offering(ring, device)
        memory, irq = rig.driver.memory, rig.driver.irq
        transport = MmioTransport(device, memory, irq, log=rig.driver.log.append)
        try:
            yield device, transport
        finally:
            transport.close()


def test_each_kind_of_a_vm_is_saved_or_refused_by_name() -> None:
    """A new kind joins KINDS of every_device and is tested below, or is refused here."""
    names = {"disk": "blk", "ports": "console"}
    served_elsewhere = {"vhost_user", "share"}  # test_vhost_user_front_end.py
    known = {*SAVED, *REFUSED, *served_elsewhere}
    assert {names.get(kind, kind) for kind in registry.KINDS} == known
    # Where the kernel has it: test_net_vhost.py.
    assert VhostNetDevice.save is NetDevice.save and VhostNetDevice.restore is NetDevice.restore


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_device_that_cannot_be_saved_says_so(name: str) -> None:
    with every_device(name, "split") as rig, pytest.raises(ConfigError, match=REFUSED[name]):
        saved_of(rig)


@each
@each_device
def test_a_restored_device_goes_on(name: str, ring: Ring) -> None:
    with every_device(name, ring) as rig:
        waits = rig.prompt[0]
        with held(rig):
            # Made available and not served yet: it is the new device's to serve.
            chain = rig.submit(waits)
            state = json.loads(json.dumps(rig.driver.transport.save()))
            [region] = rig.driver.memory.regions
            memory = bytes(region.view)
        with fresh(rig, ring) as (device, transport):
            region.view[:] = memory  # what the first one did afterwards has not happened
            transport.restore(Saved(state, name))
            rig.driver.mmio.registers = transport.registers
            rig.driver.mmio.wait_used(waits, chain)  # type: ignore[arg-type]
            rig.kind.check(device, rig.driver.mmio)
            assert not transport.negotiation.failures, rig.driver.log


@each
@each_device
def test_a_device_without_a_driver_is_restored_without_one(name: str, ring: Ring) -> None:
    with every_device(name, ring, start=False) as rig:
        state = saved_of(rig)
        with fresh(rig, ring) as (device, transport):
            transport.restore(Saved(state, name))
            assert not workers_of(device)
            rig.driver.mmio.registers = transport.registers
            rig.driver.mmio.start()
            rig.kind.check(device, rig.driver.mmio)


def _console_was_half_done(state: dict[str, Any]) -> None:
    state["device"]["ports"][0]["taken"] = 3


def _net_was_deaf(state: dict[str, Any]) -> None:
    state["device"]["filter"] |= {"promisc": False, "nouni": True, "nobcast": True}
    state["device"]["offloads"] = 0


@each
@pytest.mark.parametrize("change", [_console_was_half_done, _net_was_deaf])
def test_what_a_driver_had_set_ends_with_its_reset(
    change: Callable[[dict[str, Any]], None], ring: Ring
) -> None:
    """Also of a device that was saved as it needed a reset, and so is not live when restored."""
    name = "console" if change is _console_was_half_done else "net"
    with every_device(name, ring) as rig:
        state = saved_of(rig)
        state["negotiation"]["status"] |= NEEDS_RESET
        change(state)
        with fresh(rig, ring) as (device, transport):
            transport.restore(Saved(state, name))
            rig.driver.mmio.registers = transport.registers
            rig.driver.mmio.start()
            rig.kind.check(device, rig.driver.mmio)
            if name == "net":
                assert device.save()["offloads"]
            assert not transport.negotiation.failures, rig.driver.log


def _queue(**values: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state["negotiation"]["queues"][0].update(values)

    return change


def _negotiation(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["negotiation"].update(values)


def _without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for name in path[:-1]:
            state = state[name]
        del state[path[-1]]

    return change


BAD = {
    "another type": lambda state: state.update(device_type=99),
    "no device": _without("device"),
    "no negotiation": _without("negotiation"),
    "no status": _without("negotiation", "status"),
    "a status that cannot be": _negotiation(status=0xC),
    "a status of text": _negotiation(status="live"),
    "features that are not offered": _negotiation(driver_features=(1 << 64) - 1),
    "features of before 1.0": _negotiation(driver_features=0),
    "a queue too few": lambda state: state["negotiation"]["queues"].pop(),
    "a queue too many": lambda state: state["negotiation"]["queues"].append({}),
    "a queue that is none": lambda state: state["negotiation"]["queues"].__setitem__(0, 7),
    "a ring outside RAM": _queue(desc_addr=1 << 40),
    "a ring that wraps": _queue(avail_addr=(1 << 64) - 2),
    "a ring askew": _queue(used_addr=1),
    "a size that is none": _queue(size=0),
    "a size of text": _queue(size="8"),
    "a size that is not a power of two": _queue(size=3),
    "another largest size": _queue(max_size=3),
    "a size beyond the largest": _queue(size=4096),
    "a place too far": _queue(place=0x4321),
    "a place below zero": _queue(place=-1),
    "a place of 2**70": _queue(place=1 << 70),
    "a place that is missing": _queue(place=None),
    "a place that is true": _queue(place=True),
}


@pytest.mark.parametrize("how", sorted(BAD))
def test_row_58_a_state_that_cannot_be_is_refused(how: str) -> None:
    with every_device("rng", "split") as rig:
        rig.assert_alive()
        state = saved_of(rig)
        BAD[how](state)
        with fresh(rig, "split") as (device, transport):
            memory = bytes(rig.driver.memory.regions[0].view)
            with pytest.raises(ConfigError, match="saved state"):
                transport.restore(Saved(state, "rng"))
            transport.close()
            assert not workers_of(device)
            assert bytes(rig.driver.memory.regions[0].view) == memory, "guest memory was written"
