"""Being here puts tests/ on the import path, so that tests of all folders can share helpers."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
from mmio_harness import Bench, RecordingDevice, SlowDevice

# How long an example takes says more about what else the machine is doing.
hypothesis.settings.register_profile("pyvmm", deadline=None)
hypothesis.settings.load_profile("pyvmm")


@pytest.fixture
def device() -> RecordingDevice:
    """The device behind `bench`."""
    return RecordingDevice()


@pytest.fixture
def bench(device: RecordingDevice) -> Iterator[Bench]:
    """A virtio-mmio transport with nothing behind it, and a hand on its registers."""
    bench = Bench(device)
    yield bench
    bench.transport.close()
    bench.memory.close()


@pytest.fixture
def slow() -> Iterator[tuple[Bench, SlowDevice]]:
    """One with a device that serves a request when the test lets it."""
    device = SlowDevice()
    bench = Bench(device)
    yield bench, device
    device.release.set()
    bench.transport.close()
    bench.memory.close()
