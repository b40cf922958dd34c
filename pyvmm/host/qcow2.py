"""A qcow2 image and the files that it needs, opened by us: none because the image says so.

The format itself is QEMU's business. This looks at the few fields of the header by which an image
could have QEMU open something (its docs/interop/qcow2.txt, "Header" and "Header extensions"), and
at one that nobody here can serve. Nothing in an image is believed: every number is bounded, and
what is read is 64 KiB at most. QEMU then gets the descriptors from which that was read, with the
whole chain spelled out (`blockdev`), so that no name in an image means anything to it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from pyvmm.errors import ConfigError, HostError
from pyvmm.host.files import QCOW2_MAGIC, ImageFile, open_image

_OPTION = "--disk"
# magic, version, backing_file_offset, backing_file_size, cluster_bits, size, crypt_method
_START = struct.Struct(">4sIQIIQI")
_VERSIONS = (2, 3)
_HEADER_2 = 72  # bytes of a header of version 2, which has neither features nor its own length
_FEATURES_AT, _HEADER_LENGTH_AT, _HEADER_3 = 72, 100, 104
_CLUSTER_BITS = range(9, 22)
_EXTERNAL_DATA_FILE = 1 << 2  # an incompatible feature
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT, _DATA_FILE_NAME = 0xE2792ACA, 0x44415441
_LONGEST_NAME = 1023
_WHOLE_FILES = ("qcow2", "raw", "file", "host_device")  # drivers that show all of a file
_MOST = 64 << 10  # bytes looked at for extensions


class Layer(NamedTuple):
    """One image of a chain, open and locked: `format` is "qcow2" or "raw"; `data` is the external
    data file of a qcow2 image that has one."""

    image: ImageFile
    format: str
    data: ImageFile | None = None

    @property
    def files(self) -> tuple[ImageFile, ...]:
        """All that is open."""
        return (self.image,) if self.data is None else (self.image, self.data)


class Header(NamedTuple):
    """The other files that an image names; "" for one that it does not name.

    `backing` and `data_file` are names as they stand there, `backing_format` the driver that QEMU
    would take. `has_data_file` counts, whether or not there is a name.
    """

    backing: str = ""
    backing_format: str = ""
    has_data_file: bool = False
    data_file: str = ""


def read_header(path: str, fd: int, cure: str = "add ,format=raw") -> Header:
    """The header of the image that is open as `fd`; `path` is its name in messages, `cure` what
    helps if it is another kind of file.

    Raises ConfigError for a file that is not such an image, is damaged, or encrypted; OSError.
    """
    start = os.pread(fd, _HEADER_3, 0).ljust(_HEADER_3, b"\0")
    magic, version, offset, length, cluster_bits, _, encryption = _START.unpack_from(start)
    if magic != QCOW2_MAGIC:
        raise ConfigError(f"{path} is not a qcow2 image", cure=cure, option=_OPTION)
    if version not in _VERSIONS:
        raise _damaged(path, f"version {version}")
    if cluster_bits not in _CLUSTER_BITS:
        raise _damaged(path, f"clusters of 2**{cluster_bits} bytes")
    cluster = 1 << cluster_bits
    header_length, features = _HEADER_2, 0
    if version > 2:
        features, header_length = (
            int.from_bytes(start[_FEATURES_AT : _FEATURES_AT + 8], "big"),
            int.from_bytes(start[_HEADER_LENGTH_AT:_HEADER_3], "big"),
        )
        if not _HEADER_3 <= header_length <= cluster:
            raise _damaged(path, f"a header of {header_length} bytes")
    if encryption:
        raise ConfigError(
            f"{path} is encrypted, and there is nobody to give a key",
            cure="qemu-img convert it to one that is not",
            option=_OPTION,
        )
    backing = _name_at(path, fd, offset, length, header_length, cluster) if offset else ""
    # Extensions end where the name of the backing file begins, or with the first cluster.
    room = max(0, (offset or cluster) - header_length)
    area = os.pread(fd, min(room, _MOST), header_length)
    found = _extensions(path, area, room)
    return Header(
        backing,
        found.get(_BACKING_FORMAT, ""),
        bool(features & _EXTERNAL_DATA_FILE),
        found.get(_DATA_FILE_NAME, ""),
    )


def _name_at(path: str, fd: int, offset: int, length: int, least: int, cluster: int) -> str:
    """The name of the backing file, which lies in the first cluster. It ends at a NUL, if any."""
    if not (length <= _LONGEST_NAME and least <= offset and offset + length <= cluster):
        raise _damaged(path, f"a backing file's name of {length} bytes at {offset:#x}")
    name = os.pread(fd, length, offset)
    if len(name) != length:
        raise _damaged(path, "it is cut short")
    # Not of the file system's encoding, as it is only shown.
    return name.split(b"\0", 1)[0].decode(errors="backslashreplace")


def _extensions(path: str, area: bytes, room: int) -> dict[int, str]:
    """The texts of the extensions that have one, by type, as far as they lie in `area`, the
    beginning of `room` bytes. Of two the last counts, as for QEMU."""
    found = {}
    at = 0
    while at + _EXTENSION.size <= len(area):
        kind, length = _EXTENSION.unpack_from(area, at)
        if not kind:
            break
        at += _EXTENSION.size
        if length > room - at:
            raise _damaged(path, f"a header extension of {length} bytes")
        if kind in (_BACKING_FORMAT, _DATA_FILE_NAME):
            found[kind] = area[at : at + length].decode(errors="backslashreplace")
        at += -(-length // 8) * 8
    return found


def _damaged(path: str, what: str) -> ConfigError:
    return ConfigError(
        f"{path} is a damaged qcow2 image, or one that nobody can read: {what}",
        cure=f"qemu-img check {path} may say more",
        option=_OPTION,
    )


# --- the files that it needs ----------------------------------------------------------------------


def open_chain(
    path: str, backing: Sequence[str], data_file: str | None, *, read_only: bool, closing: ExitStack
) -> tuple[Layer, ...]:
    """The image at `path` and those below it, the top one first, open and locked; `closing` closes
    them.

    `backing` are the files that the user allows for those below, in order, `data_file` the one for
    the image's data; what an image calls them does not count. Only image and data file may be
    written, unless `read_only`. Raises ConfigError for a file that the user has not named, or named
    for nothing; HostError.
    """
    allowed = list(backing)
    layers: list[Layer] = []
    format = "qcow2"
    while True:
        image = _open(path, format == "raw", read_only or bool(layers), closing)
        header = _header_of(image, layers) if format == "qcow2" else Header()
        data = None
        if header.has_data_file:
            if layers or data_file is None:
                raise _unnamed(path, "keeps its data in", header.data_file, "data-file=FILE")
            data = _open(data_file, False, read_only, closing)
        elif not layers and data_file is not None:
            raise _needless(path, data_file, "data-file=")
        layers.append(Layer(image, format, data))
        if not header.backing:
            break
        if not allowed:
            raise _unnamed(path, "builds on", header.backing, "backing=FILE")
        _check_that_it_is_a_whole_file(path, header.backing)
        path, format = allowed.pop(0), header.backing_format
        format = format or ("qcow2" if path.lower().endswith(".qcow2") else "raw")
        if format not in ("qcow2", "raw"):
            raise ConfigError(
                f"{image.path} builds on a file in the format {format!r:.40}",
                cure="qemu-img convert makes one image of both",
                option=_OPTION,
            )
    if allowed:
        raise _needless(path, allowed[0], "backing=")
    return tuple(layers)


def _open(path: str, raw: bool, read_only: bool, closing: ExitStack) -> ImageFile:
    image = open_image(path, read_only=read_only, raw=raw)
    closing.callback(image.close)
    return image


def _header_of(image: ImageFile, above: Sequence[Layer]) -> Header:
    try:
        if not above:
            return read_header(image.path, image.fd)
        cure = f"qemu-img rebase -u -F raw -b {image.path} {above[-1].image.path} writes down so"
        return read_header(image.path, image.fd, cure)
    except OSError as error:
        raise HostError(error.errno or 0, f"read of {image.path}") from None


def _check_that_it_is_a_whole_file(path: str, name: str) -> None:
    """Raises ConfigError if the image at `path` describes what it builds on, by `name`, as anything
    but one file: as a part of one, say, which would be served from a wrong place."""
    if not name.startswith("json:"):
        return
    import json  # only for such names, which are rare

    try:
        more = _more_than_a_file(json.loads(name.removeprefix("json:")))
    except (ValueError, RecursionError):
        more = "text that is not JSON"
    if more:
        raise ConfigError(
            f"{path} builds on more than a file: its name for that has {more:.100}",
            cure="qemu-img rebase -u -b FILE -F FORMAT, if it is a whole file",
            option=_OPTION,
        )


def _more_than_a_file(node: object) -> str:
    """The first of QEMU's options in `node` that is neither a name nor a driver for whole files."""
    if not isinstance(node, dict):
        return repr(node)
    for key, value in node.items():
        what = key.rpartition(".")[2]  # options may be nested or dotted
        if what == "file" and isinstance(value, dict):
            if more := _more_than_a_file(value):
                return more
        elif what == "driver":
            if value not in _WHOLE_FILES:
                return f"the driver {value!r}"
        elif what not in ("file", "filename") or not isinstance(value, str):
            return repr(key)
    return ""


