"""What a VM can be called: its control socket is a file of that name."""

from __future__ import annotations

from pyvmm.errors import ConfigError

MAX_NAME_BYTES = 64


def check_name(name: str) -> None:
    """Raise ConfigError for a name that a VM cannot have."""
    if not name.isprintable() or "/" in name or name.startswith("."):
        raise ConfigError(
            f"the name {name!r} is not printable, has a slash in it or begins with a dot",
            cure="use letters, digits and dashes",
            option="--name",
        )
    # In this order: what is not printable may not be encodable either.
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ConfigError(
            f"the name has more than {MAX_NAME_BYTES} bytes", cure="shorten it", option="--name"
        )
