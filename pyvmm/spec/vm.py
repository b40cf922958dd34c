"""The VM that a user asks for: plain frozen values.

The command line, a configuration file and the Python API all make the same `VmSpec`.
"""

from __future__ import annotations

from typing import ClassVar

from pyvmm.errors import ConfigError
from pyvmm.spec.names import check_name
from pyvmm.spec.record import Record, field

MAX_CPUS = 64
MIB = 1 << 20
MIN_MEMORY = 32 * MIB
MAX_MEMORY = 32 << 40  # half of what Linux can map at once, with four-level page tables on x86
MAX_DEVICES = 16  # every board has interrupt lines for so many
TRACE_KINDS = ("registers", "status", "requests", "exits")
ARCHITECTURES = ("x86_64", "arm64")
DISCOVERY = ("auto", "acpi", "cmdline", "both")
TRANSPORTS = ("auto", "mmio", "pci")
ON_REBOOT = ("restart", "end")

IN_DISK = "disk"
"""The kernel that stands in the first disk."""

INTERNAL = {"internal": True}
"""The metadata of a field that is for our own use between two processes; a user cannot say it."""
INTERNAL_AND_SAVED = {**INTERNAL, "saved": True}
"""The same for one that a snapshot has to have."""


class DiskSpec(Record):
    """One virtio-blk disk: the image or block device at `path`, or what else `storage` says.

    `id` is what the guest reads as the serial number (/sys/block/vda/serial), at most 20 bytes;
    empty means "diskN". `direct`: past the host's page cache (O_DIRECT). `block_size` is the
    logical block that the guest is told of, in bytes; 0 means the storage's own. `on_error`,
    "report" or "stop", says what a failure of the host does: the guest gets an I/O error, or the VM
    stops. `queues` are its request queues, each served by a thread of its own; a guest uses one per
    vCPU at most. `packed` offers the guest packed rings, which it then prefers to split ones.
    `bps`, `iops` and their bursts limit bytes and operations a second (spec.rates).

    `format` is "raw" or "qcow2"; "" goes by the file's name. With `snapshot` what the guest writes
    is thrown away at the end, with `overlay` kept in the file of that name; the image itself may
    then be shared and stays as it is. `backing` are the images that a qcow2 image may build on,
    from the upper one down, and `data_file` is the file in which it may keep its data; one that
    needs others is refused, as an image can name any file of the host. `scratch` is the file for a
    snapshot's changes where no temporary one will do; `saved` has changes to the image that were
    made before, and is only read. `arguments` are what the class in a Python
    file is called with.
    """

    kind: ClassVar[str] = "disk"

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
    scratch: str | None = field(default=None, metadata=INTERNAL)
    saved: str | None = field(default=None, metadata=INTERNAL)
    arguments: tuple[tuple[str, str], ...] = ()
    bps: int = 0
    iops: int = 0
    bps_burst: int = 0
    iops_burst: int = 0

    @property
    def storage(self) -> str:
        """The storage that serves it: "ram" (``ram:SIZE``), "python" (``FILE.py:CLASS``), "qcow2"
        or "raw".

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
        """True if what is written to it is still there when the VM has ended."""
        return not (self.read_only or self.snapshot or self.storage == "ram")

    @property
    def copies_on_write(self) -> bool:
        """True if changes go to a file of their own."""
        return self.snapshot or self.overlay is not None

    @property
    def base_read_only(self) -> bool:
        """True if the image itself is only read."""
        return self.read_only or self.copies_on_write


class DeviceSpec(Record):
    """A virtio device beside the disks; a class of its own for each kind (kinds).

    `packed` offers the guest packed rings, which it then prefers to split ones."""

    kind: ClassVar[str]
    console: ClassVar[str] = ""
    """The name of the guest's console that it is, where it replaces the serial port's."""

    packed: bool = field(default=False, kw_only=True)

    @property
    def keeps(self) -> bool:
        """True if what the guest writes to it is still there when the VM has ended."""
        return False

    @property
    def kernel_parameters(self) -> tuple[str, ...]:
        """The kernel's parameters for it, which a guest's init reads."""
        return ()


class VmSpec(Record):
    """A virtual machine. `memory` is in bytes; `cmdline` is added to the defaults and wins over
    them; `devices` are those beside the disks; `trace` holds members of TRACE_KINDS; `on_reboot`,
    one of ON_REBOOT, is what becomes of a guest that asks for a reset. `transport` is one of
    TRANSPORTS; "auto" is mmio, unless an image's kernel boots (monitor.from_image). An empty `name`
    is for whoever starts it to fill in. `arch` is one of ARCHITECTURES, or "" for this machine's.
    `restored_from` is the directory of the snapshot that it goes on from, and `saved_on` says whose
    KVM it had then, by the values of --kvm, "" for nobody knows; one that `waits` is paused before
    its first instruction."""

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
    transport: str = "auto"
    on_reboot: str = "restart"
    restored_from: str = field(default="", metadata=INTERNAL)
    saved_on: str = field(default="", metadata=INTERNAL)
    waits: bool = field(default=False, metadata=INTERNAL)
    arch: str = ""

    @property
    def parts(self) -> tuple[DiskSpec | DeviceSpec, ...]:
        """Its virtio devices, in their order in the guest."""
        return (*self.disks, *self.devices)

    @property
    def console(self) -> str:
        """The guest's name of the device that is the console on the terminal; "" if that
        is the serial port."""
        return next((device.console for device in self.devices if device.console), "")

    @property
    def keeps(self) -> bool:
        """True if anything that the guest writes is still there when the VM has ended."""
        return any(part.keeps for part in self.parts)


def names_kernel(kernel: str) -> bool:
    """True if `kernel` is the name of one ("debian:6.1", "disk"), and no path."""
    return kernel == IN_DISK or kernel.startswith("debian:")


def check(spec: VmSpec) -> None:
    """Raise ConfigError for what is wrong with the machine itself, whatever devices it has."""
    if not 1 <= spec.cpus <= MAX_CPUS:
        raise ConfigError(
            f"{spec.cpus} vCPUs cannot be had", cure=f"use 1 to {MAX_CPUS}", option="--cpus"
        )
    _check_memory(spec.memory)
    if len(spec.parts) > MAX_DEVICES:
        raise ConfigError(
            f"{len(spec.parts)} disks and other devices need more interrupt lines than there are",
            cure=f"use at most {MAX_DEVICES}",
            option="--disk",
        )
    if spec.transport not in TRANSPORTS:
        raise ConfigError(f"unknown transport {spec.transport!r:.100}", cure=f"use {TRANSPORTS}")
    if spec.arch not in ("", *ARCHITECTURES):
        raise ConfigError(
            f"unknown architecture {spec.arch!r:.100}", cure=f"use {ARCHITECTURES}", option="--arch"
        )
    if spec.discovery not in DISCOVERY:
        raise ConfigError(f"unknown discovery {spec.discovery!r:.100}", cure=f"use {DISCOVERY}")
    if spec.on_reboot not in ON_REBOOT:
        raise ConfigError(f"unknown on_reboot {spec.on_reboot!r:.100}", cure=f"use {ON_REBOOT}")
    if spec.name:
        check_name(spec.name)
    if spec.trace_file is not None and not spec.trace:
        raise ConfigError(
            "nothing is traced", cure="say what: --trace all, for instance", option="--trace-file"
        )


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
