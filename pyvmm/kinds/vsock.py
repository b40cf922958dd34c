"""``--vsock [cid=N][,path=PATH]``: sockets between the guest and programs of the host.

Without a path (``--agent``) the guest is reached through the control socket only.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar

from pyvmm.errors import ConfigError
from pyvmm.host.named_listener import NamedListener
from pyvmm.kinds.registry import Context, Crossing
from pyvmm.spec.vm import DeviceSpec
from pyvmm.virtio.vsock.device import VsockDevice
from pyvmm.virtio.vsock.host_side import LONGEST_SUFFIX
from pyvmm.virtio.vsock.uapi import HIGHEST_GUEST_CID, LOWEST_GUEST_CID

_INSIDE = "/run/pyvmm-vsock"
_OPTION = "--vsock"
_PATH_BYTES = 107  # sun_path of <linux/un.h>, less the NUL: programs cannot name a longer one
_USAGE = "use [cid=N][,path=PATH][,packed]"


@dataclass(frozen=True)
class Spec(DeviceSpec):
    """The guest's context id, and the path of the socket that the host's programs connect to, or
    ""."""

    kind: ClassVar[str] = "vsock"

    path: str = ""
    cid: int = LOWEST_GUEST_CID
    listen_at: str = ""  # where the socket really is, if `path` is on another machine


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
            raise ConfigError(f"unknown option {option!r}", cure=_USAGE, option=_OPTION)
    if not (cid.isascii() and cid.isdigit()):
        raise ConfigError(f"cannot read the cid {cid!r}", cure=_USAGE, option=_OPTION)
    return Spec(path, int(cid[:20]))


def check(spec: Spec) -> Spec:
    """`spec`, or ConfigError for a cid or a path that cannot be."""
    if not LOWEST_GUEST_CID <= spec.cid <= HIGHEST_GUEST_CID:
        raise ConfigError(
            f"a guest cannot have the cid {spec.cid}",
            cure=f"use {LOWEST_GUEST_CID} to {HIGHEST_GUEST_CID}",
            option=_OPTION,
        )
    longest = _PATH_BYTES - LONGEST_SUFFIX  # room for the sockets that the guest connects to
    if len(os.fsencode(spec.path)) > longest:
        raise ConfigError(
            f"the path {spec.path} is too long for a socket",
            cure=f"use at most {longest} bytes",
            option=_OPTION,
        )
    return spec


def open_device(spec: Spec, context: Context) -> VsockDevice:
    """A device that listens at the path, if it has one. Raises ConfigError if that cannot be."""
    if not spec.path:
        return VsockDevice(spec.cid, trace=context.trace)
    listener = NamedListener(spec.listen_at or spec.path, option=_OPTION)
    context.closing.callback(listener.close)
    return VsockDevice(spec.cid, listener.socket, spec.path, trace=context.trace)


def cross(spec: Spec, closing: ExitStack) -> Crossing:
    """The socket stays here, as do those that the guest connects to."""
    if not spec.path:
        return Crossing(spec)
    path = os.path.abspath(spec.path)
    listener = NamedListener(path, option=_OPTION)
    closing.callback(listener.close)
    inside = replace(spec, path=path, listen_at=_INSIDE)
    return Crossing(inside, ((listener, _INSIDE),), (f"{path}_*",))
