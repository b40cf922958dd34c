"""Writes docs/registers.md from the tables of the transports."""

from __future__ import annotations

from pyvmm.transport import mmio
from pyvmm.transport.registers import markdown


def page() -> str:
    """The page's text."""
    return f"""\
# virtio-mmio registers

Written by `python -m pyvmm.transport` from the table that the transport
dispatches by; a test compares the two. Names as in virtio 1.3, 4.2.2 MMIO Device
Register Layout. A write at another time than the one given, a write to an R register,
or an access of another width changes nothing but a counter of warnings.

{markdown(mmio.REGISTERS, "VIRTIO_MMIO_")}"""


if __name__ == "__main__":
    print(page(), end="")
