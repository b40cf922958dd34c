"""A disk that holds a whole system: which partition is its root, and what it would boot itself.

The root is found once the disks are open and before the kernel gets its command line; the kernel,
for `--kernel disk`, before there is a machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pyvmm.boot.cmdline import has, values
from pyvmm.errors import ConfigError, HostError
from pyvmm.host import log
from pyvmm.spec.record import replace
from pyvmm.spec.vm import DiskSpec, VmSpec

if TYPE_CHECKING:
    from pyvmm.boot.boot_entry import System
    from pyvmm.boot.file_system import FileSystem, Read, Search
    from pyvmm.boot.partitions import Partition, Table
    from pyvmm.virtio.blk.device import BlockDevice
    from pyvmm.virtio.device import VirtioDevice

_SIGNATURE_AT, _SIGNATURE = 510, b"\x55\xaa"  # of a sector with a partition table
_EXT4_AT, _EXT4 = 0x438, b"\x53\xef"
_MOST_FSTAB = 64 << 10  # bytes
_MOST_KERNEL, _MOST_INITRD = 256 << 20, 1 << 30
_READ = ("ext4", "xfs", "btrfs", "vfat")  # the file systems that a kernel is looked for in
_CONTAINERS = ("LVM", "LUKS")  # what an initrd opens, as it has the programs for it
_OF_ROOT = ("/etc", "/usr", "/sbin", "/bin", "/nix", "/ostree")  # a root has one of them
# What the first disk is called on other buses, and in the machine where an image was made.
_OF_OTHER_BUSES = re.compile(r"root=/dev/(?:[sh]da|xvda|nvme0n1p|mmcblk0p|loop\d+p)(\d{1,3})")
_ROOT_NAMES = ("root", "rootfs", "cloudimg-rootfs", "pyvmm-root", "system", "/")


def with_root(spec: VmSpec, devices: Sequence[VirtioDevice]) -> VmSpec:
    """`spec` with the partition of its first disk that is the root on its command line, unless
    there is a root= already or the disk has no partitions. One line says which it is.

    Raises ConfigError for a table that nobody could boot from.
    """
    if not spec.disks or has(spec.cmdline, "root"):
        return spec
    from pyvmm.virtio.blk.device import BlockDevice

    disk = next((device for device in devices if isinstance(device, BlockDevice)), None)
    if disk is None:
        return spec
    try:
        if disk.peek(_SIGNATURE_AT, 2) != _SIGNATURE:
            return spec
        words = _root_words(spec.disks[0].path, disk.peek, disk.size, disk.block_size)
    except ConfigError:
        raise
    except Exception:  # of the host, or whatever a class of the user's raises: the guest meets it
        return spec
    words = [word for word in words if not has(spec.cmdline, word.partition("=")[0])]
    return replace(spec, cmdline=" ".join([*words, spec.cmdline]).strip())


def _root_words(name: str, read: Read, size: int, block: int) -> list[str]:
    from pyvmm.boot import partitions

    table = partitions.read_disk(read, size, block)
    if table is None:
        if partitions.is_damaged(read, size):
            raise ConfigError(
                f"{name} has a GPT whose both copies are damaged (a wrong sum or size)",
                cure="repair it (gdisk, or sfdisk), or name another disk",
                option="--disk",
            )
        return []
    if not any(one.number for one in table.partitions):
        return []
    root, why = choose_root(table, read, name)
    if root is None:
        return []  # the diagnosis has advice for a guest that finds none
    words = [f"root=/dev/vda{root.number}", *_type_words(root, read, name)]
    if table.damaged:
        words.append("gpt")
    more = " by the table's second copy, as the first is damaged" if table.damaged else ""
    log.to_stderr(
        f"the root is partition {root.number} of {name} ({partitions.about(root)}), {why}{more}; "
        "root= in --cmdline names another"
    )
    return words


def _type_words(root: Partition, read: Read, name: str) -> list[str]:
    """What the kernel has to know to mount a root that is not ext4."""
    if root.content.kind == "ext4":
        return []
    words = [f"rootfstype={root.content.kind}"]
    from pyvmm.boot.file_system import Search

    subvolume = ""
    with suppress(ConfigError):  # the guest's driver may understand more
        subvolume = getattr(_system(root, read, name, Search()), "subvolume", "")
    return [*words, f"rootflags=subvol={subvolume}"] if subvolume else words


def words_before(disks: Any, cmdline: str) -> tuple[list[str], bool]:
    """What the kernel's command line needs so that an initramfs can be made for the root in the
    first disk of the option `disks`: nothing for ext4, for what `cmdline` says already, or where
    it cannot be told yet. And whether that disk has an EFI system partition, which the root's
    /etc/fstab mounts, and the kernel's driver for it is not in there."""
    from pyvmm.kinds import registry

    if not disks or has(cmdline, "rootfstype"):
        return [], False
    specs: list[DiskSpec] = registry.read("disk", disks)
    # The image alone, as nobody should find an overlay made, or copied to, by a mere look.
    image = replace(specs[0], snapshot=False, overlay=None, saved=None)
    if image.storage not in ("raw", "qcow2"):
        return [], False  # a class of the user's is not made twice
    with suppress(ConfigError, HostError, OSError), _looking_at(image) as disk:
        wanted = "".join(values(cmdline, "root")[-1:])
        words, has_esp = _words_before(image.path, disk.peek, disk.size, disk.block_size, wanted)
        return [word for word in words if not has(cmdline, word.partition("=")[0])], has_esp
    return [], False  # whoever opens it says why


