"""What the user asks for: plain frozen values, checked before anything is opened.

The command line, a configuration file and the Python API all make the same `VmSpec`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from pyvmm.control.names import check_name
from pyvmm.errors import ConfigError
from pyvmm.spec import rates

MAX_CPUS = 64
MIB = 1 << 20
MIN_MEMORY = 32 * MIB
MAX_MEMORY = 32 << 40  # half of what Linux can map at once, with four-level page tables on x86
MAX_DEVICES = 16  # every board has interrupt lines for so many
MAX_ID_BYTES = 20  # VIRTIO_BLK_ID_BYTES: the driver reads the id by VIRTIO_BLK_T_GET_ID
TRACE_KINDS = ("registers", "status", "requests", "exits")
DISCOVERY = ("auto", "acpi", "cmdline", "both")
ON_REBOOT = ("restart", "end")

ON_ERROR = ("report", "stop")
BLOCK_SIZES = (512, 1024, 2048, 4096)  # what Linux takes for a logical block on x86
FORMATS = ("raw", "qcow2")
DISK_SYNTAX = (
    "PATH[,readonly][,direct][,snapshot][,overlay=FILE][,format=raw|qcow2]"
    "[,backing=FILE][,data-file=FILE][,id=NAME]"
    "[,block-size=BYTES][,on-error=report|stop][,queues=N][,packed]" + rates.SYNTAX
)

# What stands in a --disk option → the field of DiskSpec.
_DISK_FLAGS = {name: name for name in ("direct", "snapshot", "packed")}
_DISK_FLAGS |= {"readonly": "read_only", "ro": "read_only"}
_DISK_VALUES = {name: name for name in ("id", "format", "overlay", "queues")}
_DISK_VALUES |= {"block-size": "block_size", "on-error": "on_error", **rates.KEYS}
_DISK_CHOICES: dict[str, tuple[object, ...]] = {
    "block-size": BLOCK_SIZES,
    "on-error": ON_ERROR,
    "format": FORMATS,
}

_POWERS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_MEMORY_DIGITS = 20  # more than any memory has bytes; Python refuses to read very long numbers
_MEMORY_UNITS = {
    **{unit + end: size for unit, size in _POWERS.items() for end in ("ib", "b", "")},
    "b": 1,  # after those that end in it
    "": 1 << 20,
}


@dataclass(frozen=True)
class DiskSpec:
    """One virtio-blk disk: the image or block device at `path`, or what else `kind` says.

    `id` is what the guest reads as the serial number (/sys/block/vda/serial), at most 20 bytes;
    empty means "diskN". `direct`: past the host's page cache (O_DIRECT). `block_size` is the
    logical block that the guest is told of, in bytes; 0 means the storage's own. `on_error`, one of
    ON_ERROR, says what a failure of the host does: the guest gets an I/O error, or the VM stops.
    `queues` are its request queues, each served by a thread of its own; a guest uses one per vCPU
    at most. `packed` offers the guest packed rings, which it then prefers to split ones.
    `bps`, `iops` and their bursts limit bytes and operations a second (spec.rates).

    `format` is one of FORMATS; "" goes by the file's name. With `snapshot` what the guest writes is
    thrown away at the end, with `overlay` kept in the file of that name; the image itself may then
    be shared and stays as it is. `backing` are the images that a qcow2 image may build on, from the
    upper one down, and `data_file` is the file in which it may keep its data; one that needs others
    is refused, as an image can name any file of the host. `scratch` is the file for a snapshot's
    changes where no temporary one will do. `arguments` are what the class in a Python file is
    called with.
    """

    path: str
    read_only: bool = False
    id: str = ""
    direct: bool = False
    block_size: int = 0
    on_error: str = "report"
    queues: int = 1
    packed: bool = False
    format: str = ""
    snapshot: bool = False
    overlay: str | None = None
    backing: tuple[str, ...] = ()
    data_file: str | None = None
    scratch: str | None = None
    arguments: tuple[tuple[str, str], ...] = ()
    bps: int = 0
    iops: int = 0
    bps_burst: int = 0
    iops_burst: int = 0

    @property
    def kind(self) -> str:
        """What serves it: "ram" (``ram:SIZE``), "python" (``FILE.py:CLASS``), "qcow2" or "raw".

        Never by what the file contains: a guest can write that.
        """
        if self.path.startswith("ram:"):
            return "ram"
        file, _, name = self.path.rpartition(":")
        if file.endswith(".py") and name.isidentifier():
            return "python"
        return self.format or ("qcow2" if self.path.lower().endswith(".qcow2") else "raw")

    @property
    def keeps(self) -> bool:
        """Whether what is written to it is still there when the VM has ended."""
        return not (self.read_only or self.snapshot or self.kind == "ram")

    @property
    def copies_on_write(self) -> bool:
        """Whether changes go to a file of their own."""
        return self.snapshot or self.overlay is not None

    @property
    def base_read_only(self) -> bool:
        """Whether the image itself is only read."""
        return self.read_only or self.copies_on_write


@dataclass(frozen=True)
class DeviceSpec:
    """A virtio device beside the disks; a class of its own for each kind (kinds).

    `packed` offers the guest packed rings, which it then prefers to split ones."""

    kind: ClassVar[str]
    packed: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class VmSpec:
    """A virtual machine. `memory` is in bytes; `cmdline` is added to the defaults and wins over
    them; `devices` are those beside the disks; `trace` holds members of TRACE_KINDS; `on_reboot`,
    one of ON_REBOOT, is what becomes of a guest that asks for a reset. An empty `name` is for
    whoever starts it to fill in."""

    kernel: str
    initrd: str | None = None
    disks: tuple[DiskSpec, ...] = ()
    devices: tuple[DeviceSpec, ...] = ()
    cpus: int = 1
    memory: int = 512 * MIB
    cmdline: str = ""
    name: str = ""
    trace: tuple[str, ...] = ()
    trace_file: str | None = None
    discovery: str = "auto"
    on_reboot: str = "restart"

    @property
    def keeps(self) -> bool:
        """Whether anything that the guest writes is still there when the VM has ended."""
        return any(disk.keeps for disk in self.disks)


def parse_memory(text: str, option: str = "--memory") -> int:
    """Bytes of "512M", "2G", "65536K", "4096B" or "512" (MiB). Raises ConfigError, which names
    `option`."""
    stripped = text.strip().lower()
    unit = next((unit for unit in _MEMORY_UNITS if unit and stripped.endswith(unit)), "")
    digits = stripped.removesuffix(unit)
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _MEMORY_DIGITS):
        raise ConfigError(f"cannot read {text!r} as a size", cure="write 512M or 2G", option=option)
    return int(digits) * _MEMORY_UNITS[unit]


def write_memory(size: int) -> str:
    """The shortest text that `parse_memory` reads as `size` bytes."""
    for unit, factor in reversed(_POWERS.items()):
        if size and size % factor == 0:
            return f"{size // factor}{unit.upper()}"
    return f"{size}B"


def parse_disk(text: str) -> DiskSpec:
    """The disk that ``PATH[,OPTION...]`` describes, as DISK_SYNTAX has it. Raises ConfigError.

    A comma in the path or in a value is written twice.
    """
    path, *options = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    fields: dict[str, Any] = {}
    arguments: list[tuple[str, str]] = []
    is_python = DiskSpec(path).kind == "python"
    for option in options:
        key, equals, value = option.partition("=")
        if key in _DISK_FLAGS and not equals:
            fields[_DISK_FLAGS[key]] = True
        elif key in _DISK_VALUES and value:
            fields[_DISK_VALUES[key]] = _disk_value(key, value)
        elif key == "backing" and value and not is_python:
            fields[key] = (*fields.get(key, ()), value)
        elif key == "data-file" and value and not is_python:
            fields["data_file"] = value
        elif is_python and equals and key.isidentifier():
            arguments.append((key, value))
        else:
            raise ConfigError(
                f"unknown disk option {option!r} in {text!r}",
                cure=f"use {DISK_SYNTAX}; a comma in the path is written twice",
                option="--disk",
            )
    if not path:
        raise ConfigError(f"no path in {text!r}", cure="use PATH[,readonly]", option="--disk")
    disk = DiskSpec(path, arguments=tuple(arguments), **fields)
    _check_disk(disk)
    return disk


def _disk_value(key: str, value: str) -> object:
    if key == "queues":
        if not (value.isascii() and value.isdigit() and len(value) <= _MEMORY_DIGITS):
            raise ConfigError(f"cannot read {value!r} as a number", cure="write queues=4")
        return int(value)
    if key in rates.KEYS:
        return rates.parse_rate(key, value, "--disk")
    choices = _DISK_CHOICES.get(key, ())
    for choice in choices:
        if value == str(choice):
            return choice
    if choices:
        raise ConfigError(
            f"{key} cannot be {value!r}",
            cure=f"choose from {', '.join(map(str, choices))}",
            option="--disk",
        )
    return value


def parse_trace(text: str) -> tuple[str, ...]:
    """The kinds in ``registers,status`` or ``all``, each once. Raises ConfigError."""
    kinds: list[str] = []
    for kind in text.split(","):
        chosen = TRACE_KINDS if kind == "all" else (kind,)
        if kind != "all" and kind not in TRACE_KINDS:
            raise ConfigError(
                f"nothing called {kind!r} can be traced",
                cure=f"choose from {', '.join(TRACE_KINDS)} or all",
                option="--trace",
            )
        kinds += [one for one in chosen if one not in kinds]
    return tuple(kinds)


def validate(spec: VmSpec) -> VmSpec:
    """`spec` with ids filled in, or ConfigError for what needs no file to be seen wrong."""
    if not 1 <= spec.cpus <= MAX_CPUS:
        raise ConfigError(
            f"{spec.cpus} vCPUs cannot be had", cure=f"use 1 to {MAX_CPUS}", option="--cpus"
        )
    _check_memory(spec.memory)
    count = len(spec.disks) + len(spec.devices)
    if count > MAX_DEVICES:
        raise ConfigError(
            f"{count} disks and other devices need more interrupt lines than there are",
            cure=f"use at most {MAX_DEVICES}",
            option="--disk",
        )
    if spec.discovery not in DISCOVERY:
        raise ConfigError(f"unknown discovery {spec.discovery!r}", cure=f"use {DISCOVERY}")
    if spec.on_reboot not in ON_REBOOT:
        raise ConfigError(f"unknown on_reboot {spec.on_reboot!r}", cure=f"use {ON_REBOOT}")
    check_name(spec.name)
    _check_trace_file(spec)
    return _with_disk_ids(_with_checked_devices(spec))


def _check_memory(size: int) -> None:
    if size < MIN_MEMORY:
        raise ConfigError(
            f"{size >> 20} MiB of memory is too little for a guest",
            cure=f"give it {MIN_MEMORY >> 20}M or more",
            option="--memory",
        )
    if size > MAX_MEMORY:
        raise ConfigError(
            f"{size >> 30} GiB of memory is too much for a guest",
            cure=f"give it {MAX_MEMORY >> 30}G or less",
            option="--memory",
        )
    if size % MIB:
        raise ConfigError(
            f"{size} bytes is not a whole number of MiB", cure="round it up", option="--memory"
        )


def _with_checked_devices(spec: VmSpec) -> VmSpec:
    if not spec.devices:
        return spec
    from pyvmm.kinds import registry as devices

    return replace(spec, devices=devices.check(spec.devices))


def _check_trace_file(spec: VmSpec) -> None:
    path = spec.trace_file
    if path is None:
        return
    if not spec.trace:
        raise ConfigError(
            "nothing is traced", cure="say what: --trace all, for instance", option="--trace-file"
        )
    used = (spec.kernel, *filter(None, (spec.initrd,)), *_files_of(spec.disks))
    if any(_is_same_file(path, other) for other in used):
        raise ConfigError(
            f"{path} is a file of the guest's, which the trace would overwrite",
            cure="name another file",
            option="--trace-file",
        )


def _files_of(disks: tuple[DiskSpec, ...]) -> list[str]:
    named = [(disk.path, *disk.backing, disk.overlay, disk.data_file) for disk in disks]
    return [path for paths in named for path in paths if path is not None]


def _is_same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False  # One of them is not there: whoever opens it says so.


def _with_disk_ids(spec: VmSpec) -> VmSpec:
    disks = []
    taken: set[str] = set()
    for index, disk in enumerate(spec.disks):
        disk_id = disk.id or f"disk{index}"
        # In this order: what is not printable may not be encodable either.
        if not disk_id.isprintable() or len(disk_id.encode()) > MAX_ID_BYTES:
            raise ConfigError(
                f"the id {disk_id!r} is not printable or longer than {MAX_ID_BYTES} bytes",
                cure="shorten it",
                option="--disk",
            )
        if disk_id in taken:
            raise ConfigError(
                f"two disks are called {disk_id!r}", cure="give each its id=NAME", option="--disk"
            )
        if not 1 <= disk.queues <= spec.cpus:
            raise ConfigError(
                f"disk {disk_id!r} with {disk.queues} queues: a guest uses one per vCPU at most",
                cure=f"use 1 to {spec.cpus}, or more --cpus",
                option="--disk",
            )
        rates.check(disk, "--disk")
        taken.add(disk_id)
        _check_disk(disk)
        disks.append(replace(disk, id=disk_id))
    return replace(spec, disks=tuple(disks))


def _check_disk(disk: DiskSpec) -> None:
    """Refuse options that do not go together."""
    changes = [name for name in ("read_only", "snapshot", "overlay") if getattr(disk, name)]
    wrong = ""
    if len(changes) > 1:
        wrong = "only one of readonly, snapshot and overlay= makes sense"
    elif disk.kind in ("ram", "python") and disk.overlay is not None:
        wrong = "an overlay needs an image to go with"
    elif disk.kind in ("ram", "python") and (disk.direct or disk.format):
        wrong = "direct and format= are for files"
    elif disk.kind == "ram" and (disk.snapshot or disk.read_only):
        wrong = "there is nothing in it at the start, and nothing left at the end"
    elif disk.direct and (disk.snapshot or disk.overlay is not None):
        wrong = "direct is for images that are written themselves"
    elif disk.kind != "qcow2" and (disk.backing or disk.data_file is not None):
        wrong = "backing= and data-file= are for qcow2 images"
    if wrong:
        raise ConfigError(f"{disk.path}: {wrong}", cure="leave one out", option="--disk")


def to_json(spec: VmSpec) -> str:
    """`spec` as JSON text, for `from_json` in another process."""
    import json

    devices = [(device.kind, asdict(device)) for device in spec.devices]
    return json.dumps({**asdict(spec), "devices": devices})


def from_json(text: str) -> VmSpec:
    """The spec that `to_json` wrote. Raises ConfigError for anything else."""
    import json

    try:
        data: Mapping[str, Any] = json.loads(text)
        disks = tuple(_disk_from_plain(disk) for disk in data["disks"])
        devices = _devices_from_plain(data["devices"])
        trace = tuple(data["trace"])
        return validate(VmSpec(**{**data, "disks": disks, "devices": devices, "trace": trace}))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"not a VM specification: {error}") from None


def _disk_from_plain(values: Mapping[str, Any]) -> DiskSpec:
    arguments = tuple((str(name), str(value)) for name, value in values["arguments"])
    return DiskSpec(**{**values, "arguments": arguments, "backing": tuple(values["backing"])})


def _devices_from_plain(rows: list[tuple[str, dict[str, Any]]]) -> tuple[DeviceSpec, ...]:
    if not rows:
        return ()
    from pyvmm.kinds import registry as devices

    return tuple(devices.from_plain(kind, values) for kind, values in rows)
