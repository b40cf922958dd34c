"""``--disk PATH[,OPTION...]``: a virtio-blk disk. Here are its options, parsed and checked.

storage.py      the storage that a disk names, opened: raw files, ram:, qcow2, and in layers
user.py         the storage that a class of the user's is
resize.py       resized at run time, for the control socket
outside.py      the same from inside an emulated host, where the file is another machine's
crossing.py     how it gets into an emulated host
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pyvmm.errors import ConfigError
from pyvmm.kinds.interface import Context, Reader, Running
from pyvmm.spec import rates
from pyvmm.spec.options import Option, as_list, read_path, unknown_option
from pyvmm.spec.record import replace
from pyvmm.spec.sizes import DIGITS
from pyvmm.spec.vm import DiskSpec, VmSpec

if TYPE_CHECKING:
    from contextlib import ExitStack
    from typing import TypedDict

    from pyvmm.control.protocol import Method
    from pyvmm.kinds.border import Border, Crossing
    from pyvmm.kinds.interface import Path, Table
    from pyvmm.virtio.blk.device import BlockDevice

    class Keywords(TypedDict, total=False):
        """The keywords that `pyvmm.VM` takes."""

        disks: DiskSpec | Path | Table | Iterable[DiskSpec | Path | Table]


FLAG = "--disk"
MAX_ID_BYTES = 20  # VIRTIO_BLK_ID_BYTES: the driver reads the id by VIRTIO_BLK_T_GET_ID
ON_ERROR = ("report", "stop")
BLOCK_SIZES = (512, 1024, 2048, 4096)  # what Linux takes for a logical block on x86
FORMATS = ("raw", "qcow2")
SYNTAX = (
    "PATH[,readonly][,direct][,snapshot][,overlay=FILE][,format=raw|qcow2]"
    "[,backing=FILE][,data-file=FILE][,id=NAME]"
    "[,block-size=BYTES][,on-error=report|stop][,queues=N][,packed]" + rates.SYNTAX
)

OPTIONS = (
    Option(
        "disks",
        FLAG,
        metavar="PATH[,OPTION...]",
        field="disks",
        device="disk",
        many=True,
        default=(),
        repeats=True,
        after="--kernel",
        help="Image, block device, ram:SIZE or FILE.py:CLASS, served by virtio-blk; may be "
        "repeated. The first is /dev/vda and the root disk. snapshot and overlay=FILE leave the "
        "image as it is.",
    ),
)

NOTE = """\
Disk options:
  readonly, direct (O_DIRECT), snapshot (changes are thrown away), overlay=FILE
  (changes are kept there), format=raw|qcow2 (else by name), backing=FILE and
  data-file=FILE (what a qcow2 image may open beside itself), id=NAME,
  block-size=BYTES, on-error=report|stop; bytes and requests a second at most:
  bps=N, iops=N, bps-burst=N, iops-burst=N; a class's own for FILE.py:CLASS
