"""Every kind of virtio device on a transport, a mock driver in front, over either ring."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

from fuzz.targets import GUEST_CID, TARGETS
from rings import offering

from pyvmm.kinds import user as device_user
from pyvmm.kinds.interface import Context
from pyvmm.testing.attached import AttachedDriver, Over, attached
from pyvmm.testing.mmio_driver import MmioDriver, Ring
from pyvmm.testing.vsock_driver import RST, Packet
from pyvmm.virtio.device import VirtioDevice

ROOT = Path(__file__).parents[1]


class Kind(NamedTuple):
    """A kind of device: how one is made, and how to see that it lives. `prompt` are queues whose
    chains come back at once, with a chain for each as (readable, writable)."""

    make: Callable[[], AbstractContextManager[VirtioDevice]]
    check: Callable[[VirtioDevice, MmioDriver], None]
    prompt: dict[int, tuple[Sequence[bytes], Sequence[int]]]


@contextmanager
def _user() -> Iterator[VirtioDevice]:
    """The device of the tutorial, made as `--device` makes it."""
    spec = device_user.parse(f"{ROOT / 'examples' / 'entropy.py'}:Entropy")
    yield device_user.open_device(spec, Context("vm", None, None))  # type: ignore[arg-type]


def _user_check(device: VirtioDevice, driver: MmioDriver) -> None:
    written, data = driver.request(0, [], [64])
    assert written == 64 and any(data)


_FRAME = bytes(12) + b"\xff" * 6 + bytes(54)
_PACKET = Packet(RST, src_port=1, dst_port=2).pack_header(GUEST_CID)
_PROMPT: dict[str, dict[int, tuple[Sequence[bytes], Sequence[int]]]] = {
    "blk": {n: ([struct.pack("<LLQ", 0, 0, 0)], [512, 1]) for n in (0, 1)},
    "rng": {0: ([], [64])},
    "balloon": {
        0: ([struct.pack("<L", 0xFFFF_FFFF)], []),  # a page that is not RAM
        1: ([bytes(4)], []),
        3: ([bytes(4)], []),
        4: ([], [64]),
    },
    "console": {1: ([b"output"], []), 3: ([bytes(8)], [])},
    "net": {1: ([_FRAME], []), 2: ([b"\0\0\1"], [1])},
    "pmem": {0: ([bytes(4)], [4])},
    "vsock": {1: ([_PACKET], [])},
}


def _make(name: str) -> Callable[[], AbstractContextManager[VirtioDevice]]:
    """The fuzzer's target of that name, always the same."""
    return lambda: TARGETS[name].make(Random(0))


KINDS = {
    **{name: Kind(_make(name), TARGETS[name].check, _PROMPT[name]) for name in _PROMPT},
    "user": Kind(_user, _user_check, {0: ([], [64])}),
}


class EveryRig:
    """A device with a driver in front; `driver` is up unless it was told not to start."""

    def __init__(self, kind: Kind, device: VirtioDevice, driver: AttachedDriver) -> None:
        self.kind = kind
        self.device = device
        self.driver = driver

    @property
    def prompt(self) -> list[int]:
        """Queues whose chains come back at once."""
        return list(self.kind.prompt)

    def submit(self, queue: int) -> object:
        """A lawful request in `queue`, with a kick."""
        readable, writable = self.kind.prompt[queue]
        return self.driver.mmio.submit(queue, readable, writable)

    def serves(self, queue: int) -> None:
        """A lawful request in `queue`, which comes back."""
        readable, writable = self.kind.prompt[queue]
        self.driver.request(readable, writable, queue=queue)

    def assert_alive(self, *, restart: bool = False) -> None:
        """It serves, after a reset if it had to be."""
        if restart:
            self.driver.restart()
        assert not self.driver.needs_reset, self.driver.log
        self.kind.check(self.device, self.driver.mmio)
        assert not self.driver.needs_reset, self.driver.log


@contextmanager
def every_device(
    name: str,
    ring: Ring,
    *,
    start: bool = True,
    queue_size: int = 0,
    without: int = 0,
    over: Over = "mmio",
) -> Iterator[EveryRig]:
    """A device of that kind behind that ring; queues are of `queue_size`, or the largest they can
    be. The driver does not take the features in `without`."""
    kind = KINDS[name]
    with kind.make() as device:
        offering(ring, device)
        with attached(device, ring=ring, start=False, ram=8 << 20, over=over) as driver:
            rig = EveryRig(kind, device, driver)
            if start:
                sizes = [min(queue_size or size, size) for size in device.queue_sizes]
                features = driver.mmio.offered_features() & ~(1 << 35) & ~without
                if ring == "split":
                    features &= ~(1 << 34)
                driver.mmio.start(features=features, queue_sizes=sizes)
            yield rig
