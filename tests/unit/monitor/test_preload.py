"""What a monitor may import late is what `preload` imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pyvmm
from pyvmm.monitor import preload

PLACE = Path(pyvmm.__file__).parent
# Not a monitor's: what builds images, other commands, and what tells of a package that is missing.
NOT_THERE = ("pyvmm.api", "pyvmm.cli", "pyvmm.emulated_host", "pyvmm.relay", "rich")


def imported(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imported(child)


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def test_it_is_all_that_its_modules_import_anywhere() -> None:
    wanted = set()
    for name in preload.names():
        path = PLACE.parent / name.replace(".", "/")
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        wanted |= set(imported(ast.parse(file.read_text())))
    code = f"import sys, {preload.__name__} as it; it.all_modules(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    missing = {name for name in wanted - set(done.stdout.split()) if is_module(name)}
    assert {name for name in missing if not name.startswith(NOT_THERE)} == set()
