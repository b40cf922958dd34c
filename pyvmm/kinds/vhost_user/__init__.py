"""``--vhost-user socket=PATH,type=TYPE``: a device that another process serves, by its socket."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pyvmm.errors import ConfigError, HostError
from pyvmm.kinds.interface import Context
from pyvmm.spec.options import Option
from pyvmm.spec.record import field, replace
from pyvmm.spec.vm import INTERNAL, DeviceSpec

if TYPE_CHECKING:
    from typing import TypedDict

    from pyvmm.kinds.border import Border, Crossing
    from pyvmm.kinds.interface import Table
    from pyvmm.virtio.vhost_user.device import VhostUserDevice

    class Keywords(TypedDict, total=False):
        """The keyword arguments that `pyvmm.VM` takes."""

        vhost_user: Spec | str | Table | Iterable[Spec | str | Table]


_FLAG = "--vhost-user"
SYNTAX = (
    "socket=PATH,type=blk|net|fs|rng|…[,queues=N][,queue-size=N][,tag=TAG][,mac=ADDRESS]"
    "[,reconnect=SECONDS][,packed]"
)
MOST_QUEUES = 16
LARGEST_QUEUE = 1024
LONGEST_WAIT = 86400  # seconds
_START = 2.0  # seconds for a back end that was started with us to listen
_STEP = 0.02

OPTIONS = (
    Option(
        "vhost_user",
        _FLAG,
        metavar="socket=PATH,type=TYPE[,OPTIONS]",
        device="vhost_user",
        many=True,
        default=(),
        repeats=True,
        help="Add a device that the vhost-user back end at PATH serves: of TYPE blk, net, fs, rng "
        "or another; may be repeated. docs/transports.md has the other options.",
    ),
)


class Spec(DeviceSpec):
    """A device of `type` that the back end at the Unix socket `socket` serves.

    `queues` are those of which a device can have several (a card's pairs); each has up to
    `queue_size` entries. `tag` is the name of a file system, `mac` a card's address. A back end
    that dies may be followed by another one within `reconnect` seconds.
    """

    kind: ClassVar[str] = "vhost_user"

    socket: str
    type: str
    queues: int = 1
    queue_size: int = 128
    tag: str = ""
    mac: str = ""
    reconnect: int = 30
    # The file of a snapshot with what the back end of another VM has known of its device.
    saved: str = field(default="", metadata=INTERNAL)

    @property
    def keeps(self) -> bool:
        """The back end may."""
        return self.type in ("blk", "fs", "scsi")


_KEYS = {
    "socket": str,
    "type": str,
    "queues": int,
    "queue-size": int,
    "tag": str,
    "mac": str,
    "reconnect": int,
}


def parse(text: str) -> Spec:
    """The device of ``--vhost-user TEXT``; a comma in the path is written twice. Raises
    ConfigError."""
    fields: dict[str, Any] = {}
    for option in text.replace(",,", "\0").split(","):
        key, _, value = option.replace("\0", ",").partition("=")
        kind = _KEYS.get(key)
        if kind is None or not value:
            raise _wrong(f"unknown option {option!r}")
        if kind is int and not (value.isascii() and value.isdigit() and len(value) < 10):
            raise _wrong(f"{value!r} is not a number for {key}")
        fields[key.replace("-", "_")] = kind(value)
    for key in ("socket", "type"):
        if key not in fields:
            raise _wrong(f"no {key}= in {text!r}")
    return Spec(**fields)


def _wrong(what: str) -> ConfigError:
    return ConfigError(what, cure=f"use {SYNTAX}", option=_FLAG)


def check_all(specs: Iterable[Spec], vm: Any) -> list[Spec]:
    """Each checked, and no tag twice. Raises ConfigError."""
    found = [_check(spec) for spec in specs]
    tags = [spec.tag for spec in found if spec.tag]
    for tag in tags:
        if tags.count(tag) > 1:
            raise ConfigError(
                f"two file systems with the tag {tag}", cure="give each its own", option=_FLAG
            )
    return found


def _check(spec: Spec) -> Spec:
    from pyvmm.kinds import net
    from pyvmm.kinds.vhost_user.types import TAG_BYTES, TYPES

    if spec.type not in TYPES:
        raise ConfigError(
            f"unknown type {spec.type!r:.100}", cure=f"use {', '.join(TYPES)}", option=_FLAG
        )
    if not spec.socket:
        raise _wrong("no socket")
    for what, value, least, most in (
        ("queues", spec.queues, 1, MOST_QUEUES if spec.type in ("blk", "fs", "scsi") else 1),
        ("queue-size", spec.queue_size, 2, LARGEST_QUEUE),
        ("reconnect", spec.reconnect, 0, LONGEST_WAIT),
    ):
        if not least <= value <= most:
            raise _wrong(f"{what}={value} of type {spec.type} is not between {least} and {most}")
    if spec.queue_size & (spec.queue_size - 1):
        raise _wrong(f"queue-size={spec.queue_size} is not a power of two")
    if spec.tag and (spec.type != "fs" or len(spec.tag.encode(errors="replace")) > TAG_BYTES):
        raise _wrong(f"tag={spec.tag:.100}: only fs has one, of {TAG_BYTES} bytes at most")
    if spec.type != "net":
        if spec.mac:
            raise _wrong("mac= is a network card's")
        return spec
    mac = spec.mac or net.random_mac()
    net.mac_bytes(mac)
    return replace(spec, mac=mac)


def with_paths(spec: Spec, change: Callable[[str], str]) -> Spec:
    """`spec` with the socket where `change` says it is."""
    return replace(spec, socket=change(spec.socket), saved=spec.saved and change(spec.saved))


def has_contents(spec: Spec) -> bool:
    """What the back end alone knows of its device, if there is such a thing."""
    from pyvmm.kinds.vhost_user.types import STATELESS

    return spec.type not in STATELESS


def contents_of(
    spec: Spec, device: VhostUserDevice
) -> tuple[int, Iterable[tuple[int, memoryview]]]:
    """The size of that, and its pieces."""
    from pyvmm.kinds.vhost_user import saved_state

    return saved_state.contents(device)


def with_contents(spec: Spec, path: str) -> Spec:
    """The device whose back end is told what the file at `path` has."""
    return replace(spec, saved=path)


def for_copy(spec: Spec, name: str) -> Spec:
    """Raises ConfigError: a back end serves one VM."""
    raise ConfigError(
        f"copies cannot share the back end at {spec.socket}",
        cure="use --disk or --net user in a VM that is to be copied",
    )


def open_device(spec: Spec, context: Context) -> VhostUserDevice:
    """Connect to the back end. Raises ConfigError for one that is not there, or of no use."""
    from pyvmm.kinds import net
    from pyvmm.kinds.vhost_user import saved_state, types
    from pyvmm.vhost_user.protocol import BackEndError
    from pyvmm.virtio.vhost_user.device import VhostUserDevice

    served = types.served(
        spec.type,
        spec.queues,
        tag=spec.tag,
        mac=net.mac_bytes(spec.mac) if spec.type == "net" else b"",
    )
    state = saved_state.read(spec.saved)
    give_up_at = time.monotonic() + _START
    while True:
        try:
            device = VhostUserDevice(
                spec.socket,
                served,
                name=f"vhost-user-{spec.type}",
                queue_size=spec.queue_size,
                reconnect=spec.reconnect,
                state=state,
            )
            break
        except HostError as error:
            listens_soon = error.errno in (errno.ENOENT, errno.ECONNREFUSED)
            if not listens_soon or time.monotonic() > give_up_at:
                raise ConfigError(
                    f"no back end can be reached: {error}", cure="start it first", option=_FLAG
                ) from None
            time.sleep(_STEP)
        except BackEndError as error:
            raise ConfigError(
                f"the back end at {spec.socket} {error}",
                cure="is it one for this type?",
                option=_FLAG,
            ) from None
    context.closing.callback(device.close)
    if spec.packed and not device.knows_packed:
        raise ConfigError(
            f"the back end at {spec.socket} has no packed rings",
            cure="leave out packed",
            option=_FLAG,
        )
    return device


def cross(spec: Spec, border: Border) -> Crossing:
    """Raises ConfigError: the memory of a guest in there cannot be lent to a process out here."""
    raise ConfigError(
        f"the back end at {spec.socket} runs on this machine, and cannot have memory of a guest in "
        "the emulated KVM host",
        cure="use a machine with KVM that can boot Linux (pyvmm doctor)",
        option=_FLAG,
    )
