"""The options of a VM: rows for the command line, the Python API, configuration files, the
reference in docs/options.md and `--help`.

Here are the rows of the VM itself. The rows of devices are with their kinds, and
`pyvmm.kinds.registry` joins them all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.spec.sizes import parse_memory
from pyvmm.spec.vm import ARCHITECTURES, DISCOVERY, ON_REBOOT, TRACE_KINDS, TRANSPORTS

KVM = ("auto", "host", "emulated")
CONFINE = ("auto", "strict", "off")
LOG_FORMATS = ("text", "json")

VALUE, FLAG, OPTIONAL, ARGUMENT = "value", "flag", "optional", "argument"
"""The ways to type an option: with a value, without one, with one or none, without a flag."""

ONLY_TYPED = "it is for the command line only"


class Option(NamedTuple):
    """One thing to ask for.

    `name` is the keyword of `pyvmm.VM` and the key in a configuration file, `flag` the option of
    `pyvmm run`. `field` is the VmSpec's, `device` a kind of device (kinds); with neither it says
    how the VM is run, and is not part of its specification. `many`: a list, of which one value
    alone may stand for itself. `default` is the value that says nothing.

    On the command line it is typed as `shape` says, with a value of `type` or one of `choices`,
    which `metavar` stands for in --help; `repeats` if it may be typed several times. `help` is its
    text there, `shows_default` whether the default follows; `also` is a short form. In --help it
    stands behind the option before it, or behind the one named by `after`.

    With `not_in_files` it is typed only: the text says what to write in a file. If it `stands_for`
    another option, its value is that one's; a flag stands for an empty text, unless the other
    option was given as well.
    """

    name: str
    flag: str
    help: str = ""
    metavar: str | None = None
    field: str = ""
    device: str = ""
    many: bool = False
    default: Any = None
    shape: str = VALUE
    type: type = str
    choices: tuple[str, ...] = ()
    repeats: bool = False
    shows_default: bool = False
    also: str = ""
    after: str = ""
    not_in_files: str = ""
    stands_for: str = ""

    @property
    def typed_default(self) -> Any:
        """The value on the command line if it is not given."""
        if self.repeats:
            return ()
        if self.shape == FLAG:
            return False
        return "" if self.default == () else self.default


# In the order of configuration files; the devices' rows come between the two.
FIRST = (
    Option(
        "image",
        "image",
        shape=ARGUMENT,
        help="The name of an image, as `pyvmm image list` shows it; debian, if no other option "
        "says what to boot.",
    ),
    Option(
        "kernel",
        "--kernel",
        metavar="KERNEL",
        field="kernel",
        help="Linux kernel, instead of IMAGE's and of its initrd: a bzImage (Debian's "
        "/boot/vmlinuz), an ELF vmlinux, the tree it was built in, or debian:6.12, debian:trixie, "
        "debian:sid… (docs/kernels.md). The last two come with their modules, and boot debian "
        "where neither an image nor a disk is named. disk is the one in the first disk.",
    ),
    Option(
        "initrd",
        "--initrd",
        metavar="PATH",
        field="initrd",
        help="Initial RAM disk. Debian's kernels need one, as their virtio drivers are modules.",
    ),
    Option(
        "modules",
        "--modules",
        metavar="DIR",
        help="The kernel's modules: …/lib/modules/VERSION, or its build tree. What the guest needs "
        "of them goes into an initramfs, in place of --initrd.",
    ),
    Option(
        "root",
        "--root",
        metavar="DIR",
        help="The guest's root is the directory DIR of this machine, such as /: what the guest "
        "changes is thrown away. With CMD, or else a shell, it runs in the current directory, as "
        "you. docs/host-files.md has the rest.",
    ),
    Option(
        "rw",
        "--rw",
        metavar="PATH",
        many=True,
        default=(),
        repeats=True,
        help="With --root: the directory PATH below DIR is the guest's to change; may be repeated.",
    ),
)
LAST = (
    Option(
        "arch",
        "--arch",
        choices=ARCHITECTURES,
        field="arch",
        help="The guest's architecture; it runs in an emulated machine if it is not this one's. "
        "Without --kernel it is Debian's (docs/arm64.md).",
    ),
    Option(
        "cpus",
        "--cpus",
        type=int,
        field="cpus",
        default=1,
        shows_default=True,
        help="Number of vCPUs.",
    ),
    Option(
        "memory",
        "--memory",
        metavar="SIZE",
        field="memory",
        default="512M",
        shows_default=True,
        help="RAM, such as 512M or 2G.",
    ),
    Option(
        "cmdline",
        "--cmdline",
        metavar="TEXT",
        field="cmdline",
        default="",
        help="Added to the kernel command line; a parameter given here (root=, console=, panic=, "
        "...) replaces pyvmm's own.",
    ),
    Option(
        "trace",
        "--trace",
        metavar="KIND[,KIND]",
        field="trace",
        many=True,
        default=(),
        help=f"Print decoded events on standard error: {', '.join(TRACE_KINDS)} or all.",
    ),
    Option(
        "trace_file",
        "--trace-file",
        metavar="PATH",
        field="trace_file",
        help="Write the trace to this file instead.",
    ),
    Option(
        "discovery",
        "--discovery",
        choices=DISCOVERY,
        field="discovery",
        default="auto",
        shows_default=True,
        help="How the guest learns of its virtio-mmio devices.",
    ),
    Option(
        "transport",
        "--transport",
        choices=TRANSPORTS,
        field="transport",
        default="auto",
        shows_default=True,
        help="How the guest reaches its virtio devices: virtio-mmio, or a PCI bus with MSI-X. "
        "auto is pci with the kernel of an image, or one that by its configuration knows pci only; "
        "else mmio.",
    ),
    Option(
        "on_reboot",
        "--on-reboot",
        choices=ON_REBOOT,
        field="on_reboot",
        default="restart",
        shows_default=True,
        help="What a reboot in the guest does: it starts again, as a machine would, or ends the "
        "run with 10. After a panic or a triple fault the run always ends, and with CMD.",
    ),
    Option(
        "name",
        "--name",
        field="name",
        default="",
        help="The VM's name, in messages and for pyvmm ps, stop, pause…; what it has changed on "
        "IMAGE's disk is kept under it.  [default: IMAGE's or vm, or vm-2…]",
    ),
    Option(
        "rm",
        "--rm",
        shape=FLAG,
        default=False,
        help="Throw away what the guest changes on IMAGE's disk; with CMD, on whatever root disk.",
    ),
    Option(
        "kvm",
        "--kvm",
        choices=KVM,
        default="auto",
        shows_default=True,
        after="--trace-file",
        help="Use this machine's KVM, an emulated KVM host (QEMU, slow, works anywhere), or "
        "whichever can boot Linux; with auto a saved VM goes on with the kind that it had.",
    ),
    Option(
        "confine",
        "--confine",
        choices=CONFINE,
        default="auto",
        shows_default=True,
        after="--kvm",
        help="Take away from the monitor what it does not need once the guest runs: auto as far as "
        "this machine can and the VM allows, strict all of it or the VM does not start, off "
        "nothing (docs/security.md).",
    ),
    Option(
        "allow_read",
        "--allow-read",
        metavar="PATH",
        many=True,
        repeats=True,
        default=(),
        after="--confine",
        help="A file or folder that a device or disk of yours may still open for reading once the "
        "monitor is confined; once for each.",
    ),
    Option(
        "user",
        "--user",
        metavar="auto|BASE-LAST|NAME",
        default="",
        after="--allow-read",
        help="For root: whom the monitor becomes before the guest runs. auto is a user of its own "
        "for each VM, and the default unless --confine is off; BASE-LAST is one of these numbers "
        "for each; or a name, or UID:GID.",
    ),
    Option(
        "cgroup",
        "--cgroup",
        metavar="PATH[,KEY=VALUE]",
        default="",
        after="--user",
        help="Join this group of processes (cgroup v2) with all helpers; memory=SIZE, pids=N and "
        "cpus=N are limits for a new group below it; own is one beside this process's.",
    ),
    Option(
        "control_socket",
        "--control-socket",
        metavar="PATH[,KEY=VALUE]",
        many=True,
        repeats=True,
        default=(),
        after="--cgroup",
        help="One more control socket, for those who may only do some things: rights=watch (the "
        "default), control or exec, and group=NAME (docs/control-socket.md).",
    ),
    Option(
        "stop_timeout",
        "--stop-timeout",
        metavar="SECONDS",
        type=float,
        after="--on-reboot",
        help="After SIGTERM, SIGINT or SIGHUP the guest has so long to power off (by default 30), "
        "until its power is cut; 0 cuts at once.",
    ),
    Option(
        "config",
        "--config",
        metavar="FILE",
        not_in_files=ONLY_TYPED,
        help="Read options from a TOML file (docs/python-api.md); those given here win.",
    ),
    Option(
        "allow_code",
        "--allow-code",
        shape=FLAG,
        not_in_files="whoever starts the VM allows it, not the file: --allow-code",
        help="Run the Python files that FILE names for disks and devices, as you; without this "
        "they are refused.",
    ),
    Option(
        "print_config",
        "--print-config",
        shape=FLAG,
        not_in_files=ONLY_TYPED,
        help="Print such a file for this VM, and do not start it.",
    ),
    Option(
        "detach",
        "--detach",
        also="-d",
        shape=FLAG,
        not_in_files=ONLY_TYPED,
        help="Return once the guest runs, which goes on in the background, and print the VM's "
        "name; pyvmm console shows what it says.",
    ),
    Option(
        "guest_user",
        "--guest-user",
        metavar="USER[:GROUP]",
        not_in_files=ONLY_TYPED,
        help="As whom CMD, or the shell of --root, runs in the guest, by name or number, such as "
        "root; else it is you with --root, and elsewhere the image's user or root.",
    ),
    Option(
        "restore",
        "--restore",
        metavar="NAME",
        not_in_files=ONLY_TYPED,
        help="Go on from the snapshot of that name, which pyvmm snapshot has taken; what the guest "
        "changes on its disks is thrown away at its end.",
    ),
    Option(
        "log_format",
        "--log-format",
        choices=LOG_FORMATS,
        default="text",
        shows_default=True,
        not_in_files=ONLY_TYPED,
        help="What pyvmm's own messages on standard error are: lines for humans, or JSON objects.",
    ),
    Option(
        "debug",
        "--debug",
        shape=FLAG,
        not_in_files=ONLY_TYPED,
        help="Show a traceback when pyvmm itself fails.",
    ),
)


def own_row(name: str) -> Option:
    """The row of the VM itself that is called `name`, for other commands than `pyvmm run`."""
    return next(row for row in (*FIRST, *LAST) if row.name == name)


def nearest(word: str, known: Iterable[str]) -> str:
    """The one of `known` that was probably meant by `word`, or ""."""
    import difflib

    [found] = difflib.get_close_matches(word[:100], known, 1) or [""]
    return found


def unknown_option(
    option: str,
    known: Collection[str],
    *,
    usage: str,
    flag: str,
    what: str = "option",
    where: str = "",
) -> ConfigError:
    """The error for `option`, one of those after commas, whose word is none of `known` or has a
    value or none where it should not. The message is about an unknown `what`, and goes on with
    `where`."""
    word = option.partition("=")[0]
    meant = "" if word in known else nearest(word, known)
    cure = f"did you mean {meant}?" if meant else usage
    return ConfigError(f"unknown {what} {option!r}{where}", cure=cure, option=flag)


def as_list(value: Any) -> list[Any]:
    """A list of values, or one value that stands for itself, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


