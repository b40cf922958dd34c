"""Files that users give for a kernel or initrd by mistake, and what they are told."""

from __future__ import annotations

import gzip
import lzma
import os
from pathlib import Path

import pytest
from boot_images import Elf, boot, bzimage, guest_memory
from descriptors import open_descriptors

from pyvmm.boot import x86
from pyvmm.errors import ConfigError
from pyvmm.machine.board.x86.layout import FIXED_DEVICES


def said_of(kernel: Path | str, initrd: Path | str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        x86.load(
            guest_memory(),
            kernel=str(kernel),
            initrd=None if initrd is None else str(initrd),
            acpi=x86.AcpiConfig(FIXED_DEVICES),
        )
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (gzip.compress(Elf().build()), ["gzip", "decompress it first", "--initrd"]),
        (lzma.compress(b"x"), ["xz", "decompress"]),
        (b"\x28\xb5\x2f\xfd....", ["zstd", "decompress"]),
        (b"\x02\x21\x4c\x18....", ["lz4", "decompress"]),
        (b"070701" + b"0" * 100, ["cpio", "--initrd"]),
        (b"\x27\x05\x19\x56" + bytes(100), ["uImage"]),
        (b"MZ" + bytes(0x36) + b"ARM\x64" + bytes(64), ["for arm64; use --arch arm64"]),
        (b"QFI\xfb" + bytes(100), ["QCOW2", "--disk"]),
        (bytes(0x438) + b"\x53\xef" + bytes(100), ["ext2/3/4", "--disk"]),
        (b"!<arch>\ndebian-binary", ["dpkg -x", "give DIRECTORY to --kernel"]),
        (b"\xed\xab\xee\xdb" + bytes(100), ["RPM", "cpio -idD DIRECTORY"]),
        (b"boot/".ljust(257, b"\0") + b"ustar\0" + bytes(200), ["tar -C DIRECTORY -xf"]),
        (b"#!/bin/sh\n", ["neither", "bzImage", "vmlinux"]),
        (b"M", ["neither"]),
    ],
)
def test_files_that_are_no_kernel(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "vmlinux.gz"
    path.write_bytes(content)
    text = said_of(path)
    assert text.startswith("--kernel: ")
    for word in words:
        assert word in text


@pytest.mark.parametrize("name", ["linux-6.12-x86.tar.zst", "linux.tgz"])
def test_what_make_tar_pkg_packs(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"") if name.endswith("tgz") else b"\x28\xb5\x2f\xfd....")
    assert said_of(path) == (
        f"--kernel: {path} is a tar archive; unpack it: mkdir DIRECTORY && "
        "tar -C DIRECTORY -xf FILE; and give DIRECTORY to --kernel"
    )


def test_missing_directory_fifo_and_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, word in (
        (tmp_path / "absent", "No such file"),
        (tmp_path / "absent" / "deeper", "No such file"),
        (tmp_path, "a directory; name a file"),
        (tmp_path / "fifo", "a FIFO"),
        ("/dev/null", "a device"),
        ("", "empty"),
        ("a\0b", "NUL"),
    ):
        assert word in said_of(path)
        assert said_of(path).startswith("--kernel: ")
        kernel = tmp_path / "kernel"
        kernel.write_bytes(bzimage())
        text = said_of(kernel, path)
        assert text.startswith("--initrd: ") and word in text


def test_empty_initrd(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--initrd: .* is empty"):
        boot(tmp_path, bzimage(), initrd=b"")


@pytest.mark.parametrize("initrd", [bzimage(), Elf().build()])
def test_a_kernel_given_as_initrd(tmp_path: Path, initrd: bytes) -> None:
    with pytest.raises(ConfigError, match=r"--initrd: .* is a kernel; give it to --kernel"):
        boot(tmp_path, bzimage(), initrd=initrd)


def test_unreadable_kernel_is_said_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=r"Permission denied; check its permissions"):
        x86.load(guest_memory(), kernel="/boot/vmlinuz", acpi=x86.AcpiConfig(FIXED_DEVICES))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    from pyvmm.boot.image_file import ImageFile

    path = tmp_path / "initrd"
    path.write_bytes(bytes(8192))
    with ImageFile(str(path), "--initrd") as file:
        os.truncate(path, 4096)
        with pytest.raises(ConfigError, match="ends after 4096 bytes"):
            file.read_into(memoryview(bytearray(8192)), 0)


def test_no_file_descriptor_is_left_open(tmp_path: Path) -> None:
    memory = guest_memory()
    before = open_descriptors()
    boot(tmp_path, bzimage(), initrd=b"i", memory=memory)
    with pytest.raises(ConfigError):
        boot(tmp_path, b"nothing", memory=memory)
    with pytest.raises(ConfigError):
        boot(tmp_path, bzimage(), initrd=bytes(70 << 20), memory=memory)
    assert open_descriptors() == before
