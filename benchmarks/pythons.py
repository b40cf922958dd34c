"""The Python interpreters of this machine that pyvmm can be measured with.

Each needs what pyvmm imports; one that lacks it gets a virtual environment of its own, in the
cache.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGES = ("cffi", "click", "ioctl-opt")
PATIENCE = 120  # seconds for pip
_NAMES = ("python3.12", "python3.13", "python3.14", "python3.13t", "python3.14t")
_ABOUT = """
import json, platform, sys, sysconfig
said = sysconfig.get_config_var("CONFIG_ARGS") or ""
json.dump({
    "version": platform.python_version(),
    "optimised": "--enable-optimizations" in said,
    "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "system": sys.base_prefix == "/usr",
}, sys.stdout)
"""


class Python(NamedTuple):
    """An interpreter. `name` is for tables: version and how it was built."""

    name: str
    program: str


class Unusable(NamedTuple):
    """One that cannot be had, and why."""

    program: str
    reason: str


def find(wanted: Sequence[str]) -> tuple[list[Python], list[Unusable]]:
    """Those of `wanted` (programs), or all that are found, this very one first; made usable."""
    usable: list[Python] = []
    unusable: list[Unusable] = []
    for program in wanted or _candidates():
        try:
            python = _prepare(program)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            unusable.append(Unusable(program, _reason(error)))
            continue
        if python.name not in (other.name for other in usable):
            usable.append(python)
    return usable, unusable


def _candidates() -> Iterator[str]:
    yield sys.executable
    yield from filter(os.path.exists, ["/usr/bin/python3"])
    # pyenv's are shims that may stand for nothing.
    found = filter(None, map(shutil.which, _NAMES))
    yield from (path for path in found if "shims" not in Path(path).parts)
    yield from sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.1[3-9]*/bin/python3")))


def _prepare(program: str) -> Python:
    about = json.loads(_output([program, "-c", _ABOUT]))
    name = about["version"]
    name += ", free-threaded" if about["free_threaded"] else ""
    name += ", the system's" if about["system"] else ""
    name += ", optimised" if about["optimised"] else ""
    if not _has_packages(program):
        folder = _cache() / re.sub("[^0-9a-z.]+", "-", name)
        made = str(folder / "bin/python")
        if not os.path.exists(made) or not _has_packages(made):
            _output([program, "-m", "venv", "--clear", str(folder)])
            _output([made, "-m", "pip", "install", "--quiet", *PACKAGES])
        program = made
    return Python(name, program)


def _has_packages(program: str) -> bool:
    check = [program, "-c", "import cffi, click, ioctl_opt"]
    return subprocess.run(check, capture_output=True, timeout=PATIENCE).returncode == 0


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    return done.stdout


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "pyvmm" / "benchmark-pythons"


def _reason(error: Exception) -> str:
    said = getattr(error, "stderr", None)
    lines = said.strip().splitlines() if isinstance(said, str) else []
    return lines[-1] if lines else str(error)
