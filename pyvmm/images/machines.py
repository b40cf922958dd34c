"""The VMs that keep what they change: a folder each, under the user's state.

$XDG_STATE_HOME/pyvmm/machines/VM/     (default: ~/.local/state)
    machine.json    the image it was made from, and that image's root disk
    disk.overlay    what the guest wrote; pyvmm.virtio.blk.overlay_file says how

An overlay counts for the very base it was begun on only. So the base's path and time are kept: one
that is gone, or was built again, is told before the overlay is opened.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass

from pyvmm.errors import ConfigError

_RECORD = "machine.json"
_OVERLAY = "disk.overlay"


@dataclass(frozen=True)
class Machine:
    """`image` is the name of the image, `base` its root disk's path, `mark` tells that very file
    from one that is built later."""

    name: str
    image: str
    base: str
    mark: str

    @property
    def overlay(self) -> str:
        """The path of what the guest has changed."""
        return os.path.join(_folder(self.name), _OVERLAY)


def find(name: str) -> Machine | None:
    """The VM `name`, if it has ever kept anything. Raises ConfigError for a damaged record."""
    path = os.path.join(_folder(name), _RECORD)
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        return Machine(name, *(str(values[key]) for key in ("image", "base", "mark")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged: {error}", cure=f"pyvmm rm {name}") from None


def keep(name: str, image: str, base: str) -> Machine:
    """The VM `name` with the root disk `base` of `image`, which it had or has from now on.

    Raises ConfigError if it has another one, or its own is gone.
    """
    found = find(name)
    if found is None:
        return _create(name, image, base)
    if found.image != image:
        raise ConfigError(
            f"the VM {name} was made from the image {found.image}, not {image}",
            cure=f"name another VM, or give up what it changed: pyvmm rm {name}",
            option="--name",
        )
    check(found)
    return found


def check(machine: Machine) -> None:
    """Raise ConfigError if the image of `machine` is not there as it was."""
    mark = _mark(machine.base)
    if mark != machine.mark:
        what = "is gone" if mark is None else "was built again"
        raise ConfigError(
            f"the image {machine.image} {what} since the VM {machine.name} began, whose changes "
            "need it as it was",
            cure=f"give them up: pyvmm rm {machine.name}",
        )


def names() -> list[str]:
    """Of all VMs that keep changes, sorted."""
    try:
        entries = os.listdir(_place())
    except OSError:
        return []
    return sorted(name for name in entries if not name.startswith("."))


def using(image: str) -> list[str]:
    """The VMs that were made from `image`. One whose record is damaged may have been."""
    found = []
    for name in names():
        try:
            machine = find(name)
        except ConfigError:
            found.append(name)
            continue
        if machine is not None and machine.image == image:
            found.append(name)
    return found


def bases() -> set[str]:
    """The root disks that VMs need."""
    found = set()
    for name in names():
        try:
            machine = find(name)
        except ConfigError:
            continue
        if machine is not None:
            found.add(machine.base)
    return found


def has(name: str) -> bool:
    """True if the VM `name` keeps changes, be its record damaged."""
    return os.path.isdir(_folder(name))


def remove(name: str) -> None:
    """Throw away what the VM `name`, which does not run, has changed. Raises ConfigError."""
    folder = _folder(name)
    if not has(name):
        known = ", ".join(names())
        raise ConfigError(
            f"there is no VM called {name!r} that keeps changes",
            cure=f"those that do: {known}" if known else "none does",
        )
    try:
        # Under another name first: a half removed VM would be one without its changes.
        doomed = os.path.join(_place(), f".{name}.{os.getpid()}")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise ConfigError(f"cannot remove {folder}: {error.strerror}") from None


def _create(name: str, image: str, base: str) -> Machine:
    mark = _mark(base)
    if mark is None:
        raise ConfigError(f"the image {image} has no root disk {base}", cure="build it again")
    machine = Machine(name, image, base, mark)
    path = os.path.join(_folder(name), _RECORD)
    try:
        os.makedirs(_folder(name), mode=0o700, exist_ok=True)
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(asdict(machine), file)
        os.replace(f"{path}.new", path)
    except OSError as error:
        raise ConfigError(
            f"{_folder(name)}: {error.strerror}",
            cure="set XDG_STATE_HOME to another place, or use --rm to keep nothing",
        ) from None
    return machine


def _mark(base: str) -> str | None:
    try:
        found = os.stat(base)
    except OSError:
        return None
    return f"{found.st_size}-{found.st_mtime_ns}"


def _folder(name: str) -> str:
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"no VM can be called {name!r}")
    return os.path.join(_place(), name)


def _place() -> str:
    base = os.environ.get("XDG_STATE_HOME", "")
    if not base.startswith("/"):
        base = os.path.expanduser("~/.local/state")
    if not base.startswith("/"):
        raise ConfigError(
            "there is no home directory to keep VMs' changes in",
            cure="set XDG_STATE_HOME to a directory, or use --rm",
        )
    return os.path.join(base, "pyvmm", "machines")
