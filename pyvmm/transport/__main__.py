"""Writes docs/registers.md from the tables of the transports."""

from __future__ import annotations

from pyvmm.transport import mmio, pci
from pyvmm.transport.registers import markdown


def page() -> str:
    """The page's text."""
    return f"""\
# Registers

Written by `python -m pyvmm.transport` from the tables that the transports dispatch by; a test
compares the two. A write at another time than the one given, a write to an R register, or an access
of another width changes nothing but a counter of warnings.

## virtio-mmio

Names as in virtio 1.3, 4.2.2 MMIO Device Register Layout.

{markdown(mmio.REGISTERS, "VIRTIO_MMIO_")}
## virtio-pci: the common configuration structure

Names as in virtio 1.3, 4.1.4.3 Common configuration structure layout.

{markdown(pci.COMMON, "VIRTIO_PCI_COMMON_")}
## virtio-pci: ISR status

virtio 1.3, 4.1.4.5 ISR status capability.

{markdown(pci.ISR, "VIRTIO_PCI_")}"""


if __name__ == "__main__":
    print(page(), end="")