# --- values of the VM's own -----------------------------------------------------------------------


def read_own(option: Option, value: Any) -> Any:
    """The VmSpec's value for `value`, if the option is one of the VM itself. An option that is not
    part of a specification is looked at only. Raises ConfigError."""
    return _READ[option.name](value, option)


def read_text(value: Any, option: Option) -> str:
    """`value`, if it is a text. Raises ConfigError."""
    if not isinstance(value, str):
        raise wrong_type(option, value, "a text")
    if "\0" in value:
        raise ConfigError(f"{option.name} has a NUL in it", option=option.flag)
    return value


def read_path(value: Any, option: Option) -> str:
    """The path that `value` is, a text or one of pathlib's. Raises ConfigError."""
    return read_text(value.__fspath__() if hasattr(value, "__fspath__") else value, option)


def _paths(value: Any, option: Option) -> tuple[str, ...]:
    return tuple(read_path(path, option) for path in as_list(value))


def _true_or_false(value: Any, option: Option) -> bool:
    if type(value) is not bool:
        raise wrong_type(option, value, "true or false")
    return value


def _number(value: Any, option: Option) -> int:
    # An exact match, as a bool is an int to Python.
    if type(value) is not int:
        raise wrong_type(option, value, "a number")
    return value


def _size(value: Any, option: Option) -> int:
    return parse_memory(value) if isinstance(value, str) else _number(value, option)


