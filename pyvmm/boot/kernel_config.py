"""The configuration and the release in a kernel, and what a guest would lack by the former.

A configuration is text (Linux Documentation/kbuild/kconfig-language.rst): "CONFIG_NAME=y", "=m", or
"# CONFIG_NAME is not set". A kernel built with CONFIG_IKCONFIG has it in itself, packed by gzip
between two markers (Linux kernel/configs.c).

Its release stands in its banner (Linux init/version.c, linux_banner: "Linux version RELEASE (…").
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

_START, _END = b"IKCFG_ST", b"IKCFG_ED"
_MOST = 4 << 20  # bytes of text; Debian's has 300 KiB
_MOST_TRIES = 8  # of what stands behind the first marker and is not a configuration
_LINE = re.compile(r"^CONFIG_(\w+)=([ym])$", re.MULTILINE)


class Wants(NamedTuple):
    """The features that a guest is to have. `console` is "serial", "virtio", or "" for none to look
    after; `modules` tells whether there are any for it to load, `own_init` whether its first
    program is that of pyvmm's initramfs. `filesystem` is the root's, "" for none; with `overlay` it
    is a directory of the host's, and what the guest changes goes elsewhere. `found_by` is the
    board's (pyvmm.machine.board.board.Board)."""

    transport: str = "mmio"
    disks: bool = False
    nets: bool = False
    vsock: bool = False
    shares: bool = False
    overlay: bool = False
    console: str = "serial"
    initrd: bool = False
    modules: bool = False
    own_init: bool = False
    filesystem: str = ""
    found_by: Mapping[str, tuple[str, ...]] = MappingProxyType({})


def embedded(pieces: Iterable[bytes]) -> str:
    """The configuration in an uncompressed kernel, which comes in `pieces`; "" if it has none, or a
    damaged one. Raises what they raise."""
    for packed in islice(_packed(pieces), _MOST_TRIES):
        try:
            text = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(packed, _MOST)
        except zlib.error:
            continue
        return text.decode("utf-8", "replace")
    return ""


