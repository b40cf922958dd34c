"""`--root DIR`: a guest whose root is a directory of this machine, and a command in it as its user
would run it here.

The directory is a share that the guest cannot change; the initramfs puts an overlay above it, which
takes what the guest writes, and has the agent run the guest. With `--rw PATH` a part of it is a
share of its own, which the guest does change.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pyvmm.boot import file_kinds
from pyvmm.boot.cmdline import values as values_of
from pyvmm.errors import ConfigError
from pyvmm.kinds import share, vsock
from pyvmm.machine.board.registry import uname_of
from pyvmm.monitor.run_command import CommandLine
from pyvmm.spec.options import as_list
from pyvmm.spec.vm import ARCHITECTURES, IN_DISK

_OPTION = "--root"
_TAG = "pyvmm-root"
_GUESTS_OWN = ("/dev", "/proc", "/run", "/sys")
# What of this process' environment means the same in any guest, and where all files are the same.
_OF_TERMINALS = ("TERM", "COLORTERM", "NO_COLOR", "TZ", "LANG", "LANGUAGE")
_OF_FILES_FOR_ANYBODY = ("SHELL", "EDITOR", "VISUAL", "PAGER", "LESS")
_OF_FILES = ("HOME", "USER", "LOGNAME", "PATH", *_OF_FILES_FOR_ANYBODY)
_SHELLS = ("/bin/bash", "/bin/sh")
_MOST_STEPS = 200  # on the way to a program
# Programs that most roots have, by which it is told what they are for.
_USUAL = ("/bin/sh", "/usr/bin/env", "/sbin/init")
_INSTEAD = {
    "image": ("image", "an image has a root of its own"),
    "initrd": ("--initrd", "only pyvmm's initramfs can mount it"),
}


def choose(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with the devices and the kernel that a guest with such a root has. Raises
    ConfigError for what cannot be its root."""
    chosen = dict(options)
    if chosen.get("root") is None:
        raise ConfigError("there is no --root that it is a part of", cure="add it", option="--rw")
    for name, (option, why) in _INSTEAD.items():
        if chosen.get(name) is not None:
            raise ConfigError(
                f"{why}, and {option} is given too", cure="leave one out", option=_OPTION
            )
    if chosen.get("kernel") == IN_DISK:
        raise ConfigError(
            "the kernel in a disk has an initrd of its own", cure="name another", option="--kernel"
        )
    if values_of(str(chosen.get("cmdline") or ""), "root"):
        raise ConfigError(
            "the root is a directory, and --cmdline has a root= too",
            cure="leave one out",
            option=_OPTION,
        )
    folder = _folder(chosen.pop("root"))
    _check_programs(folder, chosen.get("arch") or "")
    parts = [_part(folder, os.fspath(path)) for path in as_list(chosen.pop("rw", None) or ())]
    whole = folder in parts
    if whole and folder == "/":
        raise ConfigError(
            "all of this machine's files would be the guest's to change",
            cure="name parts of them",
            option="--rw",
        )
    chosen["shares"] = [
        share.Spec(folder, read_only=not whole, tag=_TAG, is_root=True),
        *(
            share.Spec(part, _in_guest(part, folder), is_part=True)
            for part in dict.fromkeys(parts)
            if part != folder
        ),
        *as_list(chosen.get("shares") or ()),
    ]
    if not chosen.get("vsock"):
        chosen["vsock"] = [vsock.Spec()]
    if chosen.get("kernel") is None:
        from pyvmm import images
        from pyvmm.images.debian_kernels import PREFIX
        from pyvmm.monitor.from_image import choose_transport

        chosen["kernel"] = f"{PREFIX}{images.DEFAULT_KERNEL}"
        choose_transport(chosen)
    return chosen


def _folder(root: Any) -> str:
    path: str = os.fspath(root)
    if not path:
        raise ConfigError("no directory is named", cure="--root / , say", option=_OPTION)
    if not os.path.lexists(path):
        raise ConfigError(f"there is no {path}", cure="check the path", option=_OPTION)
    if not os.path.isdir(path):
        raise ConfigError(f"{path} is not a directory", cure="name one", option=_OPTION)
    _check_access(path, _OPTION)
    return os.path.realpath(path)


def _check_access(path: str, option: str) -> None:
    if not os.access(path, os.R_OK | os.X_OK):
        raise ConfigError(
            f"{path} is not yours to read", cure="name another, or change its mode", option=option
        )


