"""KVM's structures as plain data with the header's field names, and back."""

from __future__ import annotations

from typing import Any

from pyvmm.host.saved import Saved

_SKIPPED = ("pad", "padding", "reserved")


def to_plain(ffi: Any, structure: Any) -> dict[str, Any]:
    """The fields of `structure`, or of what it points to: numbers, dicts, arrays as bytes."""
    kind = ffi.typeof(structure)
    if kind.kind == "pointer":
        structure, kind = structure[0], kind.item
    found: dict[str, Any] = {}
    for name, field in kind.fields:
        if name.startswith(_SKIPPED):
            continue
        value = getattr(structure, name)
        if field.type.kind == "primitive":
            found[name] = int(value)
        elif field.type.kind == "struct":
            found[name] = to_plain(ffi, value)
        elif field.type.item.kind == "struct":
            found[name] = [to_plain(ffi, one) for one in value]
        else:
            found[name] = bytes(ffi.buffer(value)).hex()
    return found


def fill(ffi: Any, structure: Any, saved: Saved) -> None:
    """Set the fields of `structure` from what `to_plain` gave. Raises ConfigError for values that
    such fields cannot have."""
    kind = ffi.typeof(structure)
    if kind.kind == "pointer":
        structure, kind = structure[0], kind.item
    for name, field in kind.fields:
        if name.startswith(_SKIPPED):
            continue
        if field.type.kind == "primitive":
            setattr(structure, name, _number(ffi, field.type, name, saved))
        elif field.type.kind == "struct":
            fill(ffi, getattr(structure, name), saved.table(name))
        elif field.type.item.kind == "struct":
            entries = list(saved.tables(name, field.type.length))
            if len(entries) != field.type.length:
                raise saved.wrong(f"{name} has {len(entries)} entries")
            for one, entry in zip(getattr(structure, name), entries, strict=True):
                fill(ffi, one, entry)
        else:
            array = getattr(structure, name)
            ffi.buffer(array)[:] = saved.data(name, ffi.sizeof(array))


def _number(ffi: Any, kind: Any, name: str, saved: Saved) -> int:
    bits = 8 * ffi.sizeof(kind)
    if int(ffi.cast(kind, -1)) < 0:
        return saved.integer(name, (1 << bits - 1) - 1, -(1 << bits - 1))
    return saved.bits(name, bits)
