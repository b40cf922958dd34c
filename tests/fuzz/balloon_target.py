"""virtio-balloon under the fuzzer: pages that it is given are gone, and no others."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from fuzz.request import Request, pieces

from pyvmm.testing import MmioDriver
from pyvmm.virtio.balloon.device import BalloonDevice
from pyvmm.virtio.device import VirtioDevice

INFLATE, DEFLATE, STATS, FREE_PAGE, REPORTING = range(5)  # 5.5.2 Virtqueues
PAGE = 4096
# In the region above the hole of the harness' memory, where no ring lies.
SPARE_PAGES = range(0x400, 0x410)


@contextmanager
def make(rng: Random) -> Iterator[VirtioDevice]:
    yield BalloonDevice(reporting=True, log=lambda line: None)


def request(rng: Random) -> Request:
    kind = rng.randrange(5)
    if kind < 2:
        numbers = [
            rng.choice((*SPARE_PAGES, 0xFFFF_FFFF, 0x3FF, 0x410))
            for _ in range(rng.choice((0, 1, 1, 5, 300)))
        ]
        data = struct.pack(f"<{len(numbers)}L", *numbers) + bytes(rng.choice((0, 0, 1)))
        return Request(rng.choice((INFLATE, INFLATE, DEFLATE)), pieces(rng, data), [])
    if kind == 2:
        entries = [struct.pack("<HQ", rng.randrange(12), rng.getrandbits(64)) for _ in range(10)]
        return Request(STATS, pieces(rng, b"".join(entries)), [])
    if kind == 3:
        return Request(FREE_PAGE, pieces(rng, rng.randbytes(4)), [rng.choice((4, 100))])
    return Request(REPORTING, [], [rng.choice((1, PAGE, 3 * PAGE))])


def stir(device: VirtioDevice, rng: Random) -> None:
    """The user wants another size, or statistics."""
    assert isinstance(device, BalloonDevice)
    if rng.random() < 0.3:
        device.set_target(rng.randrange(16) * PAGE, 1 << 20)
    if rng.random() < 0.3:
        device.statistics(patience=0)


def check(device: VirtioDevice, driver: MmioDriver) -> None:
    page = SPARE_PAGES[3]
    driver.memory.write(page * PAGE, b"x" * 2 * PAGE)
    driver.request(INFLATE, [struct.pack("<L", page)], [])
    assert driver.memory.read(page * PAGE, PAGE) == bytes(PAGE)
    assert driver.memory.read((page + 1) * PAGE, PAGE) == b"x" * PAGE
