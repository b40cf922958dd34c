"""Processes of pyvmm's own that are Python, and where they look for modules.

The current directory is the user's, and a guest may write to it (`--share`): a file json.py there
would be a module. Python looks there for `-c` and `-m`, and for an empty entry in PYTHONPATH, which
nobody means (`PYTHONPATH=/more:$PYTHONPATH` has one where there was none before). See Python's
documentation, Command line and environment, -P and PYTHONPATH.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress

_PATH = "PYTHONPATH"


def command(module: str, *arguments: str, program: str = "") -> list[str]:
    """The command line that runs a module of pyvmm as a program, by the Python `program` or by this
    one. It is to have the `environment`."""
    return [program or sys.executable, "-P", "-m", module, *arguments]


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """`env`, or this process' own, for `command`: what PYTHONPATH names is named from the root, and
    the current directory only by a name."""
    found = dict(os.environ if env is None else env)
    if _PATH in found:  # an empty one is as none
        found[_PATH] = os.pathsep.join(map(_from_root, _named(found)))
    return found


def leave_current_directory(*, as_module: bool = False) -> None:
    """Look for modules in the current directory no more, unless PYTHONPATH has a name for it;
    `as_module`: this process was begun by `-m`."""
    with suppress(OSError):  # the directory is gone
        here = os.getcwd()
        if as_module and not sys.flags.safe_path and sys.path[:1] == [here]:
            del sys.path[0]
        path = os.environ.get(_PATH, "")
        named = map(os.path.abspath, _named(os.environ))
        if path and "" in path.split(os.pathsep) and here not in named:
            sys.path[:] = [path for path in sys.path if path != here]


def _from_root(entry: str) -> str:
    try:
        return os.path.abspath(entry)
    except OSError:  # the current directory is gone
        return entry


def _named(env: Mapping[str, str]) -> list[str]:
    return [entry for entry in env.get(_PATH, "").split(os.pathsep) if entry]
