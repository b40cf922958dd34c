"""The reference of all options, from their rows: ``python -m pyvmm.kinds.reference`` writes what is
in docs/options.md."""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, fields
from typing import Any

from pyvmm.kinds import registry
from pyvmm.spec.options import ARGUMENT, FLAG, OPTIONAL, Option
from pyvmm.spec.tables import PAIRS

_HEAD = """# Options

What a VM can be asked to be. `python -m pyvmm.kinds.reference > docs/options.md` writes this page
from the rows that `pyvmm run` is made from. A key is a configuration file's and a keyword of
`pyvmm.VM`; [python-api.md](python-api.md) tells how values are written there.

| `pyvmm run` | Key | |
|---|---|---|
"""
_TABLES = """
## As tables

What describes a device is a text as on the command line, or a table with these keys. A key without
a value has to be given. Sizes and rates may be texts such as `"20M"`.

| Key | Table |
|---|---|
"""


def page() -> str:
    """docs/options.md."""
    rows = "".join(f"| {_typed(row)} | {_key(row)} | {_said(row)} |\n" for row in _in_order())
    tables = "".join(f"| {_key(row)} | {_table(row)} |\n" for row in _in_order() if row.device)
    return f"{_HEAD}{rows}{_TABLES}{tables}"


def _in_order() -> tuple[Option, ...]:
    return registry.in_order_of_help()


def _typed(row: Option) -> str:
    if row.shape == ARGUMENT:
        return f"`{row.name.upper()}`"
    value = "" if row.shape == FLAG else row.metavar or "|".join(row.choices) or row.name.upper()
    value = f"[{value}]" if row.shape == OPTIONAL and not value.startswith("[") else value
    also = f", `{row.also}`" if row.also else ""
    return _cell(f"`{row.flag} {value}".rstrip() + "`" + also)


def _key(row: Option) -> str:
    return "" if row.not_in_files else f"`{row.name}`"


def _said(row: Option) -> str:
    default = f" The default is {row.default}." if row.shows_default else ""
    return _cell(f"{row.help}{default}")


def _table(row: Option) -> str:
    kind = registry.load(row.device)
    table: Any = getattr(kind, "TABLE", kind.Spec)
    known = [field for field in fields(table) if not field.metadata.get("internal")]
    return _cell(", ".join(f"`{_field(field)}`" for field in known))


def _field(field: Field[Any]) -> str:
    if field.default is MISSING:
        return field.name
    if field.type == "bool | None":  # which is neither, by default
        return f"{field.name} = true|false"
    default = (
        {}
        if field.type == PAIRS
        else []
        if field.default == ()
        else ""
        if field.default is None
        else field.default
    )
    return f"{field.name} = {json.dumps(default)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
