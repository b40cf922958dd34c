"""``--vsock [cid=N][,path=PATH]``: sockets between the guest and programs of the host.

Without a path (``--agent``) the guest is reached through the control socket only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pyvmm.errors import ConfigError, HostError
from pyvmm.kinds.interface import Context, Running
from pyvmm.spec.options import FLAG, OPTIONAL, Option, unknown_option
from pyvmm.spec.record import field, replace
from pyvmm.spec.vm import INTERNAL, DeviceSpec
from pyvmm.virtio.vsock.uapi import HIGHEST_GUEST_CID, LOWEST_GUEST_CID

if TYPE_CHECKING:
    from typing import TypedDict

    from pyvmm.control.protocol import Method, Upgrade
    from pyvmm.host.unix_sockets import Socket
    from pyvmm.kinds.border import Border, Crossing
    from pyvmm.kinds.interface import Table
    from pyvmm.virtio.vsock.device import VsockDevice

    class Keywords(TypedDict, total=False):
        """The keywords that `pyvmm.VM` takes."""

        vsock: Spec | bool | str | Table


_FLAG = "--vsock"
_SYNTAX = "[cid=N][,path=PATH][,packed]"
_MOST_OWN = 0x7FFF_FFFF  # some programs take a CID for a signed number
_PATH_BYTES = 107  # sun_path of <linux/un.h>, less the NUL: programs cannot name a longer one

OPTIONS = (
    Option(
        "vsock",
        _FLAG,
        metavar=_SYNTAX,
        device="vsock",
        shape=OPTIONAL,
        help="Add a virtio-vsock device. A program connects to the socket at PATH and sends "
        "CONNECT PORT; a guest that connects to port N of CID 2 reaches the listener at PATH_N. "
        "Without a path there is the control socket's way: pyvmm exec, pyvmm cp.",
    ),
    Option(
        "agent",
        "--agent",
        shape=FLAG,
        stands_for="vsock",
        not_in_files="write vsock = true, which is what --agent does",
        help="Have pyvmm exec and cp reach the guest: a vsock device.",
    ),
)


class Spec(DeviceSpec):
    """The guest's context id, and the path of the socket that the host's programs connect to, or
    ""."""

    kind: ClassVar[str] = "vsock"

    path: str = ""
    cid: int = LOWEST_GUEST_CID
    # Where the socket really is, if `path` is on another machine.
    listen_at: str = field(default="", metadata=INTERNAL)


def parse(text: str) -> Spec:
    """The device of ``--vsock``; a comma in the path is written twice. Raises ConfigError."""
    path, cid = "", str(LOWEST_GUEST_CID)
    for option in text.replace(",,", "\0").split(",") if text else ():
        key, _, value = option.replace("\0", ",").partition("=")
        if key == "path" and value:
            path = value
        elif key == "cid" and value:
            cid = value
        else:
            known = ("path", "cid", "packed")
            raise unknown_option(option, known, usage=f"use {_SYNTAX}", flag=_FLAG)
    if not (cid.isascii() and cid.isdigit()):
        raise ConfigError(f"cannot read the cid {cid!r}", cure=f"use {_SYNTAX}", option=_FLAG)
    return Spec(path, int(cid[:20]))


def with_paths(spec: Spec, change: Callable[[str], str]) -> Spec:
    """`spec` with the socket's path as `change` gives it."""
    return replace(spec, path=change(spec.path)) if spec.path else spec


def for_copy(spec: Spec, name: str) -> Spec:
    """`spec` for the VM `name`, a copy of one that has this: with a CID and a path of its own."""
    own = LOWEST_GUEST_CID + int.from_bytes(os.urandom(4)) % (_MOST_OWN - LOWEST_GUEST_CID)
    return replace(spec, cid=own, path=f"{spec.path}-{name}" if spec.path else "")


def check(spec: Spec) -> Spec:
    """`spec`, or ConfigError for a cid or a path that cannot be."""
    if not LOWEST_GUEST_CID <= spec.cid <= HIGHEST_GUEST_CID:
        raise ConfigError(
            f"a guest cannot have the cid {spec.cid}",
            cure=f"use {LOWEST_GUEST_CID} to {HIGHEST_GUEST_CID}",
            option=_FLAG,
        )
    from pyvmm.virtio.vsock.host_side import LONGEST_SUFFIX

    longest = _PATH_BYTES - LONGEST_SUFFIX  # room for the sockets that the guest connects to
    if len(os.fsencode(spec.path)) > longest:
        raise ConfigError(
            f"the path {spec.path!r:.100} is too long for a socket",
            cure=f"use at most {longest} bytes",
            option=_FLAG,
        )
    return spec


def open_device(spec: Spec, context: Context) -> VsockDevice:
    """A device that listens at the path, if it has one. Raises ConfigError if that cannot be."""
    from pyvmm.virtio.vsock.device import VsockDevice

    if not spec.path:
        return VsockDevice(spec.cid, trace=context.trace)
    from pyvmm.host.named_listener import NamedListener

    listener = NamedListener(spec.listen_at or spec.path, option=_FLAG)
    context.closing.callback(listener.close)
    return VsockDevice(spec.cid, listener.socket, spec.path, trace=context.trace)


def cross(spec: Spec, border: Border) -> Crossing:
    """The socket stays here, as do those that the guest connects to."""
    from pyvmm.kinds.border import Crossing

    if not spec.path:
        return Crossing(spec)
    from pyvmm.host.named_listener import NamedListener

    path = os.path.abspath(spec.path)
    listener = NamedListener(path, option=_FLAG)
    border.closing.callback(listener.close)
    place = border.place("vsock")
    return Crossing(replace(spec, path=path, listen_at=place), ((listener, place),), (f"{path}_*",))


# --- at run time ----------------------------------------------------------------------------------


def methods(running: Running) -> dict[str, Method]:
    """The methods of the control socket for a socket device."""
    from pyvmm.control.protocol import Method, executes

    return {
        "vsock.connect": Method(partial(_connect, running), needs={"port": int}, right=executes)
    }


def _connect(running: Running, port: int) -> Upgrade:
    """Make the connection one to a port of the guest. Raises ConfigError if there is no such port,
    or no socket device; ControlError as long as the guest has no driver for it, or the VM is
    paused."""
    from pyvmm.control.protocol import NOT_READY, PAUSED, ControlError, Upgrade

    if not 0 <= port < 1 << 32:
        raise ConfigError(f"there is no port {port}", cure="use 0 to 4294967295")
    device = _device(running)
    if running.paused():
        raise ControlError(PAUSED, f"{running.spec.name} is paused")
    if not device.has_driver:
        raise ControlError(NOT_READY, "the guest has no driver for its vsock device yet")

    def hand_over(connection: Socket, received: bytes) -> None:
        # Bytes that a client sends before it has seen OK would be lost: no client shall do that.
        if received:
            connection.close()
            return
        try:
            device.call(connection, port)
        except HostError:  # the driver has just gone
            connection.close()

    return Upgrade({}, hand_over)


def _device(running: Running) -> VsockDevice:
    for _, device in running.of_kind("vsock"):
        found: VsockDevice = device
        return found
    raise ConfigError("the VM has no vsock device", cure="run it with --agent, or --vsock")
