"""What a VM can be asked to be: one table for the command line, the Python API and configuration
files.

A row's `name` is the keyword of `pyvmm.VM` and the key in a configuration file, its `flag` is the
option of `pyvmm run`. A value may be written as on the command line (``"root.img,snapshot"``), as a
table of plain values (``{"path": "root.img", "snapshot": True}``), or as the specification itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.spec.vm import (
    DISCOVERY,
    ON_REBOOT,
    DeviceSpec,
    DiskSpec,
    VmSpec,
    parse_disk,
    parse_memory,
    parse_trace,
)

KVM = ("auto", "host", "emulated")


class Option(NamedTuple):
    """One thing to ask for. `field` is the VmSpec's, `device` a kind of device (kinds); with
    neither it says how the VM is run, and is not part of its specification.

    `many`: a list, of which one value alone may stand for itself. `default` is the value that says
    nothing.
    """

    name: str
    flag: str
    field: str = ""
    device: str = ""
    many: bool = False
    default: Any = None


OPTIONS = (
    Option("image", "image"),
    Option("kernel", "--kernel", field="kernel"),
    Option("initrd", "--initrd", field="initrd"),
    Option("disks", "--disk", field="disks", many=True, default=()),
    Option("net", "--net", device="net", many=True, default=()),
    Option("console", "--console", device="console"),
    Option("ports", "--port", device="ports", many=True, default=()),
    Option("rng", "--rng", device="rng"),
    Option("devices", "--device", device="user", many=True, default=()),
    Option("balloon", "--balloon", device="balloon"),
    Option("vsock", "--vsock", device="vsock"),
    Option("cpus", "--cpus", field="cpus", default=1),
    Option("memory", "--memory", field="memory", default="512M"),
    Option("cmdline", "--cmdline", field="cmdline", default=""),
    Option("trace", "--trace", field="trace", many=True, default=()),
    Option("trace_file", "--trace-file", field="trace_file"),
    Option("discovery", "--discovery", field="discovery", default="auto"),
    Option("on_reboot", "--on-reboot", field="on_reboot", default="restart"),
    Option("name", "--name", field="name", default=""),
    Option("rm", "--rm", default=False),
    Option("kvm", "--kvm", default="auto"),
)
NAMES = tuple(option.name for option in OPTIONS)


def make_spec(values: Mapping[str, Any]) -> VmSpec:
    """The machine that `values` describe, by the names above; names that are not there, and those
    of options that are not part of a specification, are left alone. Raises ConfigError.

    Still to be checked by `pyvmm.spec.vm.validate`.
    """
    fields: dict[str, Any] = {}
    found: list[DeviceSpec] = []
    for option in OPTIONS:
        value = values.get(option.name)
        if value is None:
            continue
        if option.device:
            found += [] if value is False else _devices(option, value)
        elif option.field:
            fields[option.field] = _READ[option.field](value, option)
        else:
            _READ[option.name](value, option)
    if not fields.get("kernel"):
        raise ConfigError("no kernel is named", cure="--kernel vmlinuz", option="--kernel")
    return VmSpec(**fields, devices=tuple(found))


def as_list(value: Any) -> list[Any]:
    """A list of values, or one value that stands for itself, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


# --- values of VmSpec -----------------------------------------------------------------------------


def _text(value: Any, option: Option) -> str:
    if not isinstance(value, str):
        raise _wrong_type(option, value, "a text")
    if "\0" in value:
        raise ConfigError(f"{option.name} has a NUL in it", option=option.flag)
    return value


def _path(value: Any, option: Option) -> str:
    return _text(value.__fspath__() if hasattr(value, "__fspath__") else value, option)


def _true_or_false(value: Any, option: Option) -> bool:
    if type(value) is not bool:
        raise _wrong_type(option, value, "true or false")
    return value


def _kvm(value: Any, option: Option) -> str:
    return _choice(value, option, KVM)


