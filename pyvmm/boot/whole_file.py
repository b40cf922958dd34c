"""A file that is written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable

from pyvmm.errors import ConfigError


def write_whole(output: str, pieces: Iterable[bytes]) -> None:
    """Write `pieces` to the file `output`, which appears when all of them were written. Raises
    ConfigError, and what the pieces raise."""
    partial = f"{output}.{os.getpid()}.part"
    try:
        with open(partial, "wb") as file:
            for piece in pieces:
                file.write(piece)
        os.replace(partial, output)
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {os.strerror(error.errno or 0)}") from None
    finally:
        if os.path.exists(partial):
            os.unlink(partial)
