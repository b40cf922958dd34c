"""The machine's end of the relay for Unix sockets."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

from pyvmm.emulated_host.disks import DiskService
from pyvmm.emulated_host.plugs import Plugger
from pyvmm.emulated_host.ports import Port
from pyvmm.emulated_host.qmp import Qmp
from pyvmm.emulated_host.spec import EmulatedHostSpec, Plugs
from pyvmm.errors import HostError
from pyvmm.host import log, unix_sockets
from pyvmm.host.syscalls import allow_descriptors
from pyvmm.host.unix_sockets import Socket
from pyvmm.relay import DISK_SERVICE
from pyvmm.relay.frames import DESCRIPTORS, SLOTS
from pyvmm.relay.multiplexer import OUTSIDE, Listener, Multiplexer


def outside_end(spec: EmulatedHostSpec, ports: list[Port], qmp: Qmp) -> Multiplexer | None:
    """The relay for what `spec` lists, not yet started; None if it lists no sockets.

    The disks can be resized through it, by `qmp`.
    """
    if not spec.has_relay:
        return None
    port = next(port for port in ports if port.name == "relay")
    allow_descriptors(DESCRIPTORS)
    disks = DiskService(spec, qmp)
    services = {DISK_SERVICE: disks.connect, **spec.services}
    plugger = Plugger(spec, qmp, disks)

    def plugs_for(path: str) -> Plugs:
        return Plugs(
            plugger.plug_disk,
            plugger.plug_stream,
            lambda path: made.connect(path),
            lambda socket, said: made.take_back(socket, path, said),
        )

    listeners = [
        Listener(
            item.socket,
            item.path,
            item.owner_only,
            None if item.take is None else partial(_take, item.take, plugs_for(item.path)),
            SLOTS if item.most is None else item.most,
        )
        for item in spec.sockets_in
    ]

    def reach(name: str) -> Socket:
        service = services.get(name)
        if service is not None:
            return service()
        if any(allows(allowed, name) for allowed in spec.sockets_out):
            return connect_now(name)
        raise HostError(errno.EACCES, f"connection to {name}")

    def say(reason: str) -> None:
        log.to_stderr(f"sockets into the emulated KVM host are cut off: {reason}")

    made = Multiplexer(port.ours.fileno(), OUTSIDE, reach=reach, listeners=listeners, on_broken=say)
    return made


def _take(
    take: Callable[[bytes, Plugs], Callable[[Socket, bytes], None] | None],
    plugs: Plugs,
    said: bytes,
) -> Callable[[Socket, bytes], None] | None:
    return take(said, plugs)


def connect_now(path: str) -> Socket:
    """A connection to `path`. Raises HostError, as `unix_sockets.connect` does.

    A listener with as many waiting as it wants refuses it, as it does where the monitor runs here:
    else the device that asks would wait for it, with all its other streams.
    """
    try:
        return unix_sockets.connect(path)
    except HostError as error:
        number = errno.ECONNREFUSED if error.errno == errno.EAGAIN else error.errno
        raise HostError(number, error.call) from None


def allows(allowed: str, path: str) -> bool:
    """True if `allowed`, of EmulatedHostSpec.sockets_out, stands for `path`."""
    if not allowed.endswith("*"):
        return path == allowed
    number = path.removeprefix(allowed[:-1])
    return number != path and number.isascii() and number.isdigit()
