"""A kernel's release and configuration as it tells them, and what a guest would lack."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import boot_images
import pytest

from pyvmm.boot import kernel_config
from pyvmm.boot.file_kinds import check_initrd
from pyvmm.boot.image_file import ImageFile
from pyvmm.boot.kernel_config import embedded, lacking, to_switch_on
from pyvmm.boot.x86.release import config_of, release_of
from pyvmm.errors import ConfigError
from pyvmm.host import cpio
from pyvmm.machine.board.registry import BOARDS, board_for

Wants = partial(kernel_config.Wants, found_by=board_for("x86_64").found_by)
WHOLE = "\n".join(
    f"CONFIG_{name}=y"
    for name in (
        *("64BIT", "BINFMT_ELF", "BINFMT_SCRIPT", "BLK_DEV_INITRD", "PROC_FS", "SYSFS", "DEVTMPFS"),
        *("SERIAL_8250_CONSOLE", "VIRTIO_MMIO"),
        *("ACPI", "VIRTIO_PCI", "PCI_DIRECT", "VIRTIO_BLK", "EXT4_FS", "VIRTIO_NET"),
        *("VIRTIO_VSOCKETS", "MULTIUSER", "VIRTIO_CONSOLE", "PCI", "PCI_MSI"),
    )
)
ALL = Wants(disks=True, nets=True, vsock=True, initrd=True, own_init=True, filesystem="ext4")


def test_a_kernel_that_has_it_all_lacks_nothing() -> None:
    for transport in ("mmio", "pci"):
        for console in ("serial", "virtio", ""):
            assert lacking(WHOLE, ALL._replace(transport=transport, console=console)) == []


@pytest.mark.parametrize("architecture", BOARDS)
@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_a_board_wants_what_its_kernels_can_have(architecture: str, transport: str) -> None:
    """One option for each thing that finds devices is enough, and none is another board's."""
    found_by = board_for(architecture).found_by
    of_x86 = ("PCI_DIRECT", "ACPI")
    text = "".join(line for line in WHOLE.splitlines(True) if not line[7:-3].startswith(of_x86))
    text += "".join(f"\nCONFIG_{names[-1]}=y" for names in found_by.values())
    wants = ALL._replace(transport=transport, found_by=found_by)
    assert lacking(text, wants) == []
    for name, names in found_by.items():
        if name not in (transport, wants.console):
            continue
        [said] = lacking(text.replace(f"CONFIG_{names[-1]}=y", ""), wants)
        assert said.startswith(" or ".join(f"CONFIG_{one}" for one in names))


@pytest.mark.parametrize(
    ("name", "wants", "word"),
    [
        ("SERIAL_8250_CONSOLE", Wants(), "console"),
        ("VIRTIO_CONSOLE", Wants(console="virtio"), "console"),
        ("BLK_DEV_INITRD", Wants(initrd=True), "initrd"),
        ("DEVTMPFS", ALL, "device files"),
        ("BINFMT_SCRIPT", ALL, "first program"),
        ("64BIT", ALL, "programs"),
        ("BINFMT_ELF", ALL, "programs"),
        ("PROC_FS", ALL, "command line"),
        ("SYSFS", ALL, "drivers"),
        ("VIRTIO_MMIO", Wants(disks=True), "devices"),
        ("ACPI", Wants(vsock=True), "find its devices"),
        ("VIRTIO_PCI", Wants(nets=True, transport="pci"), "devices"),
        ("PCI", Wants(nets=True, transport="pci"), "PCI bus"),
        ("PCI_DIRECT", Wants(nets=True, transport="pci"), "PCI bus"),
        ("PCI_MSI", Wants(nets=True, transport="pci"), "interrupts"),
        ("VIRTIO_BLK", ALL, "disks"),
        ("EXT4_FS", ALL, "root file system"),
        ("VIRTIO_NET", ALL, "network"),
        ("VIRTIO_VSOCKETS", ALL, "vsock"),
        ("MULTIUSER", ALL, "users"),
    ],
)
def test_what_is_missing_is_named_with_its_use(
    name: str, wants: kernel_config.Wants, word: str
) -> None:
    without = WHOLE.replace(f"CONFIG_{name}=y", f"# CONFIG_{name} is not set")
    [said] = lacking(without, wants)
    assert f"CONFIG_{name}" in said and word in said
    assert lacking(without, Wants(console="")) == []  # a guest that needs none of it


def test_a_module_is_enough_where_it_can_be_loaded() -> None:
    as_modules = WHOLE.replace("VIRTIO_BLK=y", "VIRTIO_BLK=m")
    assert lacking(as_modules, Wants(disks=True, modules=True)) == []
    [said] = lacking(as_modules, Wants(disks=True))
    assert said.startswith("CONFIG_VIRTIO_BLK=y, which is a module there")
    console = WHOLE.replace("8250_CONSOLE=y", "8250_CONSOLE=m")
    assert lacking(console, Wants(modules=True))  # it would come too late


def test_what_is_no_configuration_says_nothing() -> None:
    assert lacking("root:x:0:0:root:/root:/bin/bash\n", ALL) == []


# --- in a kernel ----------------------------------------------------------------------------------


