"""The requests by which a back end gets what a driver has negotiated, and its rings, and by which
it gives them back. All raise BackEndError or HostError."""

from __future__ import annotations

from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.vhost_user import protocol
from pyvmm.vhost_user.protocol import BackEndError
from pyvmm.virtio import status
from pyvmm.virtio.features import mask
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.vhost_user.link import Link

_AGREED = status.ACKNOWLEDGE | status.DRIVER | status.FEATURES_OK


def accept_features(link: Link, accepted: int) -> None:
    """The driver has accepted these of the back end's features."""
    if link.enables_rings:
        accepted |= mask(protocol.VHOST_USER_F_PROTOCOL_FEATURES)
    link.tell("SET_FEATURES", protocol.U64.pack(accepted))
    if link.has(protocol.VHOST_USER_PROTOCOL_F_STATUS):
        link.tell("SET_STATUS", protocol.U64.pack(_AGREED))
        (found,) = link.ask_fields("GET_STATUS")
        if not found & status.FEATURES_OK:
            raise BackEndError("does not work with the features that the guest accepts")


def say_driver_ok(link: Link) -> None:
    """The driver has set DRIVER_OK."""
    if link.has(protocol.VHOST_USER_PROTOCOL_F_STATUS):
        link.tell("SET_STATUS", protocol.U64.pack(_AGREED | status.DRIVER_OK))


def say_reset(link: Link) -> None:
    """The driver has reset the device; all rings have stopped."""
    if link.has(protocol.VHOST_USER_PROTOCOL_F_STATUS):
        link.tell("SET_STATUS", protocol.U64.pack(0))
    elif link.has(protocol.VHOST_USER_PROTOCOL_F_RESET_DEVICE):
        link.tell("RESET_DEVICE")


def lend(link: Link, memory: GuestMemory) -> None:
    """The back end has the guest's memory from now on."""
    memory.lent = True
    regions = [(r.guest_addr, r.size, r.host_addr, r.fd_offset) for r in memory.regions]
    link.lend(memory.fd, regions)


def start_ring(
    link: Link, queue: Queue, memory: GuestMemory, call: EventFd | None, error: EventFd
) -> None:
    """Have the back end serve `queue` where it stands: `call` interrupts the driver, if that wants
    it, and `error` says that the ring cannot be served."""
    index, state, where = queue.index, queue.state(), memory.host_addr
    link.tell_ring("SET_VRING_NUM", index, state.size)
    link.tell_ring("SET_VRING_BASE", index, state.vring_base())
    areas = where(state.desc_addr), where(state.used_addr), where(state.avail_addr)
    link.tell("SET_VRING_ADDR", protocol.VRING_ADDR.pack(index, 0, *areas, 0))
    link.tell("SET_VRING_ERR", protocol.U64.pack(index), [error.lend()])
    if call is None:
        link.tell("SET_VRING_CALL", protocol.U64.pack(index | protocol.VRING_NOFD))
    else:
        link.tell("SET_VRING_CALL", protocol.U64.pack(index), [call.lend()])
    link.tell("SET_VRING_KICK", protocol.U64.pack(index), [queue.kick.lend()])
    if link.enables_rings:
        link.tell_ring("SET_VRING_ENABLE", index, 1)


def stop_ring(link: Link, index: int) -> int:
    """Have the back end let go of a ring: where it stands then, as `QueueState.vring_base`."""
    asked = protocol.VRING_STATE.pack(index, 0)
    answered, base = link.ask_fields("GET_VRING_BASE", asked, protocol.VRING_STATE)
    if answered != index:
        raise BackEndError(f"answers GET_VRING_BASE of ring {index} for ring {answered}")
    return int(base)
