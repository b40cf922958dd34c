"""What device authors test with: the driver's side of virtio, written without the device's side.

Nothing here imports `pyvmm.virtio`, so that a mistake there cannot hide by being made twice. And
nothing in a running monitor imports this.
"""

from pyvmm.testing.mmio_driver import DriverTimeout, InterruptLine, MmioDriver
from pyvmm.testing.mock_driver import Arena, Buffer, Chain, Desc, MockSplitDriver, Used

__all__ = [
    "Arena",
    "Buffer",
    "Chain",
    "Desc",
    "DriverTimeout",
    "InterruptLine",
    "MmioDriver",
    "MockSplitDriver",
    "Used",
]
