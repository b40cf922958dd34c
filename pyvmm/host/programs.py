"""Looks programs up as a shell does, without running one."""

from __future__ import annotations

import os


def find_program(name: str, search_path: str | None = None) -> str | None:
    """The absolute path of the program `name` in `search_path` (default: PATH); None if it is in
    none of its directories."""
    if search_path is None:
        search_path = os.environ.get("PATH", os.defpath)
    for directory in search_path.split(os.pathsep):
        path = os.path.join(directory or ".", name)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return os.path.abspath(path)
    return None