def _number(value: Any, option: Option) -> int:
    # An exact match, as a bool is an int to Python.
    if type(value) is not int:
        raise _wrong_type(option, value, "a number")
    return value


def _size(value: Any, option: Option) -> int:
    return parse_memory(value) if isinstance(value, str) else _number(value, option)


def _disks(value: Any, option: Option) -> tuple[DiskSpec, ...]:
    return tuple(_disk(disk, option) for disk in as_list(value))


def _disk(value: Any, option: Option) -> DiskSpec:
    if isinstance(value, DiskSpec):
        return value
    if isinstance(value, Mapping):
        from pyvmm.spec import tables

        found = tables.read(DiskSpec, value, option.name)
        if not found.path:
            raise ConfigError("a disk without a path", option=option.flag)
        return found
    return parse_disk(_path(value, option))


def _trace(value: Any, option: Option) -> tuple[str, ...]:
    kinds = [_text(kind, option) for kind in as_list(value)]
    return parse_trace(",".join(kinds)) if any(kinds) else ()


def _discovery(value: Any, option: Option) -> str:
    return _choice(value, option, DISCOVERY)


def _on_reboot(value: Any, option: Option) -> str:
    return _choice(value, option, ON_REBOOT)


def _choice(value: Any, option: Option, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(
            f"{option.name} cannot be {value!r:.100}",
            cure=f"choose from {', '.join(choices)}",
            option=option.flag,
        )
    return str(value)


_READ: Mapping[str, Callable[[Any, Option], Any]] = {
    "kernel": _path,
    "initrd": _path,
    "disks": _disks,
    "cpus": _number,
    "memory": _size,
    "cmdline": _text,
    "name": _text,
    "trace": _trace,
    "trace_file": _path,
    "discovery": _discovery,
    "on_reboot": _on_reboot,
    # These are no part of a specification: they are looked at only.
    "image": _text,
    "rm": _true_or_false,
    "kvm": _kvm,
}


def _wrong_type(option: Option, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"{option.name} is to be {wanted}, not {value!r:.100}", option=option.flag)


# --- devices --------------------------------------------------------------------------------------


def _devices(option: Option, value: Any) -> list[DeviceSpec]:
    values = as_list(value)
    if not values:
        return []
    if option.device == "ports":
        return [_ports(values, option)]
    if not option.many and len(values) > 1:
        raise _wrong_type(option, value, "one only")
    read = [_device(option, one) for one in values]
    return [device for device in read if device is not None]


def _device(option: Option, value: Any) -> DeviceSpec | None:
    from pyvmm.kinds import registry as devices

    if isinstance(value, DeviceSpec) and value.kind == option.device:
        return value
    if option.device == "console" and value == "serial":
        return None  # which every machine has
    if isinstance(value, Mapping):
        return devices.from_table(option.device, value, option.name)
    if value is True and not option.many:
        value = ""
    if not isinstance(value, str):
        raise _wrong_type(option, value, "a text, a table or a specification")
    return devices.parse(option.device, value)


def _ports(values: list[Any], option: Option) -> DeviceSpec:
    from pyvmm.kinds import port as device_ports

    specs = [_port(value, option) for value in values]
    ports = tuple(port for spec in specs for port in spec.ports)
    # One device has them all.
    return device_ports.Spec(ports, packed=any(spec.packed for spec in specs))


def _port(value: Any, option: Option) -> Any:
    from pyvmm.kinds import port as device_ports
    from pyvmm.kinds import registry as devices
    from pyvmm.spec import tables

    if isinstance(value, device_ports.Spec):
        return value
    if isinstance(value, device_ports.PortSpec):
        return device_ports.Spec((value,))
    if isinstance(value, Mapping):
        table = dict(value)
        packed = table.pop("packed", False)
        if type(packed) is not bool:
            raise _wrong_type(option, value, "with packed as true or false")
        port = tables.read(device_ports.PortSpec, table, option.name)
        return device_ports.Spec((port,), packed=packed)
    return devices.parse("ports", _text(value, option))
