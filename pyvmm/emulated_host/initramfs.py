"""The initial RAM disk of the emulated host: a part that is cached, and a part for each run."""

from __future__ import annotations

import os
import secrets
import shlex
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyvmm.emulated_host.architecture import emulated_machine
from pyvmm.emulated_host.modules import Module, load_order
from pyvmm.emulated_host.ports import relay_device
from pyvmm.emulated_host.spec import RELAY_VARIABLE, EmulatedHostSpec, HostImage
from pyvmm.errors import ConfigError
from pyvmm.host import cpio
from pyvmm.host.processors import INSIDE_VARIABLE
from pyvmm.host.programs import find_program

_DIRECTORIES = ("bin", "dev", "proc", "sys", "lower", "upper", "root", "modules")
_PT_INTERP = 3
_BUSYBOX = "/dev/.pyvmm/busybox"


@dataclass(frozen=True)
class RunSettings:
    """The settings that one run hands to the init: the command, where it runs, and its files.

    `mark` ends each output stream. `disks`, `sinks` and `streams` are absolute paths. `relay`:
    whether there is a port for sockets. `foreign`: whether programs are the image's, not the
    machine's.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    mark: str
    host_name: str
    disks: Sequence[str] = ()
    sinks: Sequence[str] = ()
    relay: bool = False
    streams: Sequence[str] = ()
    foreign: bool = False


def new_mark() -> str:
    """A string of 32 characters that no program can write by accident or by knowing it."""
    return secrets.token_hex(16)


def settings_of(spec: EmulatedHostSpec, argv: Sequence[str]) -> RunSettings:
    """The settings for running `argv` as `spec` says, with a new mark."""
    env = inside_environment(spec.env)
    if spec.has_relay:
        env[RELAY_VARIABLE] = relay_device(len(spec.sinks))
    return RunSettings(
        argv=(_program(argv[0], spec.env), *argv[1:]),
        env=env,
        cwd=spec.cwd,
        mark=new_mark(),
        host_name=os.uname().nodename,
        disks=tuple(os.path.realpath(disk.path) for disk in spec.disks),
        sinks=tuple(os.path.realpath(sink.path) for sink in spec.sinks),
        relay=spec.has_relay,
        streams=tuple(os.path.realpath(stream.path) for stream in spec.streams),
        foreign=spec.image.is_foreign,
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
class BaseParts:
    """All that the cached part is made from. `root` and `kvm` are lists of modules to load;
    `files` is what lies in those modules' files and in others, by name."""

    root: tuple[Module, ...]
    kvm: tuple[Module, ...]
    files: Mapping[str, bytes]


def base_parts(image: HostImage) -> BaseParts:
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
    return BaseParts(root, kvm, files)


def base_archive(parts: BaseParts) -> bytes:
    """The part of the initial RAM disk that is the same for every run of an image."""
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


def run_archive(settings: RunSettings) -> bytes:
    """The part for one run, to follow the base archive."""
    return cpio.archive([cpio.regular("run.sh", run_script(settings))])


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
        f"RELAY_COUNT={int(settings.relay)}",
        f"FOREIGN={int(settings.foreign)}",
        f"STREAM_COUNT={len(settings.streams)}",
        *(f"STREAM_{n}={shlex.quote(path)}" for n, path in enumerate(settings.streams)),
        f"run_command() {{ exec {_command_line(settings)}; }}",
    ]
    # Names that are not text (surrogates) go back to the bytes they came from.
    return os.fsencode("\n".join(lines) + "\n")


def _command_line(settings: RunSettings) -> str:
    variables = [f"{name}={value}" for name, value in settings.env.items()]
    # env would read a name with "=" as a variable: so it runs a shell, which runs the command.
    guard = [_BUSYBOX, "sh", "-c", 'exec "$@"', "sh"] if "=" in settings.argv[0] else []
    return shlex.join([_BUSYBOX, "env", "-i", *variables, *guard, *settings.argv])
