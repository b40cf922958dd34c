"""A VM described in a TOML file: `pyvmm run --config vm.toml`, `VM.from_config("vm.toml")`.

The keys are the names of pyvmm.spec.options. Relative paths are relative to the file. A file is
data, which people pass on: the code of a disk or a device that it names is only run if whoever
starts the VM allows that.

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
from pyvmm.spec import tables
from pyvmm.spec.options import NAMES, OPTIONS, Option, make_spec
from pyvmm.spec.vm import DeviceSpec, DiskSpec, VmSpec, validate, write_memory

_ONLY_TYPED = "it is for the command line only"
# Options of `pyvmm run` that are no keys, and what to do about it.
_NO_KEYS = {
    "allow_code": "whoever starts the VM allows it, not the file: --allow-code",
    "agent": "write vsock = true, which is what --agent does",
    "rng_limit": 'write rng = "bps=…"',
    "command": _ONLY_TYPED,
    "config": _ONLY_TYPED,
    "debug": _ONLY_TYPED,
    "detach": _ONLY_TYPED,
    "log_format": _ONLY_TYPED,
    "print_config": _ONLY_TYPED,
}


def load(path: str, *, allow_code: bool = False) -> dict[str, Any]:
    """The values that the file gives, by name, in the forms that `make_spec` takes.

    With `allow_code` it may name Python files, which run as this user. Raises ConfigError, with the
    number of the line where that can be told.
    """
    import tomllib

    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig")  # some editors begin with a byte-order mark
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", cure="check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    folder = os.path.dirname(os.path.abspath(path))
    try:
        for key in values:
            if key not in NAMES:
                cure = _NO_KEYS.get(key.replace("-", "_"), "")
                raise tables.UnknownKey(key, list(NAMES), "", cure=cure)
        _check_sizes(values)
        return _from_folder(values, folder, allow_code)
    except tables.UnknownKey as error:
        raise ConfigError(f"{path}{_line_of(error.key, text)}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


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
    name = re.escape(key)
    pattern = re.compile(rf"""(^|[\s,{{.])["']?{name}["']?\s*=|^\s*\[.*\b{name}\b""")
    for number, line in enumerate(text.splitlines(), start=1):
        if pattern.search(line):
            return f":{number}"
    return ""


# --- relative paths -------------------------------------------------------------------------------


def _refuse_code(spec: VmSpec) -> None:
    code = [disk.path for disk in spec.disks if disk.kind == "python"]
    code += [getattr(device, "path", "") for device in spec.devices if device.kind == "user"]
    if code:
        raise ConfigError(
            f"it names code, which would run as you: {', '.join(code):.200}",
            cure="read that file; then --allow-code, or allow_code=True in Python, lets it run",
        )


def _from_folder(values: Mapping[str, Any], folder: str, allow_code: bool) -> dict[str, Any]:
    """`values` as specifications whose paths begin at `folder` where they are relative."""
    off = {option.name for option in OPTIONS if option.device and values.get(option.name) is False}
    given = {key: value for key, value in values.items() if key not in off}
    # A machine has a kernel: where the file names none, the command line will, or an image.
    spec = with_paths(make_spec({"kernel": "/", **given}), lambda path: _join(folder, path))
    if not allow_code:
        _refuse_code(spec)
    found = dict(values)
    for option in OPTIONS:
        if option.name not in given:
            continue
        if option.field:
            found[option.name] = getattr(spec, option.field)
        elif option.device:
            devices = [device for device in spec.devices if device.kind == option.device]
            # An empty list takes away what a default would give, such as --console serial.
            found[option.name] = devices or given[option.name]
    return found


def _join(folder: str, path: str) -> str:
    return os.path.normpath(os.path.join(folder, path))


def with_paths(spec: VmSpec, change: Callable[[str], str]) -> VmSpec:
    """`spec` with all paths as `change` gives them."""
    return replace(
        spec,
        kernel=change(spec.kernel) if spec.kernel else "",
        initrd=None if spec.initrd is None else change(spec.initrd),
        disks=tuple(_disk_with_paths(disk, change) for disk in spec.disks),
        devices=tuple(_device_with_paths(device, change) for device in spec.devices),
        trace_file=None if spec.trace_file is None else change(spec.trace_file),
    )


def _disk_with_paths(disk: DiskSpec, change: Callable[[str], str]) -> DiskSpec:
    path = disk.path if disk.kind == "ram" else change(disk.path)
    return replace(
        disk,
        path=path,
        overlay=None if disk.overlay is None else change(disk.overlay),
        backing=tuple(map(change, disk.backing)),
        data_file=None if disk.data_file is None else change(disk.data_file),
    )


def _device_with_paths(device: Any, change: Callable[[str], str]) -> DeviceSpec:
    if device.kind == "ports":
        ports = tuple(replace(port, path=change(port.path)) for port in device.ports)
        device = replace(device, ports=ports)
    elif device.kind in ("user", "vsock") and device.path:
        device = replace(device, path=change(device.path))
    changed: DeviceSpec = device
    return changed


# --- writing --------------------------------------------------------------------------------------


def describe(values: Mapping[str, Any]) -> str:
    """The text of a file that says what `values` do, as `make_spec` takes them; without a kernel it
    is an image's, which its name stands for. Raises ConfigError."""
    spec = validate(make_spec({**values, "kernel": values.get("kernel") or "/"}))
    if not values.get("kernel"):
        spec = replace(spec, kernel="")
    return dump(spec, **{option.name: values.get(option.name) for option in OPTIONS})


def dump(spec: VmSpec, **values: Any) -> str:
    """The text of a file that `load` makes an equal machine from, wherever the file is: its paths
    are absolute. `values` are those of options that are not part of the specification."""
    import tomli_w

    spec = with_paths(spec, os.path.abspath)
    found: dict[str, Any] = {}
    for option in OPTIONS:
        value = _plain(option, spec) if option.field or option.device else values.get(option.name)
        if value not in (None, option.default, (), ""):
            found[option.name] = value
    return tomli_w.dumps(found)


def _plain(option: Option, spec: VmSpec) -> Any:
    if option.device:
        return _plain_devices(option, [d for d in spec.devices if d.kind == option.device])
    value = getattr(spec, option.field)
    if option.field == "memory":
        return write_memory(value)
    if option.field == "disks":
        return tuple(_plain_disk(index, disk) for index, disk in enumerate(value))
    return value


def _plain_disk(index: int, disk: DiskSpec) -> dict[str, Any]:
    table = tables.write(disk)
    if table.get("id") == f"disk{index}":  # which it would have been given anyway
        del table["id"]
    return table


def _plain_devices(option: Option, devices: list[Any]) -> Any:
    if option.device == "ports":
        ports = [tables.write(port) for spec in devices for port in spec.ports]
        if any(spec.packed for spec in devices):
            ports[0]["packed"] = True
        return tuple(ports)
    if not devices:
        return None
    if option.device == "console":
        return "virtio,packed" if devices[0].packed else "virtio"
    written = [tables.write(device) for device in devices]
    return written if option.many else written[0] or True
