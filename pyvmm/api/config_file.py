"""A VM described in a TOML file: `pyvmm run --config vm.toml`, `VM.from_config("vm.toml")`.

The keys are the names of pyvmm.kinds.registry's options. Relative paths are relative to the file.
A file is data, which people pass on: the code of a disk or a device that it names is only run if
whoever starts the VM allows that.

    kernel = "vmlinuz"
    memory = "1G"
    net = "user,forward=8080:80"

    [[disks]]
    path = "root.img"
    snapshot = true
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pyvmm.errors import ConfigError
from pyvmm.kinds import registry
from pyvmm.kinds.vm_spec import make_spec, validate, with_paths
from pyvmm.spec import surroundings, tables
from pyvmm.spec.names import check_name
from pyvmm.spec.options import ONLY_TYPED, Option
from pyvmm.spec.sizes import write_memory
from pyvmm.spec.vm import VmSpec

_FOLDERS = ("modules", "root", "rw")  # which are not part of a specification
_TOO_LARGE = 1 << 64
_MOST = 1 << 20  # bytes of a file
_MOST_PARTS = 64  # of a dotted key
_MOST_IN_ALL = 16 << 10  # parts of dotted keys, each of which costs Python's parser a kilobyte
_LONGEST_KEY = 100  # characters of one that is looked for in the text
_SHOWN = "pyvmm run --print-config shows how such a file is written"


def _is_bounded(values: object) -> bool:
    """True if all numbers are those of TOML 1.0 ("Integer"), which Python's parser goes beyond."""
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, int) and not -_TOO_LARGE < value < _TOO_LARGE:
            return False
    return True


def _has_long_keys(text: str) -> bool:
    """True if there may be a dotted key of more than _MOST_PARTS, or more than _MOST_IN_ALL of all:
    Python's parser takes time and memory for the square of them, ten gigabytes for 100 KB."""
    pieces = (piece.split(".") for piece in re.split(r"[\n=,\[\]{}]", text) if "." in piece)
    counts = [sum(map(bool, map(str.strip, parts))) for parts in pieces]
    return max(counts, default=0) > _MOST_PARTS or sum(counts) > _MOST_IN_ALL


