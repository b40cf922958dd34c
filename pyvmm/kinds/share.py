"""``--share DIR[:MOUNTPOINT][,readonly][,tag=TAG]``: a directory of this machine in the guest."""

from __future__ import annotations

import os
import re
from base64 import b64encode
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import handed
from pyvmm.kinds.interface import Context
from pyvmm.spec.options import Option
from pyvmm.spec.record import field, replace
from pyvmm.spec.vm import INTERNAL, INTERNAL_AND_SAVED, DeviceSpec, VmSpec

if TYPE_CHECKING:
    from contextlib import ExitStack
    from typing import TypedDict

    from pyvmm.host.virtiofsd import Served
    from pyvmm.kinds.border import Border, Crossing
    from pyvmm.kinds.interface import Table
    from pyvmm.virtio.vhost_user.device import VhostUserDevice

    class Keywords(TypedDict, total=False):
        """The keywords that `pyvmm.VM` takes."""

        shares: Spec | str | Table | Iterable[Spec | str | Table]


_FLAG = "--share"
_SYNTAX = "DIR[:MOUNTPOINT][,readonly][,tag=TAG]"
_TAG = re.compile(r"[A-Za-z0-9._-]{1,36}")
_LONGEST_MOUNTPOINT = 255  # bytes; it goes on the kernel's command line
# What a guest's init mounts over; it has a /tmp of its own where the root is a disk.
_OWN_OF_ANY = ("/dev", "/proc", "/run", "/sys")
_OWN_OF_DISKS = (*_OWN_OF_ANY, "/tmp")

OPTIONS = (
    Option(
        "shares",
        _FLAG,
        metavar=_SYNTAX,
        device="share",
        many=True,
        default=(),
        repeats=True,
        help="Share the directory DIR with the guest (virtiofs), at MOUNTPOINT in an image of "
        "pyvmm's, else by `mount -t virtiofs TAG …`; may be repeated. docs/shares.md has the rest.",
    ),
)


class Spec(DeviceSpec):
    """The directory `path`, which the guest finds as the file system `tag` and has at `mountpoint`,
    if that is not "". With `read_only` the guest can change nothing in it."""

    kind: ClassVar[str] = "share"

    path: str
    mountpoint: str = ""
    read_only: bool = False
    tag: str = ""
    # Where it is a 9p file system by this name, which has yet to be mounted at `path`.
    ninep: str = field(default="", metadata=INTERNAL)
    # Of a guest whose root is a directory of this machine: the root itself, or a part of that.
    is_root: bool = field(default=False, metadata=INTERNAL_AND_SAVED)
    is_part: bool = field(default=False, metadata=INTERNAL_AND_SAVED)
    # The file of a snapshot that says what the guest had open, and by which numbers.
    saved: str = field(default="", metadata=INTERNAL)

    @property
    def keeps(self) -> bool:
        """True if the guest's writes stay."""
        return not self.read_only

    @property
    def kernel_parameters(self) -> tuple[str, ...]:
        """The initramfs mounts it."""
        mode = "ro" if self.read_only else "rw"
        if self.is_root:
            return (f"pyvmm.root={self.tag}:{mode}",)
        if not self.mountpoint:
            return ()
        place = b64encode(self.mountpoint.encode()).decode()
        return (f"pyvmm.share={self.tag}:{mode}:{place}",)


def parse(text: str) -> Spec:
    """The device of ``--share TEXT``; a comma in a path is written twice. What follows the last
    colon is the mountpoint if it begins with a slash. Raises ConfigError."""
    place, *options = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    path, colon, mountpoint = place.rpartition(":")
    if not colon or not mountpoint.startswith("/"):
        path, mountpoint = place, ""
    tag, read_only = "", False
    for option in options:
        key, equals, value = option.partition("=")
        if key == "tag" and value:
            tag = value
        elif key in ("readonly", "ro") and not equals:
            read_only = True
        else:
            raise ConfigError(f"unknown option {option!r}", cure=f"use {_SYNTAX}", option=_FLAG)
    return Spec(path, mountpoint, read_only, tag)


