"""Disks with partition tables, made by sfdisk(8), and file systems made by their own mkfs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MIB = 1 << 20
SECTOR = 512
PROGRAMS = ("sfdisk", "fdisk", "mke2fs", "mkfs.xfs", "mkfs.btrfs", "mkfs.vfat", "mkswap")
ROOT_X86_64 = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
ROOT_ARM64 = "B921B045-1DF0-41C3-AF44-4C6F280D3FAE"
_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"

needs_tools = pytest.mark.skipif(
    any(shutil.which(program, path=_PATH) is None for program in PROGRAMS),
    reason=f"needs {', '.join(PROGRAMS)} (fdisk, xfsprogs, btrfs-progs, dosfstools)",
)


def run(*command: str | Path, input: str | None = None) -> None:
    subprocess.run(
        [str(word) for word in command],
        input=input,
        check=True,
        capture_output=True,
        text=True,
        env={"PATH": _PATH, "LC_ALL": "C.UTF-8"},
    )


def partitioned(path: Path, script: str, *, size: int = 64 * MIB) -> Path:
    """A sparse disk image with the table that sfdisk's `script` describes."""
    with open(path, "wb") as file:
        file.truncate(size)
    run("sfdisk", "--quiet", path, input=script)
    return path


def partitioned_4k(path: Path, parts: list[tuple[str, str]], *, size: int = 64 * MIB) -> Path:
    """The same with blocks of 4096 bytes, 512 of them in each part; `parts` are (UUID, name)."""
    with open(path, "wb") as file:
        file.truncate(size)
    commands = ["g"]
    for number in range(1, len(parts) + 1):
        commands += ["n", str(number), "", "+511"]
    commands.append("x")
    for number, (uuid, name) in enumerate(parts, 1):
        which = [str(number)] if len(parts) > 1 else []
        commands += ["u", *which, uuid, "n", *which, name]
    run("fdisk", "-b", "4096", path, input="\n".join([*commands, "r", "w", ""]))
    return path


def put_file_system(disk: Path, start: int, size: int, kind: str, *options: str) -> None:
    """Make a file system of `kind` in `size` bytes at `start` of `disk`."""
    part = disk.with_name(f"{disk.name}.{start}")
    with open(part, "wb") as file:
        file.truncate(size)
    command = {
        "ext4": ("mke2fs", "-q", "-t", "ext4"),
        "xfs": ("mkfs.xfs", "-q"),
        "btrfs": ("mkfs.btrfs", "-q"),
        "vfat": ("mkfs.vfat",),
        "swap": ("mkswap",),
    }[kind]
    run(*command, *options, part)
    put_bytes(disk, start, part)
    part.unlink()


def put_bytes(disk: Path, start: int, file: Path) -> None:
    """Copy what is in `file` to `start` of `disk`."""
    run("dd", f"if={file}", f"of={disk}", "bs=1M", f"seek={start}", "oflag=seek_bytes",
        "conv=notrunc,sparse")  # fmt: skip


def xfs_of(tree: Path, image: Path, *options: str) -> None:
    """An XFS file system at `image` with what is in `tree`, whose names have no spaces."""
    lines = ["unused", "0 0"]

    def add(name: str, path: Path) -> None:
        if path.is_symlink():
            lines.append(f"{name} l--777 0 0 {path.readlink()}")
        elif path.is_dir():
            lines.append(f"{name} d--755 0 0".strip())
            for one in sorted(path.iterdir()):
                add(one.name, one)
            lines.append("$")
        else:
            lines.append(f"{name} ---644 0 0 {path}")

    add("", tree)
    prototype = image.with_name(f"{image.name}.proto")
    prototype.write_text("\n".join(lines) + "\n")
    with open(image, "wb") as file:
        file.truncate(320 * MIB)
    run("mkfs.xfs", "-q", "-p", prototype, *options, image)