def _packed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes between the two markers, or at most so much behind the first."""
    rest, found = b"", None
    for piece in pieces:
        if found is None:
            _, mark, behind = (rest + piece).partition(_START)
            if not mark:
                rest = (rest + piece)[1 - len(_START) :]
                continue
            found = behind
        else:
            found += piece
        end = found.find(_END)
        if end < 0 and len(found) < _MOST:
            continue
        yield found[:_MOST] if end < 0 else found[:end]
        rest, found = found, None
    if found is not None:
        yield found[:_MOST]


def lacking(text: str, wants: Wants) -> list[str]:
    """The options that the kernel with the configuration `text` lacks of those that the guest
    `wants`: one phrase each, such as "CONFIG_VIRTIO_BLK (for its disks)"."""
    missing = []
    for names, states, why in _missing(text, wants):
        what = " or ".join(f"CONFIG_{name}" for name in names)
        module = "=y, which is a module there," if "m" in states else ""
        missing.append(f"{what}{module} ({why})")
    return missing


def to_switch_on(text: str, wants: Wants) -> list[str]:
    """The names of the options that have to become "y" for the guest to have what it `wants`, each
    behind those that it depends on, as far as they are not "y" in the configuration `text`."""
    values = dict(_LINE.findall(text))
    names: dict[str, None] = {}
    # Whoever gets a bus needs its interrupts too.
    for wanted, _, _ in _missing(text, wants, has_pci=True):
        for name in (*_DEPENDS.get(wanted[0], ()), wanted[0]):
            if values.get(name) != "y":
                names[name] = None
    return list(names)


def _missing(
    text: str, wants: Wants, *, has_pci: bool = False
) -> Iterator[tuple[tuple[str, ...], list[str], str]]:
    """(names of which one would be enough, their values, what for)."""
    values = dict(_LINE.findall(text))
    if not values:
        return  # It is not a configuration.
    for names, must_be_built_in, why in _needs(wants, has_pci=has_pci or "PCI" in values):
        states = [values.get(name, "n") for name in names]
        usable = "y" if must_be_built_in or not wants.modules else "ym"
        if not any(state in usable for state in states):
            yield names, states, why


def _needs(wants: Wants, *, has_pci: bool) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """(names of which one is enough, whether it must not be a module, what for)."""
    if wants.console == "serial":
        yield ("SERIAL_8250_CONSOLE",), True, "for its console"
        if names := wants.found_by.get("serial"):
            yield names, True, "to find its console"
    elif wants.console:
        yield ("VIRTIO_CONSOLE",), False, "for its console"
    if wants.initrd:
        yield ("BLK_DEV_INITRD",), True, "for its initrd"
    if wants.own_init:
        yield ("64BIT",), True, "for its programs"
        yield ("BINFMT_ELF",), True, "for its programs"
        yield ("BINFMT_SCRIPT",), True, "for the first program of its initramfs"
        yield ("PROC_FS",), True, "to know its command line"
        yield ("SYSFS",), True, "to find the drivers of its devices"
        yield ("DEVTMPFS",), True, "for its device files"
    if wants.disks or wants.nets or wants.vsock or wants.shares:
        if wants.transport == "pci":
            yield ("PCI",), True, "for its PCI bus"
            yield ("VIRTIO_PCI",), False, "for its devices"
            if has_pci:  # which the others depend on
                if names := wants.found_by.get("pci"):
                    yield names, True, "for its PCI bus"
                yield ("PCI_MSI",), True, "for its devices' interrupts"
        else:
            yield ("VIRTIO_MMIO",), False, "for its devices"
            if names := wants.found_by.get("mmio"):
                yield names, True, "to find its devices"
    if wants.disks:
        yield ("VIRTIO_BLK",), False, "for its disks"
        if wants.filesystem in _FILE_SYSTEMS:
            yield (_FILE_SYSTEMS[wants.filesystem],), False, "for its root file system"
    if wants.nets:
        yield ("VIRTIO_NET",), False, "for its network"
    if wants.vsock:
        yield ("VIRTIO_VSOCKETS",), False, "for its agent, over vsock"
        if wants.own_init:
            yield ("MULTIUSER",), True, "for its agent, which runs commands as users"
    if wants.shares:
        yield ("VIRTIO_FS",), False, "for its shared directories"
    if wants.overlay:
        yield ("OVERLAY_FS",), False, "to keep its root as it is"
        yield ("TMPFS",), True, "for what it changes"


_FILE_SYSTEMS = {
    "ext4": "EXT4_FS",
    "xfs": "XFS_FS",
    "btrfs": "BTRFS_FS",
    "squashfs": "SQUASHFS",
    "erofs": "EROFS_FS",
    "f2fs": "F2FS_FS",
}


# What Kconfig shows an option below, or has it depend on, and does not choose by itself; and what
# the kernel needs to say anything on its console.
_DEPENDS = {
    "SERIAL_8250_CONSOLE": ("PRINTK", "TTY", "SERIAL_8250"),
    "VIRTIO_CONSOLE": ("PRINTK", "TTY", "VIRTIO_MENU"),
    "PCI_MMCONFIG": ("ACPI",),
    "VIRTIO_PCI": ("PCI", "VIRTIO_MENU"),
    "VIRTIO_MMIO": ("VIRTIO_MENU",),
    "ACPI": ("PCI",),
    "VIRTIO_BLK": ("BLOCK", "BLK_DEV", "VIRTIO_MENU"),
    "VIRTIO_NET": ("NET", "NETDEVICES", "NET_CORE", "VIRTIO_MENU"),
    "VIRTIO_VSOCKETS": ("NET", "VSOCKETS", "VIRTIO_MENU"),
    "VIRTIO_FS": ("FUSE_FS", "VIRTIO_MENU"),
    "TMPFS": ("SHMEM",),
    **dict.fromkeys(_FILE_SYSTEMS.values(), ("BLOCK",)),
}
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
