"""The initial RAM disk of the emulated host, and the settings of a run, which init.sh gets by the
control port once it is up."""

from __future__ import annotations

import os
import secrets
import shlex
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyvmm.emulated_host.architecture import emulated_machine
from pyvmm.emulated_host.modules import Module, load_order
from pyvmm.emulated_host.ports import RELAY_DEVICE
from pyvmm.emulated_host.spec import BUSYBOX, RELAY_VARIABLE, EmulatedHostSpec, HostImage
from pyvmm.errors import ConfigError
from pyvmm.host import cpio
from pyvmm.host.processors import INSIDE_VARIABLE
from pyvmm.host.programs import find_program

_DIRECTORIES = ("bin", "dev", "proc", "sys", "lower", "upper", "root", "modules")
_PT_INTERP = 3


@dataclass(frozen=True)
class RunSettings:
    """The settings that one run hands to the init: the command, where it runs, and its files.

    `mark` ends each output stream. `disks`, `sinks` and `streams` are absolute paths. `foreign`:
    whether programs are the image's, not the machine's. `restored`: whether the machine goes on
    from a saved state.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    mark: str
    host_name: str
    disks: Sequence[str] = ()
    sinks: Sequence[str] = ()
    streams: Sequence[str] = ()
    foreign: bool = False
    restored: bool = False


def new_mark() -> str:
    """A string of 32 characters that no program can write by accident or by knowing it."""
    return secrets.token_hex(16)


def settings_of(
    spec: EmulatedHostSpec, argv: Sequence[str], *, restored: bool = False
) -> RunSettings:
    """The settings for running `argv` as `spec` says, with a new mark, in a machine that is
    `restored` from a saved state or not."""
    env = inside_environment(spec.env)
    if spec.has_relay:
        env[RELAY_VARIABLE] = RELAY_DEVICE
    return RunSettings(
        argv=(_program(argv[0], spec.env), *argv[1:]),
        env=env,
        cwd=spec.cwd,
        mark=new_mark(),
        host_name=os.uname().nodename,
        disks=tuple(os.path.realpath(disk.path) for disk in spec.disks),
        sinks=tuple(os.path.realpath(sink.path) for sink in spec.sinks),
        streams=tuple(os.path.realpath(stream.path) for stream in spec.streams),
        foreign=spec.image.is_foreign,
        restored=restored,
    )


def _program(name: str, env: Mapping[str, str]) -> str:
    # Looked up here: the busybox inside takes its own "ls" for the machine's.
    found = None if "/" in name else find_program(name, env.get("PATH", os.defpath))
    return found or name


def inside_environment(env: Mapping[str, str]) -> dict[str, str]:
    """`env` as a command inside gets it."""
    # Compiled modules would land in a RAM disk that goes away: only time lost.
    return {**env, INSIDE_VARIABLE: "1", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True)
class Parts:
    """All that the archive is made from. `root` and `kvm` are lists of modules to load;
    `files` is what lies in those modules' files and in others, by name."""

    root: tuple[Module, ...]
    kvm: tuple[Module, ...]
    files: Mapping[str, bytes]


def archive_parts(image: HostImage) -> Parts:
    """The parts of `image`. Raises ConfigError for a file that is missing."""
    machine = emulated_machine(image.architecture)
    root = tuple(load_order(image.modules_dir, machine.ROOT_MODULES))
    kvm = tuple(m for m in load_order(image.modules_dir, machine.KVM_MODULES) if m not in root)
    here = os.path.dirname(__file__)
    paths = {
        "init": os.path.join(here, "init.sh"),
        "command.sh": os.path.join(here, "command.sh"),
        "bin/busybox": image.busybox,
        **{module.name: module.path for module in (*root, *kvm)},
    }
    files = {name: _read(path) for name, path in paths.items()}
    _check_static(files["bin/busybox"], image.busybox)
    return Parts(root, kvm, files)


def archive(parts: Parts) -> bytes:
    """The initial RAM disk, the same for every run of an image."""
    files = parts.files
    return cpio.archive(
        [
            *(cpio.directory(name) for name in _DIRECTORIES),
            cpio.regular("init", files["init"], 0o755),
            cpio.regular("command.sh", files["command.sh"]),
            cpio.regular("bin/busybox", files["bin/busybox"], 0o755),
            *(
                cpio.regular(f"modules/{module.name}.ko", module.loadable(files[module.name]))
                for module in (*parts.root, *parts.kvm)
            ),
            cpio.regular("modules/root", _lines(parts.root)),
            cpio.regular("modules/kvm", _lines(parts.kvm)),
        ]
    )


def _lines(modules: Sequence[Module]) -> bytes:
    return "".join(f"{module.name}\n" for module in modules).encode()


def _check_static(elf: bytes, path: str) -> None:
    # A program header of type PT_INTERP (<elf.h>) names the loader of a dynamically linked program.
    types: list[int] = []
    if elf.startswith(b"\x7fELF") and len(elf) >= 64:
        (table,), (size, count) = (
            struct.unpack_from("<Q", elf, 32),
            struct.unpack_from("<HH", elf, 54),
        )
        places = range(table, table + size * count, size or 1)
        types = [int.from_bytes(elf[at : at + 4], "little") for at in places]
    if not types or _PT_INTERP in types:
        raise ConfigError(
            f"{path} is not statically linked, as the emulated host's init needs it",
            cure="apt-get install busybox-static",
        )


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}, which the emulated host needs: {error.strerror}"
        ) from None


def message(settings: RunSettings, now: float) -> bytes:
    """`settings` as init.sh reads them from the control port: the number of bytes, a line, and a
    script. `now` is the time, in seconds of the epoch."""
    script = run_script(settings) + f"NOW={round(now)}\n".encode()
    return f"{len(script)}\n".encode() + script


def run_script(settings: RunSettings) -> bytes:
    """`settings` in the shell's language; every value is quoted."""
    lines = [
        f"MARK={settings.mark}",
        f"HOST_NAME={shlex.quote(settings.host_name)}",
        f"WORKING_DIRECTORY={shlex.quote(settings.cwd)}",
        f"DISK_COUNT={len(settings.disks)}",
        *(f"DISK_{n}={shlex.quote(path)}" for n, path in enumerate(settings.disks)),
        f"SINK_COUNT={len(settings.sinks)}",
        *(f"SINK_{n}={shlex.quote(path)}" for n, path in enumerate(settings.sinks)),
        f"RUN_PORTS=/dev/vport{3 if settings.foreign else 2}p",
        f"FOREIGN={int(settings.foreign)}",
        f"RESTORED={int(settings.restored)}",
        f"STREAM_COUNT={len(settings.streams)}",
        *(f"STREAM_{n}={shlex.quote(path)}" for n, path in enumerate(settings.streams)),
        f"run_command() {{ exec {_command_line(settings)}; }}",
    ]
    # Names that are not text (surrogates) go back to the bytes they came from.
    return os.fsencode("\n".join(lines) + "\n")


def _command_line(settings: RunSettings) -> str:
    variables = [f"{name}={value}" for name, value in settings.env.items()]
    # env would read a name with "=" as a variable: so it runs a shell, which runs the command.
    guard = [BUSYBOX, "sh", "-c", 'exec "$@"', "sh"] if "=" in settings.argv[0] else []
    return shlex.join([BUSYBOX, "env", "-i", *variables, *guard, *settings.argv])
