"""The tools that device authors test with: the driver's side of virtio, written without the
device's side.

The drivers import nothing of `pyvmm.virtio`, so that a mistake there cannot hide by being made
twice; only `attached` joins the two sides. Nothing in a running monitor imports this.

- `attached(device)`: a device on a real transport, brought up; `driver.request([b"…"], [64])`
- `MmioDriver`: initialises a virtio-mmio device through its registers, and uses its queues
- `MockSplitDriver`, `MockPackedDriver`: the driver's ends of the two rings, with one interface
- `legal_chains`, `illegal_chains`, `placements`: by name, to parametrise tests over
"""

from pyvmm.testing.attached import Answer, AttachedDriver, attached
from pyvmm.testing.chains import LegalChain, legal_chains
from pyvmm.testing.illegal import IllegalChain, illegal_chains
from pyvmm.testing.mmio_driver import DriverTimeout, InterruptLine, MmioDriver
from pyvmm.testing.mock_driver import Desc, MockSplitDriver
from pyvmm.testing.packed_driver import EventSuppression, MockPackedDriver, PackedDesc
from pyvmm.testing.placements import BadPlacement, placements
from pyvmm.testing.ring import Arena, Buffer, Chain, Element, MockDriver, Used

__all__ = [
    "Answer",
    "Arena",
    "AttachedDriver",
    "BadPlacement",
    "Buffer",
    "Chain",
    "Desc",
    "DriverTimeout",
    "Element",
    "EventSuppression",
    "IllegalChain",
    "InterruptLine",
    "LegalChain",
    "MmioDriver",
    "MockDriver",
    "MockPackedDriver",
    "MockSplitDriver",
    "PackedDesc",
    "Used",
    "attached",
    "illegal_chains",
    "legal_chains",
    "placements",
]
