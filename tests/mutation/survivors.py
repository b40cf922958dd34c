"""The survivors that are known: accepted.toml, told by function and statement."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import NamedTuple

from mutation.mutate import Mutant

FILE = Path(__file__).parent / "accepted.toml"
Key = tuple[str, str, str, str, int]


class Entry(NamedTuple):
    """A survivor; why none can notice it, or "" for one that a test is still to be written for."""

    key: Key
    reason: str


def load(path: Path | None = None) -> dict[Key, Entry]:
    """All those in FILE, or in `path`. Raises ValueError for an entry that says too little."""
    found = {}
    for row in tomllib.loads((path or FILE).read_text()).get("survivor", []):
        function, mutation = row["in"], row["mutation"]
        file, _, name = function.partition(":")
        before, arrow, after = mutation.partition("  =>  ")
        if not arrow:
            raise ValueError(f"{FILE}: no arrow in {mutation!r}")
        entry = Entry((file, name, before, after, row.get("again", 0)), row.get("reason", ""))
        found[entry.key] = entry
    return found


def as_toml(mutant: Mutant) -> str:
    """An entry for the list, with its reason left open."""
    lines = [
        "[[survivor]]",
        f"in = {json.dumps(f'{mutant.file}:{mutant.function}')}",
        f"mutation = {json.dumps(f'{mutant.before}  =>  {mutant.after}')}",
    ]
    if mutant.again:
        lines.append(f"again = {mutant.again}")
    return "\n".join(lines) + "\n\n"
