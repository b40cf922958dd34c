"""Being here puts tests/ on the import path, so that tests of all folders can share helpers."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import hypothesis
import pytest
from mmio_harness import Bench, RecordingDevice, SlowDevice
from pci_harness import OVER

# How long an example takes, or is made, says more about what else the machine is doing.
hypothesis.settings.register_profile(
    "pyvmm", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("pyvmm")

# A shell has its background jobs ignore Ctrl-C, and what they start inherits that: the programs
# that tests interrupt would go on.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def device() -> RecordingDevice:
    """The device behind `bench`."""
    return RecordingDevice()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that poke registers do so on every transport, unless they are about one of them."""
    if "transport_name" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker("mmio_only")
        metafunc.parametrize("transport_name", ["mmio"] if marked else sorted(OVER))


@pytest.fixture
def bench(transport_name: str, device: RecordingDevice) -> Iterator[Bench]:
    """A transport with nothing behind it, and a hand on its registers."""
    bench = OVER[transport_name](device)
    yield bench
    bench.transport.close()
    bench.memory.close()


@pytest.fixture
def slow(transport_name: str) -> Iterator[tuple[Bench, SlowDevice]]:
    """One with a device that serves a request when the test lets it."""
    device = SlowDevice()
    bench = OVER[transport_name](device)
    yield bench, device
    device.release.set()
    bench.transport.close()
    bench.memory.close()