def check_all(specs: Iterable[Spec], vm: VmSpec) -> list[Spec]:
    """Each with a tag of its own. Raises ConfigError for what cannot be shared."""
    specs, found = list(specs), list[Spec]()
    taken = {spec.tag for spec in specs if spec.tag}
    own = _OWN_OF_ANY if any(spec.is_root for spec in specs) else _OWN_OF_DISKS
    for number, spec in enumerate(specs):
        if not spec.tag:
            spec = replace(spec, tag=_free_tag(number, taken))
        _check(spec, own)
        for other in found:
            if other.tag == spec.tag:
                _refuse(f"two shares with the tag {spec.tag}", "give each its own")
            if other.mountpoint and other.mountpoint == spec.mountpoint:
                _refuse(f"two shares at {spec.mountpoint}", "mount them at different places")
        found.append(spec)
    return found


def _free_tag(number: int, taken: set[str]) -> str:
    while f"share{number}" in taken:
        number += 1
    taken.add(f"share{number}")
    return f"share{number}"


def _check(spec: Spec, own: tuple[str, ...]) -> None:
    if not _TAG.fullmatch(spec.tag):
        _refuse(f"{spec.tag!r:.100} is not a tag", "use 1 to 36 letters, digits, dots and dashes")
    place = spec.mountpoint
    if place:
        try:
            length = len(place.encode())
        except UnicodeEncodeError:
            _refuse(f"the mountpoint {place!r:.100} is not UTF-8", "use one that is")
        if place != os.path.normpath(place) or not re.match("/[^/]", place):
            _refuse(
                f"{place!r:.100} is not a place to mount it at", "use a path such as /home/user/src"
            )
        if length > _LONGEST_MOUNTPOINT:
            _refuse("the mountpoint is too long", f"use at most {_LONGEST_MOUNTPOINT} bytes")
        if any(place == one or place.startswith(f"{one}/") for one in own):
            _refuse(f"the guest's init mounts over {place}", "use another place, such as /mnt")
    if not spec.path:
        _refuse("no directory is named", f"use {_SYNTAX}")
    if not spec.ninep and not handed.present():  # or else whoever hands it over has looked
        _check_folder(spec)


def _check_folder(spec: Spec) -> None:
    place = spec.mountpoint
    if not os.path.lexists(spec.path):
        folder, _, rest = spec.path.rpartition(":")
        if rest and not place and os.path.isdir(folder):
            _refuse(f"{rest!r:.100} is no absolute path to mount {folder} at", "use one, as /mnt")
        _refuse(f"there is no {spec.path}", "check the path")
    if not os.path.isdir(spec.path):
        _refuse(f"{spec.path} is not a directory", "share the directory that it is in")
    if not os.access(spec.path, os.R_OK | os.X_OK):
        _refuse(f"{spec.path} is not yours to read", "share another, or change its mode")
    if os.path.realpath(spec.path) == "/" and not spec.read_only:
        _refuse("all of this machine's files would be the guest's to change", "add ,readonly")


def _refuse(what: str, cure: str) -> None:
    raise ConfigError(what, cure=cure, option=_FLAG)


def with_paths(spec: Spec, change: Callable[[str], str]) -> Spec:
    """`spec` with the directory where `change` says it is."""
    path = spec.path and change(spec.path)  # none is no folder, not the current one
    return replace(spec, path=path, saved=spec.saved and change(spec.saved))


def has_contents(spec: Spec) -> bool:
    """What virtiofsd has open for the guest; the directory's own contents are not in it."""
    return True


def contents_of(
    spec: Spec, device: VhostUserDevice
) -> tuple[int, Iterable[tuple[int, memoryview]]]:
    """The size of that, and its pieces."""
    from pyvmm.kinds.vhost_user import saved_state

    return saved_state.contents(device)


def with_contents(spec: Spec, path: str) -> Spec:
    """The share whose virtiofsd has open what the file at `path` says."""
    return replace(spec, saved=path)