"""

# What stands in a --disk option → the field of DiskSpec.
_FLAGS = {name: name for name in ("direct", "snapshot", "packed")}
_FLAGS |= {"readonly": "read_only", "ro": "read_only"}
_VALUES = {name: name for name in ("id", "format", "overlay", "queues")}
_VALUES |= {"block-size": "block_size", "on-error": "on_error", **rates.KEYS}
_WORDS = (*_FLAGS, *_VALUES, "backing", "data-file")
_CHOICES: dict[str, tuple[object, ...]] = {
    "block-size": BLOCK_SIZES,
    "on-error": ON_ERROR,
    "format": FORMATS,
}

Spec = DiskSpec


# --- from values, and back ------------------------------------------------------------------------


def read(value: Any, option: Option, usual: Reader) -> list[DiskSpec]:
    """The disks that a value describes. Raises ConfigError."""
    return [_read_disk(one, option) for one in as_list(value)]


def _read_disk(value: Any, option: Option) -> DiskSpec:
    if isinstance(value, DiskSpec):
        return value
    if isinstance(value, Mapping):
        from pyvmm.spec import tables

        found = tables.read(DiskSpec, value, option.name)
        if not found.path:
            raise ConfigError("a disk without a path", option=option.flag)
        return found
    return parse(read_path(value, option))


def parse(text: str) -> DiskSpec:
    """The disk that ``PATH[,OPTION...]`` describes, as SYNTAX has it. Raises ConfigError.

    A comma in the path or in a value is written twice.
    """
    path, *options = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    fields: dict[str, Any] = {}
    arguments: list[tuple[str, str]] = []
    is_python = DiskSpec(path).storage == "python"
    for option in options:
        key, equals, value = option.partition("=")
        if key in _FLAGS and not equals:
            fields[_FLAGS[key]] = True
        elif key in _VALUES and value:
            fields[_VALUES[key]] = _value(key, value)
        elif key == "backing" and value and not is_python:
            fields[key] = (*fields.get(key, ()), value)
        elif key == "data-file" and value and not is_python:
            fields["data_file"] = value
        elif is_python and equals and key.isidentifier():
            arguments.append((key, value))
        else:
            usage = f"use {SYNTAX}; a comma in the path is written twice"
            what, where = "disk option", f" in {text!r}"
            raise unknown_option(option, _WORDS, usage=usage, flag=FLAG, what=what, where=where)
    if not path:
        raise ConfigError(f"no path in {text!r}", cure="use PATH[,readonly]", option=FLAG)
    disk = DiskSpec(path, arguments=tuple(arguments), **fields)
    _check_options(disk)
    return disk


def _value(key: str, value: str) -> object:
    if key == "queues":
        if not (value.isascii() and value.isdigit() and len(value) <= DIGITS):
            raise ConfigError(f"cannot read {value!r} as a number", cure="write queues=4")
        return int(value)
    if key in rates.KEYS:
        return rates.parse_rate(key, value, FLAG)
    choices = _CHOICES.get(key, ())
    for choice in choices:
        if value == str(choice):
            return choice
    if choices:
        raise _not_among(key, value, choices)
    return value


def _not_among(key: str, value: object, choices: tuple[object, ...]) -> ConfigError:
    return ConfigError(
        f"{key} cannot be {value!r:.100}",
        cure=f"choose from {', '.join(map(str, choices))}",
        option=FLAG,
    )


def plain(specs: list[DiskSpec], option: Option) -> tuple[dict[str, Any], ...]:
    """The values that a file has for all disks: a table for each."""
    return tuple(_table(index, disk) for index, disk in enumerate(specs))


def _table(index: int, disk: DiskSpec) -> dict[str, Any]:
    from pyvmm.spec import tables

    table = tables.write(disk)
    if table.get("id") == _usual_id(index):  # which it would have been given anyway
        del table["id"]
    return table


def _usual_id(index: int) -> str:
    return f"disk{index}"


def with_paths(disk: DiskSpec, change: Callable[[str], str]) -> DiskSpec:
    """`disk` with all its files as `change` gives them."""
    return replace(
        disk,
        path=disk.path if disk.storage == "ram" else change(disk.path),
        overlay=None if disk.overlay is None else change(disk.overlay),
        backing=tuple(map(change, disk.backing)),
        data_file=None if disk.data_file is None else change(disk.data_file),
        saved=None if disk.saved is None else change(disk.saved),
    )


def code_of(disk: DiskSpec) -> str:
    """The file that is run, and its class, if it is such a disk."""
    return disk.path if disk.storage == "python" else ""


def from_plain(values: Mapping[str, Any]) -> DiskSpec:
    """The disk whose `asdict` JSON has made `values` of."""
    arguments = tuple((str(name), str(value)) for name, value in values["arguments"])
    return DiskSpec(**{**values, "arguments": arguments, "backing": tuple(values["backing"])})


# --- checked --------------------------------------------------------------------------------------


def check_all(disks: Iterable[DiskSpec], vm: VmSpec) -> list[DiskSpec]:
    """The disks with their ids filled in. Raises ConfigError."""
    checked: list[DiskSpec] = []
    taken: set[str] = set()
    for index, disk in enumerate(disks):
        disk_id = disk.id or _usual_id(index)
        # In this order: what is not printable may not be encodable either.
        if not disk_id.isprintable() or len(disk_id.encode()) > MAX_ID_BYTES:
            raise ConfigError(
                f"the id {disk_id!r:.100} is not printable or longer than {MAX_ID_BYTES} bytes",
                cure="shorten it",
                option=FLAG,
            )
        if disk_id in taken:
            raise ConfigError(
                f"two disks are called {disk_id!r}", cure="give each its id=NAME", option=FLAG
            )
        if not 1 <= disk.queues <= vm.cpus:
            raise ConfigError(
                f"disk {disk_id!r} with {disk.queues} queues: a guest uses one per vCPU at most",
                cure=f"use 1 to {vm.cpus}, or more --cpus",
                option=FLAG,
            )
        rates.check(disk, FLAG)
        taken.add(disk_id)
        _check_options(disk)
        checked.append(replace(disk, id=disk_id))
    return checked


def named_beside(disk: DiskSpec, others: list[DiskSpec]) -> DiskSpec:
    """`disk` with an id, which a disk that was there before it may have left."""
    taken = {other.id for other in others}
    free = (id for number in itertools.count() if (id := _usual_id(number)) not in taken)
    return disk if disk.id else replace(disk, id=next(free))


def _check_options(disk: DiskSpec) -> None:
    """Refuse options that do not go together, and values that there are not."""
    for key, choices in _CHOICES.items():
        value = getattr(disk, _VALUES[key])
        if value not in (*choices, getattr(DiskSpec, _VALUES[key])):  # or left open
            raise _not_among(key, value, choices)
    changes = [name for name in ("read_only", "snapshot", "overlay") if getattr(disk, name)]
    wrong = ""
    if len(changes) > 1:
        wrong = "only one of readonly, snapshot and overlay= makes sense"
    elif disk.storage in ("ram", "python") and disk.overlay is not None:
        wrong = "an overlay needs an image to go with"
    elif disk.storage in ("ram", "python") and (disk.direct or disk.format):
        wrong = "direct and format= are for files"
    elif disk.storage == "ram" and (disk.snapshot or disk.read_only):
        wrong = "there is nothing in it at the start, and nothing left at the end"
    elif disk.direct and (disk.snapshot or disk.overlay is not None):
        wrong = "direct is for images that are written themselves"
    elif disk.storage != "qcow2" and (disk.backing or disk.data_file is not None):
        wrong = "backing= and data-file= are for qcow2 images"
    if wrong:
        raise ConfigError(f"{disk.path}: {wrong}", cure="leave one out", option=FLAG)


# --- built, carried over, asked at run time -------------------------------------------------------


def open_device(disk: DiskSpec, context: Context) -> BlockDevice:
    """Open and lock the image and put a device in front of it. Raises ConfigError for an image that
    cannot serve as a disk."""
    from pyvmm.kinds.disk.storage import open_disk

    assert context.alarm is not None
    device = open_disk(disk, context.trace, context.closing, context.alarm)
    device.poll_ns = context.poll_ns
    return device


def cross(disk: DiskSpec, border: Border) -> Crossing:
    """Its files stay here, opened and locked. Raises ConfigError."""
    from pyvmm.kinds.disk.crossing import hand_over

    return hand_over(disk, border)


def opens_by_name(disk: DiskSpec) -> bool:
    """Not for memory."""
    return disk.storage != "ram"


def hand_over(disk: DiskSpec, closing: ExitStack) -> tuple[DiskSpec, dict[str, int]]:
    """Its files, opened and locked. Raises ConfigError."""
    from pyvmm.kinds.disk.crossing import descriptors

    return disk, descriptors(disk, closing)


def methods(running: Running) -> dict[str, Method]:
    """The methods of the control socket for disks."""
    from pyvmm.kinds.disk.resize import methods

    return methods(running)