def _words_before(
    name: str, read: Read, size: int, block: int, wanted: str
) -> tuple[list[str], bool]:
    if read(_SIGNATURE_AT, 2) != _SIGNATURE and read(_EXT4_AT, 2) == _EXT4:
        return [], False  # the usual disk costs no more than that
    from pyvmm.boot import partitions

    table = partitions.read_disk(read, size, block)
    if table is None:
        return [], False
    root: Partition | None
    if wanted:
        named = [one for one in table.partitions if wanted in _names(one)]
        root = named[0] if named else None
    else:
        root, _ = choose_root(table, read, name)
    if root is None or not root.may_be_root:
        return [], False
    has_esp = any(one.content.kind == "vfat" for one in table.partitions)
    return _type_words(root, read, name), has_esp


@contextmanager
def _looking_at(disk: DiskSpec) -> Iterator[BlockDevice]:
    """The disk as its image has it, only to be read."""
    from pyvmm.kinds.disk.storage import open_backend
    from pyvmm.virtio.blk.device import BlockDevice

    if not disk.copies_on_write:
        disk = replace(disk, read_only=True)
    with ExitStack() as closing:
        backend = open_backend(disk, closing)
        yield BlockDevice(backend, name="disk0", block_size=disk.block_size)


def choose_root(table: Table, read: Read, name: str) -> tuple[Partition | None, str]:
    """The partition of `table` that is the root, and why; None if that cannot be told. Raises
    ConfigError for one that overlaps another, and where it is in an LVM or LUKS volume."""
    from pyvmm.boot import partitions

    found = partitions.roots(table)
    if not found:
        return None, ""
    typed = [one for one in found if one.type in partitions.ROOT_TYPES]
    named = [
        one
        for one in found
        if {one.name.lower(), one.content.label.lower()}.intersection(_ROOT_NAMES)
    ]
    root, why = None, ""
    if len(typed) == 1:
        root, why = typed[0], "by its type"
    elif len(found) == 1 and not _is_boot(found[0], table, read, name):
        root, why = found[0], "the only one with a Linux file system"
    elif len(named) == 1:
        root, why = named[0], "by its label"
    elif len(found) > 1:
        root, why = _by_fstab(found, read, name), "by /etc/fstab"
    if root is not None:
        other = partitions.overlapping(table, root)
        if other is not None:
            raise ConfigError(
                f"partitions {root.number} and {other.number} of {name} overlap, and the first "
                "would be the root",
                cure="repair the table, or choose: --cmdline root=/dev/vdaN",
                option="--disk",
            )
    return root, why


def _is_boot(one: Partition, table: Table, read: Read, name: str) -> bool:
    """True if `one`, the only Linux file system, is a /boot: the root is elsewhere then. Raises
    ConfigError if it is where nothing but the disk's own initrd finds it."""
    from pyvmm.boot.file_system import Search

    try:
        system = _system(one, read, name, Search())
        if system is None or not system.names("/") or any(map(system.has, _OF_ROOT)):
            return False
        is_boot = any(found.startswith("vmlinuz") for found in system.names("/"))
    except ConfigError:
        return False
    volume = next((it for it in table.partitions if it.content.kind in _CONTAINERS), None)
    if is_boot and volume is not None:
        raise ConfigError(
            f"partition {one.number} of {name} is a /boot, and the root is in partition "
            f"{volume.number}, in {volume.content.kind}, which takes an initrd that opens it",
            cure="--kernel disk takes the disk's own kernel and initrd; or say root= in --cmdline",
            option="--disk",
        )
    return is_boot


def _by_fstab(found: Sequence[Partition], read: Read, name: str) -> Partition | None:
    """The one of `found` that the /etc/fstab in one of them has as the root."""
    from pyvmm.boot.file_system import Search

    search = Search()
    for one in found:
        try:
            system = _system(one, read, name, search)
            text = "" if system is None else system.read_text("/etc/fstab", _MOST_FSTAB)
        except (FileNotFoundError, ConfigError):
            continue
        for line in text.splitlines():
            words = line.split()
            if len(words) > 1 and not words[0].startswith("#") and words[1] == "/":
                return next((other for other in found if words[0] in _names(other)), one)
    return None