def open_device(spec: Spec, context: Context) -> VhostUserDevice:
    """Start a virtiofsd for it, which ends with the device. Raises ConfigError."""
    from pyvmm.kinds.vhost_user import saved_state, types
    from pyvmm.vhost_user.protocol import BackEndError
    from pyvmm.virtio.vhost_user.device import VhostUserDevice

    state = saved_state.read(spec.saved)
    server = _server(spec)
    context.closing.callback(server.close)
    try:
        device = VhostUserDevice(
            server.folder,
            types.served("fs", 1, tag=spec.tag, mac=b""),
            name=f"share-{spec.tag}",
            queue_size=1024,
            connection=server.socket,
            state=state,
            server="virtiofsd",
        )
    except (BackEndError, HostError) as error:
        otherwise = str(error) if isinstance(error, BackEndError) else "ended"
        raise ConfigError(
            f"{spec.path} cannot be shared: {server.why_it_ended(otherwise)}", option=_FLAG
        ) from None
    context.closing.callback(device.close)
    if spec.packed and not device.knows_packed:
        _refuse("virtiofsd has no packed rings", "leave out packed")
    return device


def _server(spec: Spec) -> Served:
    """What serves the directory. Raises ConfigError."""
    from pyvmm import images
    from pyvmm.host import virtiofsd

    if handed.present():
        return virtiofsd.take_over(spec.path)
    if spec.ninep:
        _mount_9p(spec)
    return virtiofsd.serve(
        images.virtiofsd_command(True),
        os.path.realpath(spec.path),
        read_only=spec.read_only,
        keeps_owners=spec.is_root or spec.is_part,
        # An overlay takes nothing from beyond the mountpoints that it is told of.
        tells_mounts=not spec.is_root,
    )


def opens_by_name(spec: Spec) -> bool:
    """A directory, and a program."""
    return True


def hand_over(spec: Spec, closing: ExitStack) -> tuple[Spec, dict[str, int]]:
    """The socket of its virtiofsd, and what that says. Raises ConfigError."""
    from pyvmm import images
    from pyvmm.host import virtiofsd

    _check_folder(spec)
    command, path = images.virtiofsd_command(True), os.path.realpath(spec.path)
    return spec, virtiofsd.start_apart(command, path, closing, read_only=spec.read_only)


def _mount_9p(spec: Spec) -> None:
    """In an emulated host: the directory comes as a file system of its own."""
    import subprocess

    from pyvmm.emulated_host.spec import BUSYBOX

    os.makedirs(spec.path, exist_ok=True)
    options = "trans=virtio,version=9p2000.L,msize=512000,cache=none"
    done = subprocess.run(
        [BUSYBOX, "mount", "-t", "9p", "-o", options, spec.ninep, spec.path],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        text = " ".join(done.stderr.split())
        _refuse(f"it cannot be mounted in the emulated KVM host: {text}", "use --kvm host")


def cross(spec: Spec, border: Border) -> Crossing:
    """The directory is here, its virtiofsd in there: QEMU carries one to the other."""
    from pyvmm import images
    from pyvmm.emulated_host import HostFolder
    from pyvmm.emulated_host.foreign import path_inside
    from pyvmm.kinds.border import Crossing

    images.virtiofsd_command(True, border.machine)
    if spec.saved:
        spec = replace(spec, saved=border.visible(spec.saved, "--restore"))
    if border.runs:  # it sees all of this machine's files, and can change none
        if not spec.read_only:
            _refuse(
                "what the guest may change does not get into an emulated KVM host that runs",
                "add ,readonly, or share it from the start",
            )
        path = border.visible(spec.path, _FLAG)
        return Crossing(replace(spec, path=path_inside(path) if border.is_foreign else path))
    place = border.place("share")
    name = os.path.basename(place)
    folder = HostFolder(name, os.path.realpath(spec.path), spec.read_only)
    return Crossing(replace(spec, path=place, ninep=name), folders=(folder,))
