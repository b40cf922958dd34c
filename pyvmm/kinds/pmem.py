"""``--pmem FILE[,readonly]``: a file that the guest has as persistent memory, /dev/pmem0."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar

from pyvmm.errors import ConfigError, HostError
from pyvmm.kinds.interface import Context
from pyvmm.spec.options import Option, unknown_option
from pyvmm.spec.record import field, replace
from pyvmm.spec.vm import INTERNAL, DeviceSpec, VmSpec

if TYPE_CHECKING:
    from typing import TypedDict

    from pyvmm.host.files import ImageFile
    from pyvmm.kinds.border import Border, Crossing
    from pyvmm.kinds.interface import Table
    from pyvmm.virtio.pmem.device import PmemDevice

    class Keywords(TypedDict, total=False):
        """The keywords that `pyvmm.VM` takes."""

        pmem: Spec | str | Table | Iterable[Spec | str | Table]


_FLAG = "--pmem"
_SYNTAX = "FILE[,readonly][,packed]"
_TAKE_ANEW = "take a new snapshot"
_UNIT = 2 << 20  # what Linux can map: a part of a memory section (SUBSECTION_SIZE)

OPTIONS = (
    Option(
        "pmem",
        _FLAG,
        metavar=_SYNTAX,
        device="pmem",
        many=True,
        default=(),
        repeats=True,
        help="Give the guest FILE as persistent memory, /dev/pmem0 and so on, whose pages it uses "
        "in place (mount -o dax); may be repeated.",
    ),
)


class Spec(DeviceSpec):
    """The file or block device at `path` as persistent memory. With `read_only` what the guest
    writes is dropped."""

    kind: ClassVar[str] = "pmem"

    path: str
    read_only: bool = False
    name: str = field(default="", metadata=INTERNAL)
    # The file of a snapshot that it begins with; what the guest changes is gone at its end.
    saved: str = field(default="", metadata=INTERNAL)

    @property
    def keeps(self) -> bool:
        """True if the file keeps the guest's writes."""
        return not self.read_only and not self.saved


def parse(text: str) -> Spec:
    """The device of ``--pmem TEXT``; a comma in the path is written twice. Raises ConfigError."""
    path, *options = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    for option in options:
        if option not in ("readonly", "ro"):
            known = ("readonly", "ro", "packed")
            raise unknown_option(option, known, usage=f"use {_SYNTAX}", flag=_FLAG)
    return Spec(path, read_only=bool(options))


def check_all(specs: Iterable[Spec], vm: VmSpec) -> list[Spec]:
    """Each called as its device in the guest. Raises ConfigError for one without a path."""
    specs = list(specs)
    if not all(spec.path for spec in specs):
        raise ConfigError("no file is named", cure=f"use {_SYNTAX}", option=_FLAG)
    return [replace(spec, name=f"pmem{number}") for number, spec in enumerate(specs)]


def with_paths(spec: Spec, change: Callable[[str], str]) -> Spec:
    """`spec` with the file where `change` says it is."""
    return replace(spec, path=change(spec.path), saved=spec.saved and change(spec.saved))


def images_of(spec: Spec) -> tuple[str, ...]:
    """The file, if the guest cannot write to it: then a snapshot need not have it."""
    return (spec.path,) if spec.read_only else ()


def has_contents(spec: Spec) -> bool:
    """A snapshot must have them: the guest, or its monitor's user, goes on to change the file."""
    return not spec.read_only


def contents_of(spec: Spec, device: PmemDevice) -> tuple[int, Iterable[tuple[int, memoryview]]]:
    """The size of its memory, and the pieces of it that may not be zero."""
    return device.size, device.contents()


def with_contents(spec: Spec, path: str) -> Spec:
    """The device whose memory begins as the file at `path` is, which stays as it is."""
    return replace(spec, saved=path)


def open_device(spec: Spec, context: Context) -> PmemDevice:
    """The device, with the file in the guest's memory. Raises ConfigError for a file that cannot be
    that."""
    from pyvmm.virtio.device import SharedMemory
    from pyvmm.virtio.pmem.device import PmemDevice

    if spec.saved:
        return _open_saved(spec, context)
    file = _open(spec, context.closing)
    try:
        place = context.map_file(file.fd, file.size, spec.read_only, None)
    except HostError as error:
        raise ConfigError(
            f"{spec.path} cannot be mapped: {error}",
            cure="put it on another file system",
            option=_FLAG,
        ) from None
    return PmemDevice(file.fd, SharedMemory(place, file.size), name=spec.name)


def _open_saved(spec: Spec, context: Context) -> PmemDevice:
    from pyvmm.host import syscalls
    from pyvmm.memory.private_memory import PrivateMemory
    from pyvmm.virtio.device import SharedMemory
    from pyvmm.virtio.pmem.device import PmemDevice

    fd = syscalls.open_file(spec.saved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    context.closing.callback(os.close, fd)
    size = os.fstat(fd).st_size
    if size == 0 or size % _UNIT:
        raise ConfigError(f"the saved memory of {spec.name} has {size} bytes", cure=_TAKE_ANEW)
    private = PrivateMemory([(0, size)], fd)
    context.closing.callback(private.close)
    place = context.map_file(fd, size, False, private)
    return PmemDevice(fd, SharedMemory(place, size), name=spec.name, private=private)


def cross(spec: Spec, border: Border) -> Crossing:
    """Opened and locked here; in the emulated host it is a block device."""
    from pyvmm.emulated_host import HostDisk
    from pyvmm.kinds.border import Crossing

    if spec.saved:
        return Crossing(replace(spec, saved=border.visible(spec.saved, "--restore")))
    file = _open(spec, border.closing)
    disk = HostDisk(spec.path, spec.read_only, file.fd)
    return Crossing(replace(spec, path=os.path.realpath(spec.path)), disks=(disk,))


def _open(spec: Spec, closing: ExitStack) -> ImageFile:
    """The file, open and locked until `closing` ends."""
    from pyvmm.host import log
    from pyvmm.host.files import open_image

    file = open_image(spec.path, read_only=spec.read_only, raw=False, option=_FLAG)
    closing.callback(file.close)
    for hint in file.hints:
        log.to_stderr(hint)
    size = os.lseek(file.fd, 0, os.SEEK_END)  # a disk's would be without an odd tail
    if size == 0 or size % _UNIT:
        enough = max(1, -(-size // _UNIT)) * _UNIT
        cure = f"truncate -s {enough >> 20}M {spec.path}"
        raise ConfigError(
            f"{spec.path} has {size} bytes, and memory comes in pieces of 2 MiB",
            cure="use a partition of whole 2 MiB" if file.is_block_device else f"{cure} mends it",
            option=_FLAG,
        )
    return file
