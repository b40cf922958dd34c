"""The fault of an archive, in one line."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from pyvmm.errors import ConfigError

_BROKEN = (
    *(tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError),
    *(ValueError, OverflowError, RecursionError, MemoryError),
)


class Refused(ConfigError):
    """The archive is damaged, or asks for what no container image may."""


def shown(name: str) -> str:
    """A name out of an archive, fit for a terminal and for one line."""
    text = ascii(name) if not (name.isascii() and name.isprintable()) else repr(name)
    return text if len(text) <= 120 else f"{text[:117]}..."


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Make a Refused of all that the libraries find wrong with `what`."""
    import zstandard

    try:
        yield
    except (*_BROKEN, zstandard.ZstdError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise Refused(f"{what} is damaged: {reason}", cure="save the image again") from None