def load(path: str, *, allow_code: bool = False) -> dict[str, Any]:
    """The values that the file gives, by name, in the forms that `make_spec` takes.

    With `allow_code` it may name Python files, which run as this user. Raises ConfigError, with the
    number of the line where that can be told.
    """
    import tomllib

    values: dict[str, Any] | None
    try:
        with open(path, "rb") as file:  # which may be a pipe
            data = file.read(_MOST + 1)
        if len(data) > _MOST:
            raise ConfigError(f"{path} has more than {_MOST >> 20} MiB", cure=_SHOWN)
        text = data.decode("utf-8-sig")  # some editors begin with a byte-order mark
        if _has_long_keys(text):
            raise ConfigError(
                f"{path} has a key of more than {_MOST_PARTS} parts, or too many dotted ones",
                cure=_SHOWN,
            )
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", cure="check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file in UTF-8", cure=_SHOWN) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}", cure=_SHOWN) from None
    except (ValueError, RecursionError):
        values = None
    if values is None or not _is_bounded(values):
        raise ConfigError(
            f"{path} has a number of more than 64 bits, or lists within lists without end",
            cure=_SHOWN,
        )
    folder = os.path.dirname(os.path.abspath(path))
    try:
        for key in values:
            if key not in registry.names():
                cure = no_keys().get(key.replace("-", "_"), "")
                raise tables.UnknownKey(key, list(registry.names()), "", cure=cure)
        _check_sizes(values)
        if values.get("name") == "":
            check_name("", option="")
        return _from_folder(values, folder, allow_code)
    except tables.UnknownKey as error:
        raise ConfigError(f"{path}{_line_of(error.key, text)}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def no_keys() -> dict[str, str]:
    """The options of `pyvmm run` that a file has not, and what to do about it."""
    rows = {row.name: row.not_in_files for row in registry.options() if row.not_in_files}
    return {**rows, "command": ONLY_TYPED}


def _check_sizes(values: Mapping[str, Any]) -> None:
    """Raises ConfigError for a size without a unit: MiB on the command line, bytes in Python."""
    tables_too = (values, *(value for value in values.values() if isinstance(value, Mapping)))
    for key, value in (item for table in tables_too for item in table.items()):
        if key in ("memory", *tables.SIZES) and type(value) is int:
            raise ConfigError(
                f"{key} = {value} does not say its unit",
                cure=f'write {key} = "{value}M" for MiB, or "{write_memory(value)}" for bytes',
            )


def _line_of(key: str, text: str) -> str:
    """``:LINE`` where `key` first stands in front of = or in brackets, "" if that is not found."""
    if len(key) > _LONGEST_KEY:
        return ""
    name = re.escape(key)
    pattern = re.compile(rf"""(^|[\s,{{.])["']?{name}["']?\s*=|^\s*\[.*\b{name}\b""")
    for number, line in enumerate(text.splitlines(), start=1):
        if pattern.search(line):
            return f":{number}"
    return ""


# --- relative paths -------------------------------------------------------------------------------


def _refuse_code(spec: VmSpec) -> None:
    code = [path for part in spec.parts if (path := registry.code_of(part))]
    if code:
        raise ConfigError(
            f"it names code, which would run as you: {', '.join(code):.200}",
            cure="read that file; then --allow-code, or allow_code=True in Python, lets it run",
        )


def _from_folder(values: Mapping[str, Any], folder: str, allow_code: bool) -> dict[str, Any]:
    """`values` as specifications whose paths begin at `folder` where they are relative."""
    options = registry.file_options()
    off = {option.name for option in options if option.device and values.get(option.name) is False}
    given = {key: value for key, value in values.items() if key not in off}
    # A machine has a kernel: where the file names none, the command line will, or an image.
    spec = with_paths(make_spec({"kernel": "/", **given}), lambda path: _join(folder, path))
    if not allow_code:
        _refuse_code(spec)
    found = dict(values)
    for name in _FOLDERS:
        if given.get(name):
            found[name] = _each(given[name], lambda path: _join(folder, path))
    if surrounding := [key for key in given if key in surroundings.NAMES]:
        around = surroundings.read_surroundings(given).with_paths(lambda path: _join(folder, path))
        found |= {key: around.as_values()[key] for key in surrounding}
    for option in options:
        if option.name not in given:
            continue
        if option.field:
            found[option.name] = getattr(spec, option.field)
        elif option.device:
            devices = [device for device in spec.devices if device.kind == option.device]
            # An empty list takes away what a default would give, such as --console serial.
            found[option.name] = devices or given[option.name]
    return found


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """A path, or each of several, as `change` gives it."""
    return list(map(change, value)) if isinstance(value, (list, tuple)) else change(value)


def _join(folder: str, path: str) -> str:
    return os.path.normpath(os.path.join(folder, path))


# --- writing --------------------------------------------------------------------------------------


def describe(values: Mapping[str, Any]) -> str:
    """The text of a file that says what `values` do, as `make_spec` takes them; without a kernel it
    is an image's, which its name stands for. Raises ConfigError."""
    spec = validate(make_spec({**values, "kernel": values.get("kernel") or "/"}))
    if not values.get("kernel"):
        spec = replace(spec, kernel="")
    return dump(spec, **{name: values.get(name) for name in registry.names()})


def dump(spec: VmSpec, **values: Any) -> str:
    """The text of a file that `load` makes an equal machine from, wherever the file is: its paths
    are absolute. `values` are those of options that are not part of the specification."""
    import tomli_w

    spec = with_paths(spec, os.path.abspath)
    for name in _FOLDERS:
        if values.get(name):
            values[name] = _each(values[name], os.path.abspath)
    around = surroundings.read_surroundings(values).with_paths(os.path.abspath)
    usual = surroundings.USUAL.as_values()
    values |= {key: value for key, value in around.as_values().items() if value != usual[key]}
    found: dict[str, Any] = {}
    for option in registry.file_options():
        value = _plain(option, spec) if option.field or option.device else values.get(option.name)
        if value not in (None, option.default, (), [], ""):
            found[option.name] = value
    return tomli_w.dumps(found)


def _plain(option: Option, spec: VmSpec) -> Any:
    if option.device:
        return registry.plain(
            option.device, [part for part in spec.parts if part.kind == option.device]
        )
    value = getattr(spec, option.field)
    return write_memory(value) if option.field == "memory" else value
