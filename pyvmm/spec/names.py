"""The names that a VM can have: its control socket is a file of that name."""

from __future__ import annotations

from pyvmm.errors import ConfigError

MAX_NAME_BYTES = 64
SOCKET_SUFFIX = ".sock"  # of the file, after the name


def check_name(name: str, option: str = "--name") -> None:
    """Raise ConfigError for a name that a VM cannot have. A colon would end it for `pyvmm cp`, a
    space for a shell, and with a dash in front it would be an option."""
    if not name:
        raise ConfigError(
            "an empty text is not a name", cure="use letters and digits", option=option
        )
    if not name.isprintable() or {"/", ":", " "} & set(name) or name[0] in ".-":
        raise ConfigError(
            f"the name {name!r:.100} is not printable, has a slash or a colon or a space in it or "
            "begins with a dot or a dash",
            cure="use letters, digits and dashes",
            option=option,
        )
    # In this order: what is not printable may not be encodable either.
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ConfigError(
            f"the name has more than {MAX_NAME_BYTES} bytes", cure="shorten it", option=option
        )