def _trace(value: Any, option: Option) -> tuple[str, ...]:
    kinds = [read_text(kind, option) for kind in as_list(value)]
    return parse_trace(",".join(kinds)) if any(kinds) else ()


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


def _choice(value: Any, option: Option) -> str:
    if value not in option.choices:
        raise ConfigError(
            f"{option.name} cannot be {value!r:.100}",
            cure=f"choose from {', '.join(option.choices)}",
            option=option.flag,
        )
    return str(value)


def _anything(value: Any, option: Option) -> Any:
    """The options that pyvmm.spec.surroundings reads."""
    return value


_READ: Mapping[str, Callable[[Any, Option], Any]] = {
    "image": read_text,
    "kernel": read_path,
    "initrd": read_path,
    "modules": read_path,
    "root": read_path,
    "rw": _paths,
    "cpus": _number,
    "memory": _size,
    "cmdline": read_text,
    "trace": _trace,
    "trace_file": read_path,
    "discovery": _choice,
    "on_reboot": _choice,
    "transport": _choice,
    "arch": _choice,
    "name": read_text,
    "rm": _true_or_false,
    "kvm": _choice,
    "confine": _choice,
    "allow_read": _anything,
    "user": read_text,
    "cgroup": read_path,
    "control_socket": _anything,
    "stop_timeout": _anything,
}


def wrong_type(option: Option, value: object, wanted: str) -> ConfigError:
    """The error that says so."""
    return ConfigError(f"{option.name} is to be {wanted}, not {value!r:.100}", option=option.flag)
