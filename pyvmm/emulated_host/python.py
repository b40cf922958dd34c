"""Start this Python once more without what it would look for and not need."""

from __future__ import annotations

import os
import sys

import pyvmm


def python_argv(entry: str, *arguments: str) -> list[str]:
    """The command that calls `entry` ("package.module:function") in this interpreter.

    Its modules come from where ours came from. `site` is left out: a virtual environment's .pth
    files alone cost as much as all the rest of Python's start, and every import costs twenty times
    what it costs on the machine. `arguments` are in sys.argv[1:]; what the function returns is the
    exit code.
    """
    module, _, function = entry.partition(":")
    # os._exit: taking the interpreter apart in good order would cost once more, for nothing.
    code = (
        f"import sys, os; sys.path[:] = {_module_path()!r}; "
        f"from {module} import {function} as entry; code = entry(); "
        "sys.stdout.flush(); sys.stderr.flush(); os._exit(code)"
    )
    return [sys.executable, "-I", "-S", "-B", "-c", code, *arguments]


def _module_path() -> list[str]:
    # An editable install finds pyvmm by an import hook, not by a directory in sys.path.
    checkout = os.path.dirname(os.path.dirname(os.path.abspath(pyvmm.__file__)))
    found = [os.path.abspath(entry) for entry in sys.path if os.path.exists(entry)]
    return list(dict.fromkeys([*found, checkout]))
