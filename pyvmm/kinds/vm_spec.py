"""A whole VM's specification: made from options, checked, and as text for another process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pyvmm.errors import ConfigError
from pyvmm.kinds import registry
from pyvmm.spec import vm
from pyvmm.spec.options import FIRST, LAST, read_own
from pyvmm.spec.plain import checked
from pyvmm.spec.record import replace
from pyvmm.spec.vm import DeviceSpec, DiskSpec, VmSpec


def make_spec(values: Mapping[str, Any]) -> VmSpec:
    """The machine that `values` describe, by the names of the options; names that are not there,
    and those of options that are not part of a specification, are left alone. Raises ConfigError.

    A value may be written as on the command line (``"root.img,snapshot"``), as a table of plain
    values (``{"path": "root.img", "snapshot": True}``), or as the specification itself. What comes
    back is still to be checked by `validate`.
    """
    fields: dict[str, Any] = {}
    for row in (*FIRST, *LAST):
        value = values.get(row.name)
        if value is None or row.not_in_files:
            continue
        read = read_own(row, value)
        if row.field:
            fields[row.field] = read
    disks: list[DiskSpec] = []
    devices: list[DeviceSpec] = []
    for kind, of_kind in registry.KINDS.items():
        value = values.get(of_kind.option)
        if value is None or (value is False and kind != "disk"):
            continue
        (disks if kind == "disk" else devices).extend(registry.read(kind, value))
    if not fields.get("kernel"):
        raise ConfigError("no kernel is named", cure="--kernel vmlinuz", option="--kernel")
    return VmSpec(**fields, disks=tuple(disks), devices=tuple(devices))


def validate(spec: VmSpec) -> VmSpec:
    """`spec` with what it left open filled in and its devices in the guest's order, or ConfigError
    for what needs no file to be seen wrong."""
    vm.check(spec)
    _check_trace_file(spec)
    devices: list[DeviceSpec] = []
    if spec.devices:
        for one in spec.devices:
            registry.load(one.kind)  # or say that there is no such kind
        for kind in registry.KINDS:
            if some := [device for device in spec.devices if device.kind == kind]:
                devices += registry.check(kind, some, spec)
    disks = registry.check("disk", spec.disks, spec)
    return replace(spec, disks=tuple(disks), devices=tuple(devices))


def _check_trace_file(spec: VmSpec) -> None:
    path = spec.trace_file
    if path is None:
        return

    used = [spec.kernel]

    def note(other: str) -> str:
        used.append(other)
        return other

    with_paths(replace(spec, trace_file=None), note)
    if any(_is_same_file(path, other) for other in used):
        raise ConfigError(
            f"{path} is a file of the guest's, which the trace would overwrite",
            cure="name another file",
            option="--trace-file",
        )


def _is_same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False  # One of them is not there: whoever opens it says so.


def with_paths(spec: VmSpec, change: Callable[[str], str]) -> VmSpec:
    """`spec` with all paths as `change` gives them."""
    return replace(
        spec,
        kernel=_changed_kernel(spec.kernel, change),
        initrd=None if spec.initrd is None else change(spec.initrd),
        disks=tuple(registry.with_paths(disk, change) for disk in spec.disks),
        devices=tuple(registry.with_paths(device, change) for device in spec.devices),
        trace_file=None if spec.trace_file is None else change(spec.trace_file),
    )


def given_by(spec: VmSpec) -> list[str]:
    """What `spec` is to be given of this machine, a text for each: paths from the root, taps."""
    found: list[str] = []

    def note(path: str) -> str:
        found.append(absolute(path))
        return path

    with_paths(replace(spec, disks=(), devices=()), note)
    for part in spec.parts:
        found += given_of(part)
    return found


def given_of(part: DiskSpec | DeviceSpec) -> Iterator[str]:
    """The same of `part`, a disk or another device."""
    paths: list[str] = []

    def note(path: str) -> str:
        paths.append(absolute(path))
        return path

    registry.with_paths(part, note)
    # Of a directory or a back end all counts: whether it may be written to, above all.
    how = ""
    if registry.KINDS[part.kind].lends_files:
        how = "to be read" if getattr(part, "read_only", False) else "to be written"
    for path in paths:
        yield f"{path} {how}".rstrip()
    if tap := getattr(part, "tap", ""):
        yield f"the tap {tap}"


def absolute(path: str) -> str:
    """Where `path` is from the current directory, if that is there."""
    try:
        return os.path.abspath(path)
    except OSError:
        return path


def _changed_kernel(kernel: str, change: Callable[[str], str]) -> str:
    return kernel if not kernel or vm.names_kernel(kernel) else change(kernel)


def to_json(spec: VmSpec) -> str:
    """`spec` as JSON text, for `from_json` in another process."""
    import json
    from dataclasses import asdict  # not for a start without an emulated host

    devices = [(device.kind, asdict(device)) for device in spec.devices]
    return json.dumps({**asdict(spec), "devices": devices})


def from_json(text: str) -> VmSpec:
    """The spec that `to_json` wrote. Raises ConfigError for anything else."""
    import json

    try:
        data: Mapping[str, Any] = json.loads(text)
    except (ValueError, TypeError) as error:
        shown = f"{text[:60]!r}, of {len(text)} characters"
        raise ConfigError(f"not a VM specification: {error}: {shown}") from None
    try:
        disks = tuple(checked(registry.from_plain("disk", disk)) for disk in data["disks"])
        devices = tuple(
            checked(registry.from_plain(kind, values)) for kind, values in data["devices"]
        )
        trace = tuple(data["trace"])
        values = {**data, "disks": disks, "devices": devices, "trace": trace}
        return validate(checked(VmSpec(**values)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"not a VM specification: {error}") from None
