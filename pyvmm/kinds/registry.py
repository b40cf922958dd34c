"""The kinds of virtio devices: one line for each in KINDS, and a module that holds all that a kind
needs from outside the device itself.

docs/adding-a-device.md takes a reader through one. The module has

    OPTIONS                             its rows (pyvmm.spec.options): what stands on the command
                                        line, in files, in Python, in --help and the reference. The
                                        one that KINDS names describes devices; others stand for it
    class Spec(DeviceSpec)              frozen plain data, what the user asked for. A field called
                                        `size` is in bytes, one with the metadata INTERNAL is not
                                        for users
    parse(text) -> Spec                 from the command line's --OPTION TEXT; raises ConfigError.
                                        `packed` does not concern it, any device may have that
    open_device(spec, context) -> VirtioDevice
                                        raises ConfigError for what the user can mend

and may have, for what is not the same for every kind,

    read(value, option, usual) -> specs for values of other forms; `usual(value)` reads the others
    join_terminal(device, console) -> InputPort
                                        where Spec.console is set: gives it the terminal
    check(spec) -> Spec                 fills in, and refuses what needs no file to be seen wrong
    check_all(specs, vm) -> specs       the same for a kind whose devices must agree with each other
    named_beside(spec, others) -> Spec  gives one that comes later a name that no other has
    with_paths(spec, change) -> Spec    all paths of this machine in it as `change` gives them:
                                        relative ones in a file are relative to that
    for_copy(spec, name) -> Spec        what a copy of the VM, to be called that, has in its place
    images_of(spec) -> paths            files that must be, when a snapshot is used, what they were
    has_contents(spec) -> bool          whether a snapshot has a file for that device alone; then
    contents_of(spec, device) -> (size, pieces)
                                        is what lies in it; nobody writes to the device then, and a
                                        piece is (offset, bytes), of 1 MiB at most
    with_contents(spec, path) -> Spec   is the device that begins with it, and leaves it as it is
    code_of(spec) -> str                the Python file that it would run, or ""
    plain(specs, option) -> value       what a configuration file says of them
    from_plain(values) -> Spec          from what JSON makes of its fields
    cross(spec, border) -> Crossing     opens here what it needs of this machine, before it is asked
                                        for in an emulated host; without, a VM may have one there if
                                        it needs nothing of this machine
    opens_by_name(spec) -> bool         whether opening it takes names of this machine; if so:
    hand_over(spec, closing)            opens what it names, for a monitor that opens nothing: what
                                        to ask for, and the descriptors by name; without, none comes
                                        to such a monitor
    methods(running) -> {name: Method}  what it adds to the control socket, named KIND.VERB; they
                                        are there whether the VM has such a device or not

    TABLE                               the Record of a table in a file, if that is not Spec
    NOTE                                lines for the end of --help: the options within its option

`pyvmm.kinds.interface` and `pyvmm.kinds.border` have what they are given and give back. The module
is loaded for --help too, so what only the device needs is imported by the functions that need it.
What a device counts is told by `VirtioDevice.stats`, with no help from here.

For type checkers alone the module has `class Keywords(TypedDict)`, with the keyword of `pyvmm.VM`;
the Keywords below join them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.spec.options import FIRST, LAST, Option

if TYPE_CHECKING:
    from contextlib import ExitStack

    from pyvmm.control.protocol import Method
    from pyvmm.kinds import (
        balloon,
        console,
        disk,
        net,
        pmem,
        port,
        rng,
        share,
        user,
        vhost_user,
        vsock,
    )
    from pyvmm.kinds.border import Border, Crossing
    from pyvmm.kinds.interface import Context, Running, Spec
    from pyvmm.spec.vm import VmSpec
    from pyvmm.virtio.device import VirtioDevice

    class Keywords(
        disk.Keywords,
        net.Keywords,
        console.Keywords,
        port.Keywords,
        rng.Keywords,
        user.Keywords,
        pmem.Keywords,
        balloon.Keywords,
        vsock.Keywords,
        vhost_user.Keywords,
        share.Keywords,
        total=False,
    ):
        """The keywords that `pyvmm.VM` takes for devices."""


class Kind(NamedTuple):
    """A row of KINDS: the option that asks for one or more devices, the module, whether they can
    come and go while the guest runs, whether a snapshot can have them, and whether the guest of a
    restored VM works in a directory of this machine by them, or reaches programs that they name."""

    option: str
    module: str
    comes_and_goes: bool = False
    in_snapshots: bool = True
    lends_files: bool = False


# The order is the one in which a VM's devices appear in the guest.
KINDS = {
    "disk": Kind("disks", "pyvmm.kinds.disk", comes_and_goes=True),
    "net": Kind("net", "pyvmm.kinds.net", comes_and_goes=True),
    "console": Kind("console", "pyvmm.kinds.console"),
    "ports": Kind("ports", "pyvmm.kinds.port"),
    "rng": Kind("rng", "pyvmm.kinds.rng", comes_and_goes=True),
    "user": Kind("devices", "pyvmm.kinds.user", in_snapshots=False),
    "pmem": Kind("pmem", "pyvmm.kinds.pmem"),
    "balloon": Kind("balloon", "pyvmm.kinds.balloon"),
    "vsock": Kind("vsock", "pyvmm.kinds.vsock"),
    "vhost_user": Kind("vhost_user", "pyvmm.kinds.vhost_user", lends_files=True),
    "share": Kind("shares", "pyvmm.kinds.share", comes_and_goes=True, lends_files=True),
}


def come_and_go() -> tuple[str, ...]:
    """The kinds whose devices can come and go while the guest runs."""
    return tuple(kind for kind, row in KINDS.items() if row.comes_and_goes)


def load(kind: str) -> Any:
    """The module of `kind`. Raises ConfigError if there is none."""
    if kind not in KINDS:
        raise ConfigError(f"there is no device {kind!r:.100}", cure=f"there are {', '.join(KINDS)}")
    return import_module(KINDS[kind].module)


# --- the options ----------------------------------------------------------------------------------


def usual_options() -> tuple[Option, ...]:
    """The rows that nearly every command line gets by with: those of the VM itself and of disks."""
    return (*FIRST, *load("disk").OPTIONS, *LAST)


@cache
def options() -> tuple[Option, ...]:
    """All rows, in the order of configuration files."""
    return (*FIRST, *(row for kind in KINDS for row in load(kind).OPTIONS), *LAST)


@cache
def file_options() -> tuple[Option, ...]:
    """The rows of what a configuration file and the Python API can say."""
    return tuple(row for row in options() if not row.not_in_files)


def keywords() -> tuple[str, ...]:
    """The names of the options that ask for devices."""
    return tuple(row.option for row in KINDS.values())


def names() -> tuple[str, ...]:
    """The keywords of `pyvmm.VM`, which are the keys of a configuration file."""
    return tuple(row.name for row in file_options())


def in_order_of_help() -> tuple[Option, ...]:
    """All rows as --help and the reference have them."""
    found: list[Option] = []
    moved = [row for row in options() if row.after]
    for row in (row for row in options() if not row.after):
        found.append(row)
        for late in moved:
            if late.after == found[-1].flag:
                found.append(late)
    return tuple(found)


def notes() -> tuple[str, ...]:
    """The lines that the kinds add to the end of --help."""
    return tuple(note for kind in KINDS if (note := getattr(load(kind), "NOTE", "")))


def option_of(kind: str) -> Option:
    """The row that asks for devices of `kind`."""
    name = KINDS[kind].option
    found: Option = next(row for row in load(kind).OPTIONS if row.name == name)
    return found


def untyped(kind: str, error: ConfigError) -> ConfigError:
    """`error` for somebody who has typed none of the options that ask for devices of `kind`, but a
    device alone."""
    message, cure = error.message, error.cure
    for row in load(kind).OPTIONS:
        message, cure = (text.replace(f"{row.flag} ", "") for text in (message, cure))
    return ConfigError(message, cure=cure)


# --- specifications -------------------------------------------------------------------------------


def parse(kind: str, text: str) -> Any:
    """The device that ``--OPTION TEXT`` describes; any may have ``packed`` among its options.
    Raises ConfigError."""
    from pyvmm.kinds import interface

    return interface.parse(load(kind), text)


def read(kind: str, value: Any) -> list[Any]:
    """The devices that a value describes, in one of the forms that `interface.read_value` tells.
    Raises ConfigError."""
    from pyvmm.kinds import interface

    module = load(kind)
    option = option_of(kind)

    def usual(value: Any) -> list[Any]:
        return list(interface.read_values(module, value, option))

    found: list[Any] = (
        module.read(value, option, usual) if hasattr(module, "read") else usual(value)
    )
    return found


def from_plain(kind: str, values: Mapping[str, Any]) -> Any:
    """The specification whose `asdict` is `values`. Raises ConfigError or TypeError for anything
    else."""
    module = load(kind)
    made = module.from_plain(values) if hasattr(module, "from_plain") else module.Spec(**values)
    return made


def check(kind: str, specs: Iterable[Spec], vm: VmSpec) -> list[Any]:
    """All devices of one kind, each checked. Raises ConfigError."""
    module = load(kind)
    if hasattr(module, "check_all"):
        return list(module.check_all(specs, vm))
    refine = getattr(module, "check", lambda spec: spec)
    return [refine(spec) for spec in specs]


def check_one_more(kind: str, spec: Spec, others: list[Any], vm: VmSpec) -> Any:
    """`spec`, which is to come to a VM that has `others` of its kind, checked. Raises
    ConfigError."""
    module = load(kind)
    if hasattr(module, "named_beside"):
        spec = module.named_beside(spec, others)
    return check(kind, [*others, spec], vm)[-1]


def with_paths(spec: Spec, change: Callable[[str], str]) -> Any:
    """`spec` with all paths of this machine as `change` gives them."""
    refine = getattr(load(spec.kind), "with_paths", None)
    return spec if refine is None else refine(spec, change)


def for_copy(spec: Spec, name: str) -> Any:
    """`spec` for the VM `name`, which is a copy of one that has it: nothing in it that two VMs
    cannot have at once. Raises ConfigError."""
    refine = getattr(load(spec.kind), "for_copy", None)
    return spec if refine is None else refine(spec, name)


def images_of(spec: Spec) -> tuple[str, ...]:
    """The files that must not have changed when a snapshot of a VM that has `spec` is used."""
    find: Callable[[Spec], tuple[str, ...]] | None = getattr(load(spec.kind), "images_of", None)
    return () if find is None else find(spec)


def has_contents(spec: Spec) -> bool:
    """True if a snapshot has a file for this device alone, beside its state."""
    asks: Callable[[Spec], bool] | None = getattr(load(spec.kind), "has_contents", None)
    return asks is not None and asks(spec)


def contents_of(spec: Spec, device: VirtioDevice) -> tuple[int, Iterable[tuple[int, memoryview]]]:
    """What lies in that file: its size, and the pieces that may not be zero, each with its offset.
    Iterating raises HostError."""
    found: tuple[int, Iterable[tuple[int, memoryview]]]
    found = load(spec.kind).contents_of(spec, device)
    return found


def with_contents(spec: Spec, path: str) -> Any:
    """`spec` for a device that begins with the file at `path`, made of its `contents_of`."""
    return load(spec.kind).with_contents(spec, path)


def code_of(spec: Spec) -> str:
    """The Python file that the device would run, "" for none."""
    code: Callable[[Spec], str] | None = getattr(load(spec.kind), "code_of", None)
    return "" if code is None else code(spec)


def plain(kind: str, specs: list[Any]) -> Any:
    """The value that a configuration file has for all devices of one kind; None for nothing."""
    module, option = load(kind), option_of(kind)
    if hasattr(module, "plain"):
        return module.plain(specs, option)
    from pyvmm.spec import tables

    written = [tables.write(spec) for spec in specs]
    if not written:
        return None
    return written if option.many else written[0] or True


# --- devices --------------------------------------------------------------------------------------


def open_device(spec: Spec, context: Context) -> VirtioDevice:
    """The device that `spec` asks for. Raises ConfigError for what the user can mend."""
    device: VirtioDevice = load(spec.kind).open_device(spec, context)
    if spec.packed:  # which is served the same, whatever the device
        from pyvmm.virtio.features import VIRTIO_F_RING_PACKED, mask

        device.features |= mask(VIRTIO_F_RING_PACKED)
    return device


def cross(spec: Spec, border: Border) -> Crossing:
    """Make here what the device needs of this machine. Raises ConfigError for what the user can
    mend."""
    from pyvmm.kinds.border import Crossing

    cross = getattr(load(spec.kind), "cross", None)
    crossing: Crossing = Crossing(spec) if cross is None else cross(spec, border)
    return crossing


def opens_by_name(spec: Spec) -> bool:
    """True if opening the device takes names of this machine, for files or programs."""
    asks: Callable[[Spec], bool] | None = getattr(load(spec.kind), "opens_by_name", None)
    return asks is not None and asks(spec)


def hands_over(kind: str) -> bool:
    """True if devices of `kind` can come to a monitor that opens nothing: `hand_over`."""
    return hasattr(load(kind), "hand_over")


def hand_over(spec: Spec, closing: ExitStack) -> tuple[Spec, dict[str, int]]:
    """Open what `spec` names, for a monitor that opens nothing by name: what to ask it for, and the
    descriptors by the names under which it looks for them (pyvmm.host.handed). `closing` closes
    ours. Raises ConfigError for what the user can mend."""
    found: tuple[Spec, dict[str, int]] = load(spec.kind).hand_over(spec, closing)
    return found


def add_opened(spec: Spec, ask: Callable[..., Any]) -> Any:
    """What such a monitor answers to a request for `spec`. `ask` makes the request, with these
    parameters and the descriptors `fds`. Raises ConfigError for what the user can mend, and as
    `ask` does."""
    from contextlib import ExitStack

    from pyvmm.spec import tables

    with ExitStack() as opened:
        spec, files = hand_over(spec, opened)
        return ask(table=tables.write(spec), files=list(files), fds=tuple(files.values()))


def method(name: str, running: Running) -> Method | None:
    """The one of `methods` that has this name, without loading the other kinds."""
    kind = name.partition(".")[0]
    make = getattr(load(kind), "methods", None) if kind in KINDS else None
    found: Method | None = None if make is None else make(running).get(name)
    return found


def methods(running: Running) -> dict[str, Method]:
    """The methods that all kinds add to the control socket, by name."""
    found: dict[str, Method] = {}
    for kind in KINDS:
        make = getattr(load(kind), "methods", None)
        if make is not None:
            found |= make(running)
    return found
