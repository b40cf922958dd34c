"""Message-signalled interrupts: eventfds that KVM turns into messages to the interrupt controller,
or, where that takes none, into the interrupts that the messages ask for.

Each line has a GSI of its own beyond the pins of the interrupt controller. KVM's routing table says
which message a GSI sends, and changes only when a driver really sets another; an irqfd joins the
line's eventfd to the GSI while the line is connected.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from threading import Lock

from pyvmm.errors import DriverError, HostError
from pyvmm.host.syscalls import Closable, EventFd
from pyvmm.kvm.vm import IrqchipRoute, MsiRoute, Vm

_MOST_ROUTES = 4096  # KVM_MAX_IRQ_ROUTES, in the kernel's <linux/kvm_host.h>
_SECTION = "4.1.5.1.2 MSI-X Vector Configuration"


class Messages:
    """KVM's routing table, and the lines whose messages are in it. Any thread may call it."""

    def __init__(
        self,
        vm: Vm,
        fixed: Sequence[IrqchipRoute],
        is_a_message: Callable[[int], bool],
        *,
        with_sender: bool = False,
        pin_of: Callable[[int], int | None] | None = None,
    ) -> None:
        """`fixed` are the routes that are always there; `is_a_message` tells of a guest-physical
        address whether a write there is an interrupt. `with_sender`: the interrupt controller asks
        which device sent a message. `pin_of` is for one that takes no messages itself: the pin
        that a message raises, by its data, None for one that interrupts nobody."""
        self._vm = vm
        self._fixed = fixed
        self._is_a_message = is_a_message
        self._with_sender = with_sender
        self._pin_of = pin_of
        self._routes: dict[int, MsiRoute | IrqchipRoute] = {}
        self._lock = Lock()
        first = 1 + max(route.gsi for route in fixed)
        self._free = list(range(first, first + _MOST_ROUTES - len(fixed)))

    def line(self, sender: int = 0) -> Line:
        """A line, of the PCI function with the requester id `sender`, that is not connected yet.
        Raises HostError if KVM has no more, or without file descriptors."""
        with self._lock:
            if not self._free:
                raise HostError(errno.ENOSPC, "KVM has no more interrupts to route")
            gsi = self._free.pop(0)
        try:
            return Line(self, self._vm, gsi, sender)
        except HostError:
            self.give_back(gsi)
            raise

    def route(self, gsi: int, address: int, data: int, sender: int = 0) -> None:
        """Have `gsi` send `data` to `address`, as `sender`. Raises DriverError, HostError."""
        wanted = self._wanted(gsi, address, data, sender)
        with self._lock:
            if self._routes.get(gsi) != wanted:
                routes = {**self._routes, gsi: wanted}
                self._vm.set_gsi_routing([*self._fixed, *routes.values()])
                self._routes = routes

    def _wanted(self, gsi: int, address: int, data: int, sender: int) -> MsiRoute | IrqchipRoute:
        if not self._is_a_message(address):
            raise DriverError(f"a write to {address:#x} interrupts nobody", section=_SECTION)
        if self._pin_of is None:
            return MsiRoute(gsi, address, data, sender if self._with_sender else None)
        pin = self._pin_of(data)
        if pin is None:
            raise DriverError(f"the message {data:#x} interrupts nobody", section=_SECTION)
        return IrqchipRoute(gsi, 0, pin)

    def give_back(self, gsi: int) -> None:
        """`gsi` is used no more; its route is forgotten with the next change."""
        with self._lock:
            self._routes.pop(gsi, None)
            self._free.append(gsi)


class Line(Closable):
    """One vector's signals: see pyvmm.pci.msix.MessageLine. Whoever interrupts signals `eventfd`,
    and KVM does the rest."""

    def __init__(self, messages: Messages, vm: Vm, gsi: int, sender: int) -> None:
        self.eventfd = EventFd()
        self._messages = messages
        self._vm = vm
        self._gsi = gsi
        self._sender = sender
        self._connected = False

    def connect(self, address: int, data: int) -> None:
        """Connect the line. Raises DriverError if `address` takes no messages, HostError."""
        self._messages.route(self._gsi, address, data, self._sender)
        if not self._connected:
            # KVM looks whether the eventfd was signalled before, and then interrupts once; but it
            # leaves the count, which would read as a signal that still waits.
            self._vm.irqfd(self.eventfd.fd, self._gsi)
            self.eventfd.drain()
            self._connected = True

    def disconnect(self) -> None:
        """Disconnect the line. No signal is under way any more when this returns. Raises
        HostError."""
        if self._connected:
            self._vm.irqfd(self.eventfd.fd, self._gsi, deassign=True)
            self._connected = False

    @property
    def pending(self) -> bool:
        """True if a signal waits."""
        return not self._connected and self.eventfd.is_signalled

    def wait(self) -> None:
        """Have a signal wait until the line is connected."""
        self.eventfd.signal()

    def close(self) -> None:
        if self.eventfd.fd >= 0:
            self.disconnect()
            self.eventfd.close()
            self._messages.give_back(self._gsi)
