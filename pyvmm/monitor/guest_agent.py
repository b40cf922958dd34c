"""The guest's agent, for the monitor itself: by the vsock device, without the control socket."""

from __future__ import annotations

import errno
import os
import time
from contextlib import closing
from typing import TYPE_CHECKING

from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
from pyvmm.machine.machine import Machine

if TYPE_CHECKING:
    from pyvmm.agent import Agent
    from pyvmm.virtio.vsock.device import VsockDevice


def vsock_of(machine: Machine) -> VsockDevice | None:
    """The device by which an agent may be reached."""
    prepared = machine.parts.prepared
    if not any(device.kind == "vsock" for device in prepared.spec.devices):
        return None
    from pyvmm.virtio.vsock.device import VsockDevice

    found = (device for device in prepared.devices if isinstance(device, VsockDevice))
    return next((device for device in found if device.has_driver), None)


def agent_at(vsock: VsockDevice, seconds: float) -> Agent:
    """The agent behind `vsock`, which has so many seconds to answer."""
    from pyvmm.agent import PORT, Agent

    deadline = time.monotonic() + seconds
    return Agent(lambda: _call(vsock, PORT, deadline))


def _call(vsock: VsockDevice, port: int, deadline: float) -> unix_sockets.Socket:
    """A stream to `port` of the guest. Raises HostError, ECONNREFUSED if nobody listens there."""
    from pyvmm.control.client import line_or_end

    ours, theirs = unix_sockets.pair()
    try:
        vsock.call(theirs, port)
    except HostError:
        ours.close()
        theirs.close()
        raise
    with closing(ours):
        if not line_or_end(ours, deadline).startswith(b"OK "):
            raise HostError(errno.ECONNREFUSED, f"port {port} of the guest")
        return unix_sockets.adopt(os.dup(ours.fileno()))
