"""Extended attributes into an ext4 file system that mke2fs has made, by libext2fs (package
e2fsprogs), whose calls take names and values as they are.

A program of its own, in a room where it can write to the file system's file and nowhere else.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from typing import IO

from pyvmm.errors import ConfigError
from pyvmm.host import confinement
from pyvmm.images.container.refusal import shown

_LIBRARY = "libext2fs.so.2"
# <ext2fs/ext2fs.h>
_RW, _64BITS = 0x01, 0x20000
_ROOT = 2
_MEMORY = 1 << 30


def record(path: bytes, attributes: Mapping[bytes, bytes]) -> bytes:
    """The input that the program reads, for one file: texts with their lengths."""
    texts = [path, *(text for pair in attributes.items() for text in pair)]
    return b"".join(
        len(text).to_bytes(4, "little") + text
        for text in (len(attributes).to_bytes(4, "little"), *texts)
    )


def _records(file: IO[bytes]) -> Iterator[tuple[bytes, list[tuple[bytes, bytes]]]]:
    while count := _text(file):
        path = _text(file)
        pairs = [(_text(file), _text(file)) for _ in range(int.from_bytes(count, "little"))]
        yield path, pairs


def _text(file: IO[bytes]) -> bytes:
    return file.read(int.from_bytes(file.read(4), "little"))


class _FileSystem:
    """libext2fs, with a failure as ConfigError."""

    def __init__(self) -> None:
        """Load the library. Raises ConfigError where this machine has none."""
        try:
            self._library = ctypes.CDLL(_LIBRARY)
            # Which it depends on, and which knows its errors' texts.
            self._errors = ctypes.CDLL("libcom_err.so.2")
        except OSError:
            raise ConfigError(
                f"the library {_LIBRARY} is missing", cure="install it: apt-get install e2fsprogs"
            ) from None
        self._library.initialize_ext2_error_table()
        self._errors.error_message.restype = ctypes.c_char_p
        self._handle = ctypes.c_void_p()

    def open(self, path: str) -> None:
        manager = ctypes.c_void_p.in_dll(self._library, "unix_io_manager")
        flags = ctypes.c_int(_RW | _64BITS)
        at = ctypes.byref(self._handle)
        self._call("ext2fs_open", path.encode(), flags, 0, ctypes.c_uint(0), manager, at)
        self._call("ext2fs_read_bitmaps", self._handle)

    def add(self, path: bytes, attributes: list[tuple[bytes, bytes]]) -> None:
        """`path` begins below the root, and leads through no link."""
        inode = ctypes.c_uint32()
        root = ctypes.c_uint32(_ROOT)
        self._call("ext2fs_namei", self._handle, root, root, path, ctypes.byref(inode))
        file = ctypes.c_void_p()
        self._call("ext2fs_xattrs_open", self._handle, inode, ctypes.byref(file))
        try:
            self._call("ext2fs_xattrs_read", file)
            for name, value in attributes:
                size = ctypes.c_size_t(len(value))
                self._call("ext2fs_xattr_set", file, name, value, size)
        finally:
            self._call("ext2fs_xattrs_close", ctypes.byref(file))

    def close(self) -> None:
        self._call("ext2fs_close_free", ctypes.byref(self._handle))

    def _call(self, name: str, *arguments: object) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_long
        error = function(*arguments)
        if error:
            text: bytes = self._errors.error_message(ctypes.c_long(error))
            raise ConfigError(f"{name}: {text.decode(errors='replace')}")


def main(arguments: list[str]) -> int:
    """Add the `record`s on standard input to the file system in the file arguments[0]; the exit
    code. A failure is one line on standard error."""
    [disk] = arguments
    path = b""
    try:
        system = _FileSystem()
        confinement.enter(confinement.Room(write=(disk,), memory=_MEMORY))
        system.open(disk)
        for path, attributes in _records(sys.stdin.buffer):
            system.add(path, attributes)
        path = b""
        system.close()
    except ConfigError as error:
        where = shown(path.decode("utf-8", "surrogateescape"))
        print(f"{where}: {error}" if path else error, file=sys.stderr)
        return 1
    return 0
