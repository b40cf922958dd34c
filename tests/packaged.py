"""A wheel of this checkout, built elsewhere: what was built here before must not slip into it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PARTS = ("pyproject.toml", "README.md", "LICENSE", "guest-images", "pyvmm")
_LEFT_BY_RUNS = shutil.ignore_patterns("__pycache__", ".mypy_cache", "*.egg-info")


def build_wheel(folder: Path) -> Path:
    """The wheel's path; it and a copy of the sources are in `folder`."""
    source = folder / "source"
    source.mkdir()
    for name in _PARTS:
        part = ROOT / name
        if part.is_dir():
            shutil.copytree(part, source / name, symlinks=True, ignore=_LEFT_BY_RUNS)
        else:
            shutil.copy(part, source)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("*.whl")
    return wheel