def _unnamed(path: str, how: str, name: str, option: str) -> ConfigError:
    return ConfigError(
        f"{path} {how} another file, {name!r:.200}, and an image may name any file of yours",
        cure=f"if you trust it, say which file that is: ,{option}",
        option=_OPTION,
    )


def _needless(path: str, name: str, option: str) -> ConfigError:
    return ConfigError(
        f"{path} needs no other file, but {name} is named",
        cure=f"leave {option} out",
        option=_OPTION,
    )


def blockdev(
    layers: Sequence[Layer], node: str, place: Callable[[int], str], *, direct: bool
) -> dict[str, Any]:
    """The nodes that QEMU is to open, as QMP's blockdev-add has it (its qapi/block-core.json): the
    chain as the node called `node`. `place` is by what name QEMU opens one of our descriptors.

    Nothing is left for QEMU to take from an image. Nor does it lock: the descriptors are locked.
    """
    below: dict[str, Any] | None = None
    for layer in reversed(layers):
        common = {
            "read-only": layer.image.read_only,
            "discard": "unmap",
            "cache": {"direct": direct},
        }
        one: dict[str, Any] = {"driver": layer.format, **common}
        for key, image in zip(("file", "data-file"), layer.files, strict=False):
            one[key] = {
                "driver": "host_device" if image.is_block_device else "file",
                "filename": place(image.fd),
                "locking": "off",
                "auto-read-only": False,
                **common,
            }
        if layer.format == "qcow2":
            one["backing"] = below
        below = one
    assert below is not None, "a chain has an image"
    return {**below, "node-name": node}
