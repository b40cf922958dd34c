"""The routing table of messages where the interrupt controller takes none itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pyvmm.errors import DriverError
from pyvmm.kvm.arm64 import vgic
from pyvmm.kvm.vm import IrqchipRoute
from pyvmm.machine.board.arm64 import Arm64Board, layout
from pyvmm.machine.messages import Messages

FRAME = layout.MESSAGES[2]


class OldVm:
    """A VM with a GICv2, so far as messages need it."""

    def __init__(self) -> None:
        self.tables: list[list[object]] = []

    def check_extension(self, capability: int) -> int:
        return 0  # KVM_CAP_MSI_DEVID, which an ITS would bring

    def set_gsi_routing(self, routes: Sequence[object]) -> None:
        self.tables.append(list(routes))


@pytest.fixture
def vm() -> OldVm:
    return OldVm()


@pytest.fixture
def messages(vm: OldVm) -> Messages:
    return Arm64Board().messages(vm)  # type: ignore[arg-type]


def test_a_message_is_the_shared_interrupt_that_it_names(vm: OldVm, messages: Messages) -> None:
    """An irqfd takes the way of a GSI of its own to that interrupt: nothing leaves the kernel."""
    first, second = (line._gsi for line in (messages.line(), messages.line(8)))
    assert first >= layout.GIC_INTERRUPTS[2] - vgic.FIRST_SPI
    messages.route(first, FRAME, 96)
    messages.route(second, FRAME, 255)
    messages.route(second, FRAME, 255)
    fixed = vgic.default_routes(layout.GIC_INTERRUPTS[2])
    assert vm.tables[-1] == [*fixed, IrqchipRoute(first, 0, 64), IrqchipRoute(second, 0, 223)]
    assert len(vm.tables) == 2


@pytest.mark.parametrize(
    ("address", "data"),
    [
        *((FRAME, data) for data in (0, 31, 32, 48, 95, 256, 1 << 31, (1 << 32) - 1)),
        *((address, 96) for address in (0, FRAME - 4, FRAME + 4, FRAME | 1 << 32)),
        (layout.MESSAGES[3], 96),
    ],
)
def test_what_is_no_message_is_refused(
    vm: OldVm, messages: Messages, address: int, data: int
) -> None:
    """Among them are the interrupts of the machine's other devices."""
    with pytest.raises(DriverError, match="interrupts nobody"):
        messages.route(messages.line()._gsi, address, data)
    assert vm.tables == []
