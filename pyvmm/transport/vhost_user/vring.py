"""One ring: the front end's settings for it, and its state."""

from __future__ import annotations

from pyvmm.errors import DriverError
from pyvmm.transport.vhost_user.front_end_fd import FrontEndFd
from pyvmm.transport.vhost_user.memory_table import MemoryTable
from pyvmm.vhost_user.protocol import FrontEndError
from pyvmm.virtio.queue.state import WRAP, QueueConfig, QueueState, is_valid_size, size_rule

_POSITION = "2.7.8 The Virtqueue Used Ring"


class Vring:
    """Ring `index`: `kick` and `call` and `error` are the front end's eventfds; `started` from the
    kick's arrival until GET_VRING_BASE; `enabled` as SET_VRING_ENABLE says.

    A ring that runs is started, enabled, and has a size and addresses.
    """

    def __init__(self, index: int, max_size: int) -> None:
        """Raises HostError without file descriptors."""
        self.index = index
        self.max_size = max_size
        self.kick = FrontEndFd()
        self.call = FrontEndFd()
        self.error = FrontEndFd()
        self.size = 0
        self.addresses: tuple[int, int, int] | None = None  # user addresses: desc, used, avail
        self.base = 0
        self.started = False
        self.enabled = False

    @property
    def runnable(self) -> bool:
        """True if the device may work on it."""
        return self.started and self.enabled and bool(self.size) and self.addresses is not None

    def set_size(self, size: int, *, packed: bool) -> None:
        """Raises FrontEndError for a size that cannot be, or another one in a ring that runs."""
        if size != self.size:
            self._check_stopped("size")
        if not is_valid_size(size, self.max_size, packed=packed):
            rule = size_rule(self.max_size, packed=packed)
            raise FrontEndError(f"ring {self.index}: {size} is not {rule}")
        self.size = size

    def set_addresses(self, addresses: tuple[int, int, int]) -> None:
        """Raises FrontEndError for others in a ring that runs."""
        if addresses != self.addresses:
            self._check_stopped("address")
            self.addresses = addresses

    def set_base(self, base: int, *, packed: bool) -> None:
        """Raises FrontEndError for what is not a position, or another one in a ring that runs."""
        if base != self.base:
            self._check_stopped("base")
        if base > 0xFFFF and not packed:
            raise FrontEndError(f"ring {self.index}: {base:#x} is not a position in it")
        self.base = base

    def _check_stopped(self, what: str) -> None:
        # The kick may come before all the rest: front ends keep to no order.
        if self.runnable:
            raise FrontEndError(f"ring {self.index}: {what} changed while it runs")

    def config(self, table: MemoryTable) -> QueueConfig:
        """The queue in guest addresses. Raises FrontEndError for a user address outside memory;
        nothing else is checked."""
        assert self.addresses is not None
        desc, used, avail = map(table.guest_address, self.addresses)
        return QueueConfig(self.max_size, self.size, desc, avail, used)

    def resume(self, config: QueueConfig, table: MemoryTable, *, packed: bool) -> QueueState:
        """The queue as it was left, by us or by a back end before us.

        Requests that were taken and not returned, those between the used position and the base, are
        taken again: they are whole in the ring as long as a device uses them in order. Raises
        DriverError for a base that the ring contradicts.
        """
        config.validate(table.memory, packed=packed)
        if packed:
            used = self.base >> 16
            if not used and self.base & WRAP:
                # SPDK and DPDK give the available half alone. Read by the letter that is a ring
                # which is taken whole, and such a base is not one of ours: we return all we take.
                used = self.base
        else:
            used = int.from_bytes(table.memory.read(config.used_addr + 2, 2), "little")
            if (self.base - used) & 0xFFFF > config.size:
                raise DriverError(
                    f"base {self.base} with a used index of {used} in a queue of {config.size}",
                    section=_POSITION,
                )
        return _at(used, config, packed=packed)

    def left(self, state: QueueState) -> None:
        """The device has left the queue as `state` has it, maybe to go on there later."""
        self.base = _at(state.next_used, state.config(), packed=state.packed).vring_base()

    def reset(self) -> None:
        """As new, but for the eventfds."""
        self.size = self.base = 0
        self.addresses = None
        self.started = self.enabled = False

    def close(self) -> None:
        """Give the eventfds back."""
        for fd in (self.kick, self.call, self.error):
            fd.close()


def _at(used: int, config: QueueConfig, *, packed: bool) -> QueueState:
    base = used | used << 16 if packed else used
    return QueueState.from_vring_base(config, base, packed=packed)