def _check_programs(folder: str, arch: str) -> None:
    """Raise ConfigError if the programs in `folder` are of no use to a guest of `arch`."""
    runs_on = file_kinds.RUN_ON.get(uname_of(arch), ())
    for path in _USUAL:
        machine = file_kinds.elf_machine(_program(folder, path))
        if machine is None:
            continue
        if machine in runs_on:
            return
        what = file_kinds.ELF_MACHINES.get(machine, f"machine {machine}")
        cure = f"name a directory with programs for {arch or uname_of(arch)}"
        for other in ARCHITECTURES:
            if machine in file_kinds.RUN_ON[uname_of(other)]:
                cure = f"use --arch {other}, or {cure}"
        raise ConfigError(
            f"the programs in {folder} are for {what}, by its {path}, and the guest is not",
            cure=cure,
            option=_OPTION,
        )


def _part(folder: str, path: str) -> str:
    """The directory that `--rw PATH` stands for: a path of the guest's if it begins with a slash,
    else one from the current directory."""
    full = os.path.realpath(f"{folder}/{path}" if os.path.isabs(path) else path)
    if not os.path.lexists(full):
        raise ConfigError(f"there is no {path}", cure="check the path", option="--rw")
    if not os.path.isdir(full):
        raise ConfigError(
            f"{path} is not a directory", cure="name the one that it is in", option="--rw"
        )
    if full != folder and not full.startswith(folder.rstrip("/") + "/"):
        raise ConfigError(
            f"{path} is not in {folder}", cure="name a part of the guest's root", option="--rw"
        )
    _check_access(full, "--rw")
    return full


def _in_guest(path: str, folder: str) -> str:
    """The guest's path of `path`, which is `folder` or in it."""
    return os.path.normpath(f"/{os.path.relpath(path, folder)}")


# --- what runs in it ------------------------------------------------------------------------------


def command_line(root: Any, command: Sequence[str], user: str | None = None) -> CommandLine:
    """`command`, or else a shell, in the guest whose root is the directory `root`: as `user`, or
    else the one that we are, in the directory that we are in. Raises ConfigError."""
    folder = os.path.realpath(os.fspath(root))
    passed: tuple[str, ...] = _OF_TERMINALS
    if folder == "/":
        passed += _OF_FILES if user is None else _OF_FILES_FOR_ANYBODY
    return CommandLine(
        tuple(command) or (_shell(folder),),
        env=tuple(
            f"{name}={value}"
            for name, value in os.environ.items()
            if name in passed or name.startswith("LC_")
        ),
        cwd=_directory(folder),
        user=_user() if user is None else user,
    )


def _user() -> str:
    """As the agent takes it. By numbers: the guest may know no names, or others."""
    groups = dict.fromkeys((os.getegid(), *os.getgroups()))
    return f"{os.geteuid()}:{os.getegid()}:{','.join(map(str, groups))}"


def _directory(folder: str) -> str:
    """The guest's path of the current directory; "/" if that is not in its root."""
    try:
        current = os.getcwd()
    except OSError:
        raise ConfigError("the current directory is gone", cure="cd to another") from None
    if current != folder and not current.startswith(folder.rstrip("/") + "/"):
        return "/"
    place = _in_guest(current, folder)
    own = f"/{place.split('/')[1]}"
    if own in _GUESTS_OWN:
        raise ConfigError(
            f"the current directory is in {own}, and the guest has one of its own",
            cure="cd to another",
            option=_OPTION,
        )
    return place


def _shell(folder: str) -> str:
    """The user's shell, if that is in `folder`, or another."""
    for path in (os.environ.get("SHELL", ""), *_SHELLS):
        if os.path.isabs(path) and _program(folder, path):
            return path
    raise ConfigError(
        f"there is no shell in {folder}", cure="name a command: -- COMMAND", option=_OPTION
    )


def _program(folder: str, path: str) -> str:
    """This machine's path of the program that whoever has `folder` as root finds at `path`, as
    links begin there too; "" if there is none."""
    left, found = path.split("/")[::-1], ""
    for _ in range(_MOST_STEPS):
        if not left:
            break
        name = left.pop()
        if name in ("", "."):
            continue
        if name == "..":
            found = os.path.dirname(found)
            continue
        try:
            target = os.readlink(f"{folder}/{found}/{name}")
        except OSError:
            found = f"{found}/{name}"
            continue
        found = "" if target.startswith("/") else found
        left += target.split("/")[::-1]
    full = f"{folder}/{found}"
    return full if not left and os.path.isfile(full) and os.access(full, os.X_OK) else ""
