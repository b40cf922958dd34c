"""The card whose rings the kernel reads, before a kernel that is played: it uses what is available
at once, or finds a ring broken, refuses calls, or loses its tap. Split rings alone, as vhost-net
has them; real threads watch it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from random import Random
from typing import Any
from unittest import mock

import net_rig
from fuzz.odd_target import Taps

from pyvmm.errors import HostError
from pyvmm.host import tap
from pyvmm.host.syscalls import EventFd
from pyvmm.testing import MmioDriver
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.features import RING_FEATURES
from pyvmm.virtio.net import vhost
from pyvmm.virtio.net.vhost_device import VhostNetDevice


class Kernel:
    """A vhost-net of one pair."""

    features = RING_FEATURES | vhost.KERNEL_FEATURES

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.fails = 0.0
        self.error: EventFd | None = None
        self.rings: dict[int, Any] = {}

    def _may_fail(self, call: str) -> None:
        if self.rng.random() < self.fails:
            raise HostError(self.rng.choice((errno.EFAULT, errno.EBADFD)), call)

    def negotiate(self, features: int) -> None:
        self._may_fail("VHOST_SET_FEATURES")

    def set_memory(self, regions: Any) -> None:
        assert list(regions)
        self._may_fail("VHOST_SET_MEM_TABLE")

    def start(
        self, index: int, ring: Any, fd: int, *, kick: EventFd, call: EventFd | None, error: EventFd
    ) -> None:
        self._may_fail("VHOST_NET_SET_BACKEND")
        self.error = error
        self.rings[index] = ring

    def stop(self, index: int) -> None:
        self.rings.pop(index, None)
        self._may_fail("VHOST_NET_SET_BACKEND")


class Card(VhostNetDevice):
    """A card that knows its kernel, and how often it was told of an interface's change."""

    cable: Taps
    kernels: list[Kernel]
    changes: list[EventFd]


class Interface:
    """The tap's interface, whose changes somebody may be told of."""

    def __init__(self) -> None:
        self.told: list[EventFd] = []

    def counters(self) -> dict[str, int]:
        return dict.fromkeys(_COUNTED, 0)

    def changes(self) -> EventFd:
        self.told.append(EventFd())
        return self.told[-1]


_COUNTED = (
    *("frames_to_guest", "bytes_to_guest", "frames_from_guest", "bytes_from_guest"),
    "dropped_to_guest",
)


@contextmanager
def make(rng: Random) -> Iterator[VirtioDevice]:
    chance, interface = Random(rng.getrandbits(32)), Interface()
    cable = Taps(chance)
    kernels = [Kernel(chance) for _ in cable.ends]
    with ExitStack() as closing:
        closing.callback(cable.close)
        fakes = {
            "drain_changes": lambda event: bool(event.drain()),
            "is_attached": lambda fd: not cable.gone,
        }
        for name, fake in fakes.items():
            closing.enter_context(mock.patch.object(tap, name, fake))
        arguments: Any = cable, kernels, interface
        card = Card(*arguments, name="fuzzed", mac=net_rig.MAC, log=lambda line: None)
        card.cable, card.kernels, card.changes = cable, kernels, interface.told
        yield card


def stir(device: VirtioDevice, rng: Random) -> None:
    """A ring is found broken, the interface changes or goes, the cable is pulled and plugged in."""
    assert isinstance(device, Card)
    for kernel in device.kernels:
        kernel.fails = rng.choice((0.0, 0.0, 0.2))
        if not rng.randrange(12) and kernel.error is not None:
            with suppress(OSError, ValueError):
                kernel.error.signal()
    if not rng.randrange(10):
        device.cable.gone |= not rng.randrange(4)
        for event in device.changes:
            with suppress(OSError, ValueError):  # closed by whoever has noticed already
                event.signal()
    if not rng.randrange(4):
        device.set_link(rng.random() < 0.6)
    device.stats()


def settle(device: VirtioDevice) -> None:
    assert isinstance(device, Card)
    for kernel in device.kernels:
        kernel.fails = 0.0


def check(device: VirtioDevice, driver: MmioDriver) -> None:
    """Its control queue is ours still."""
    assert isinstance(device, Card)
    if not device.cable.gone:
        driver.request(len(driver.queues) - 1, [bytes([3, 0])], [1])
