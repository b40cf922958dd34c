"""Which pin of which interrupt controller each GSI raises."""

from __future__ import annotations

from pyvmm.kvm import uapi
from pyvmm.kvm.vm import IrqchipRoute


def default_routes() -> list[IrqchipRoute]:
    """The table KVM_CREATE_IRQCHIP sets up: GSI n is I/O APIC pin n, and PIC line n below 16.

    Setting a routing replaces all of it, so a table with MSI routes starts from this one.
    """
    routes = []
    for gsi in range(uapi.KVM_IOAPIC_NUM_PINS):
        if gsi < 16:
            pic = uapi.KVM_IRQCHIP_PIC_MASTER if gsi < 8 else uapi.KVM_IRQCHIP_PIC_SLAVE
            routes.append(IrqchipRoute(gsi, pic, gsi % 8))
        routes.append(IrqchipRoute(gsi, uapi.KVM_IRQCHIP_IOAPIC, gsi))
    return routes
