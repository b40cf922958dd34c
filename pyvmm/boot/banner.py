"""The release in an unpacked kernel's banner (Linux init/version.c, linux_banner: "Linux
version RELEASE (…")."""

from __future__ import annotations

import re
from collections.abc import Iterable

_BANNER = re.compile(rb"Linux version ([!-~]{1,64}) \(")
_OVERLAP = 128


def release_in(pieces: Iterable[bytes]) -> str:
    """The release of the kernel that comes in `pieces`; "" if it does not say. Raises what they
    raise."""
    end = b""
    for piece in pieces:
        found = _BANNER.search(end + piece)
        if found:
            return found[1].decode("ascii")
        end = piece[-_OVERLAP:]
    return ""