def _names(one: Partition) -> Iterable[str]:
    """The names that fstab(5), and root= for the first disk, may give a partition."""
    device = f"/dev/vda{one.number or ''}"
    names = {"UUID": one.content.uuid, "LABEL": one.content.label}
    names |= {"PARTUUID": one.uuid, "PARTLABEL": one.name}
    return [device, *(f"{key}={quote}{value}{quote}" for key, value in names.items()
                      for quote in ("", '"') if value)]  # fmt: skip


def _system(one: Partition, read: Read, name: str, search: Search) -> System | None:
    """The file system in a partition; None if it is of a kind that is not read here. Raises
    ConfigError for one that is damaged, or not understood."""
    kind = _reader(one.content.kind)
    if kind is None:
        return None
    where = f"partition {one.number} of {name}" if one.number else name
    return kind(lambda offset, size: read(one.start + offset, size), one.size, where, search)


def _reader(kind: str) -> type[FileSystem[Any]] | None:
    if kind == "ext4":
        from pyvmm.boot.ext4 import Ext4

        return Ext4
    if kind == "vfat":
        from pyvmm.boot.fat import Fat

        return Fat
    if kind == "xfs":
        from pyvmm.boot.xfs import Xfs

        return Xfs
    if kind == "btrfs":
        from pyvmm.boot.btrfs import Btrfs

        return Btrfs
    return None


# --- the kernel that is in it ---------------------------------------------------------------------


def kernel_in(disks: Any) -> tuple[str, str | None, str]:
    """The paths of copies of the kernel and the initrd that the first disk of the option `disks`
    would boot, and what it gives them as a command line. Raises ConfigError if it has none."""
    from pyvmm.kinds import registry

    specs: list[DiskSpec] = registry.read("disk", disks) if disks else []
    if not specs:
        raise ConfigError(
            "there is no disk that the kernel could be in", cure="add --disk", option="--kernel"
        )
    with _looking_at(specs[0]) as disk:
        return _extract(specs[0].path, disk.peek, disk.size, disk.block_size)


def _extract(name: str, read: Read, size: int, block: int) -> tuple[str, str | None, str]:
    from pyvmm.boot import boot_entry, partitions
    from pyvmm.boot.file_system import Search
    from pyvmm.images import made_files

    table = partitions.read_disk(read, size, block)
    kinds: Mapping[int, str] = {}
    systems, refused = [], ""
    if table is not None:
        kinds = {one.number: one.content.kind for one in table.partitions}
        found = sorted(table.partitions, key=lambda one: not one.may_be_root)
        search = Search()
        for part in found:
            try:
                system = _system(part, read, name, search)
            except ConfigError as error:
                refused = refused or f", and {error.message}"
                continue
            if system is not None:
                systems.append(system)
    entry = boot_entry.find(systems) if systems else None
    if entry is None:
        unread = ", ".join(sorted({kind for kind in kinds.values() if kind} - {*_READ, "swap"}))
        kinds_read = ", ".join(_READ[:-1])
        what = f"no {kinds_read} or {_READ[-1]}"
        if systems:
            what = f"no kernel in its file systems ({kinds_read} and {_READ[-1]} are read)"
        if unread:
            what += f", and {unread} cannot be read"
        raise ConfigError(
            f"{name} has {what}{refused}",
            cure="name a kernel: --kernel, --initrd",
            option="--kernel",
        )
    kernel = made_files.keep(entry.read_kernel(_MOST_KERNEL), ".kernel")
    initrd = None
    if entry.has_initrd:
        initrd = made_files.keep(entry.read_initrds(_MOST_INITRD), ".initrd", _MOST_INITRD)
    cmdline = " ".join(_on_virtio(word, kinds) for word in entry.cmdline)
    log.to_stderr(
        f"booting {os.path.basename(entry.kernel)} by {entry.source} in {entry.system.where}"
        f"{': ' if entry.cmdline else ''}{cmdline:.300}"
    )
    return kernel, initrd, cmdline


def _on_virtio(word: str, numbers: Container[int]) -> str:
    """A word of a command line, with the name that the root's partition has on a virtio disk, if
    the disk has that one of `numbers`."""
    found = _OF_OTHER_BUSES.fullmatch(word)
    if found is None or int(found[1]) not in numbers:
        return word
    log.to_stderr(f"{word} of the disk's command line is root=/dev/vda{found[1]} here")
    return f"root=/dev/vda{found[1]}"