def kernel_with(path: Path, config: bytes, *, before: int = 5 << 20) -> Path:
    marked = b"IKCFG_ST" + config + b"IKCFG_ED"
    banner = b"Linux version 6.9.1-mine (me@here) #1"
    load = boot_images.Load(data=bytes(before) + marked + banner + bytes(100))
    path.write_bytes(boot_images.Elf(loads=[load]).build())
    return path


def test_the_configuration_in_a_kernel(tmp_path: Path) -> None:
    for before in (5 << 20, (4 << 20) - 0x1000 - 4, 3):  # also across the pieces that are read
        path = kernel_with(tmp_path / "vmlinux", gzip.compress(WHOLE.encode()), before=before)
        assert config_of(str(path)) == WHOLE
        assert release_of(str(path)) == "6.9.1-mine"


@pytest.mark.parametrize(
    "damaged", [b"", b"\x1f\x8bnonsense", gzip.compress(b"x" * 99, mtime=0)[:9]]
)
def test_a_damaged_one_is_none(tmp_path: Path, damaged: bytes) -> None:
    path = kernel_with(tmp_path / "vmlinux", damaged)
    with ImageFile(str(path), "--kernel") as file:
        assert embedded(file.pieces(1 << 20, 1 << 30)) == ""


def test_one_that_unpacks_without_end_costs_little(tmp_path: Path) -> None:
    path = kernel_with(tmp_path / "vmlinux", gzip.compress(bytes(64 << 20)))
    assert len(config_of(str(path))) == 4 << 20


def test_the_release_of_a_bzimage(tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(boot_images.bzimage(banner=b"6.12.3+deb13-amd64 (x@y) #1"))
    assert release_of(str(tmp_path / "bzImage")) == "6.12.3+deb13-amd64"
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ConfigError, match="neither a bzImage"):
        release_of(str(tmp_path / "text"))


# --- an initrd ------------------------------------------------------------------------------------


def checked(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with ImageFile(str(path), "--initrd") as file:
        check_initrd(file)


def test_a_damaged_cpio_archive_is_told_before_the_boot(tmp_path: Path) -> None:
    archive = cpio.archive([cpio.directory("a"), cpio.regular("a/b", b"c" * 3001)])
    path = tmp_path / "initrd"
    checked(path, archive)
    checked(path, archive + b"\x1f\x8b and another one, packed")
    for bad in (archive[:-200], archive[:500], archive[:8], archive.replace(b"070701", b"07070x")):
        if bad.startswith(b"070701"):
            with pytest.raises(ConfigError, match=r"a damaged initrd: its cpio archive breaks off"):
                checked(path, bad)
    at = archive.index(b"070701", 10)
    with pytest.raises(ConfigError, match=f"breaks off at byte {at}; copy or build it again"):
        checked(path, archive[:at] + b"\0" + archive[at + 1 :])
    checked(path, b"junk that the guest may judge")


def test_a_configuration_that_is_cut_anywhere_into_pieces() -> None:
    whole = b"x" * 9 + b"IKCFG_ST" + gzip.compress(b"CONFIG_A=y\n") + b"IKCFG_ED" + b"y" * 9
    for size in range(1, len(whole) + 1):
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        assert embedded(pieces) == "CONFIG_A=y\n"


def test_markers_without_end() -> None:
    """Each of them is worth one look, and no kernel has so many."""
    taken = 0

    def pieces() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"IKCFG_ST" * (1 << 17)

    assert embedded(pieces()) == ""
    assert taken < 100


def test_a_kernel_file_that_is_all_hole(tmp_path: Path) -> None:
    """Its end is not waited for."""
    path = tmp_path / "vmlinux"
    path.write_bytes(boot_images.Elf().build())
    os.truncate(path, 1 << 43)
    assert release_of(str(path)) == ""
    assert config_of(str(path)) == ""


def test_looking_for_a_configuration_leaves_nothing_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed meanwhile has nothing to remove."""
    room = tmp_path / "tmp"
    room.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    packed = gzip.compress(b"\x7fELF" + bytes(9 << 20))
    path = tmp_path / "bzImage"
    path.write_bytes(boot_images.bzimage(code=packed, payload=(0, len(packed))))
    seen: list[int] = []
    original = kernel_config.embedded

    def embedded(pieces: Iterable[bytes]) -> str:
        return original(seen.append(len(list(room.iterdir()))) or piece for piece in pieces)

    monkeypatch.setattr(kernel_config, "embedded", embedded)
    config_of(str(path))
    assert set(seen) == {0}


def test_what_is_to_be_switched_on_comes_behind_what_it_depends_on() -> None:
    """For a configuration without a bus its interrupts are named as well, as it would lack them
    next."""
    names = to_switch_on("CONFIG_NET=y\nCONFIG_VSOCKETS=m\n", Wants(transport="pci", vsock=True))
    assert names[:4] == ["PRINTK", "TTY", "SERIAL_8250", "SERIAL_8250_CONSOLE"]
    order = ["PCI", "VIRTIO_MENU", "VIRTIO_PCI", "PCI_MSI", "VSOCKETS", "VIRTIO_VSOCKETS"]
    assert sorted(order, key=names.index) == order and "NET" not in names
    assert to_switch_on(WHOLE, ALL) == []
    assert to_switch_on("junk", ALL) == []
