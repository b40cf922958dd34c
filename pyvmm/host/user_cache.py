"""The folder of a user's files that can be made again."""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError


def folder() -> str:
    """$XDG_CACHE_HOME/pyvmm, by default ~/.cache/pyvmm; it need not exist yet.

    A relative XDG_CACHE_HOME is ignored, as the XDG base directory specification wants it. Raises
    ConfigError for a user who has no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not base.startswith("/"):
        base = os.path.expanduser("~/.cache")
    if not base.startswith("/"):
        raise ConfigError(
            "there is no home directory to keep images in", cure="set XDG_CACHE_HOME to a directory"
        )
    return os.path.join(base, "pyvmm")
