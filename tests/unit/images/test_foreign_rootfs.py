"""A Debian of another architecture, up to where an emulated machine configures it: packages without
compression, the work disk, and what the machine says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyvmm.errors import ConfigError
from pyvmm.images import foreign_rootfs, recipes
from pyvmm.images.progress import Progress

pytestmark = pytest.mark.skipif(
    shutil.which("dpkg-deb") is None, reason="needs dpkg-deb (package dpkg)"
)
TOOLS = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}


def make_package(folder: Path, name: str, files: dict[str, str]) -> Path:
    tree = folder / f"{name}.tree"
    for path, text in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    (tree / "DEBIAN").mkdir()
    fields = {"Package": name, "Version": "1", "Architecture": "arm64", "Maintainer": "x <x@x>"}
    lines = [*(f"{key}: {value}" for key, value in fields.items()), "Description: x"]
    (tree / "DEBIAN/control").write_text("\n".join(lines) + "\n")
    target = folder / f"{name}_1_arm64.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, target], check=True)
    return target


def listing(package: Path) -> bytes:
    return subprocess.run(["dpkg-deb", "-c", package], check=True, capture_output=True).stdout


def wanted(**values: object) -> foreign_rootfs.Wanted:
    return foreign_rootfs.Wanted(**{"name": "x", "architecture": "arm64", "pins": (), **values})


@pytest.mark.parametrize("size", [1, 2, 100_000])
def test_a_package_without_compression_is_the_same_package(tmp_path: Path, size: int) -> None:
    package = make_package(tmp_path, "one", {"usr/share/text": "x" * size})
    before, fields = listing(package), subprocess.check_output(["dpkg-deb", "-f", package])
    foreign_rootfs._store(str(package))
    assert listing(package) == before
    assert subprocess.check_output(["dpkg-deb", "-f", package]) == fields
    assert b"data.tar  " in package.read_bytes() and b".xz" not in package.read_bytes()
    assert package.stat().st_size > size
    assert os.listdir(tmp_path) and not list(tmp_path.glob("*.new"))


def test_a_package_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.deb").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot unpack a package"):
        foreign_rootfs._store(str(tmp_path / "x.deb"))


def test_the_work_disk_has_the_packages_and_their_files(tmp_path: Path) -> None:
    """Those in /bin too, which is a link from the start."""
    (tmp_path / "packages").mkdir()
    package = make_package(tmp_path, "one", {"bin/mawk": "m", "etc/one": "1"})
    shutil.move(package, tmp_path / "packages" / package.name)
    for name in ("sources.list", "copies.tar", "script"):
        (tmp_path / name).write_text(name)
    asked = wanted(size=64, additions=str(tmp_path / "copies.tar"), script=str(tmp_path / "script"))
    client = SimpleNamespace(sources=str(tmp_path / "sources.list"))
    script = recipes.load().file("rootfs", foreign_rootfs.SCRIPT)
    disk = tmp_path / "work.img"
    foreign_rootfs._make_work_disk(asked, client, script, str(tmp_path), str(disk))

    def shown(command: str) -> str:
        done = subprocess.run(
            ["debugfs", "-R", command, disk], check=True, capture_output=True, text=True, env=TOOLS
        )
        return done.stdout

    assert shown("cat /usr/bin/mawk") == "m"
    assert 'Fast link dest: "usr/bin"' in shown("stat /bin")
    assert shown("cat /etc/one") == "1"
    assert shown("cat /etc/apt/sources.list") == "sources.list"
    assert shown("cat /pyvmm/script") == "script"
    assert shown("cat /pyvmm/additions.tar") == "copies.tar"
    assert package.name in shown("ls /pyvmm/packages")
    init = shown("stat /pyvmm/init")
    assert "Mode:  0755" in init and "User:     0" in init


def machine(script: str) -> foreign_rootfs.Machine:
    """In QEMU's place, a shell that gets its arguments."""
    return foreign_rootfs.Machine(("sh", "-c", script, "qemu"), "kernel", "initrd")


def test_what_the_machine_says_is_read_to_its_end(tmp_path: Path) -> None:
    says_its_mark = """
        for word; do case $word in *pyvmm.mark=*) mark=${word##*pyvmm.mark=} ;; esac; done
        printf 'pyvmm-package: dpkg 1.2\\r\\npyvmm-mark: %s\\r\\n' "$mark"
    """
    lines = foreign_rootfs._run(wanted(size=64), machine(says_its_mark), "a,b", "archive")
    assert lines[0] == "pyvmm-package: dpkg 1.2"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("dpkg: error: x; pyvmm-configure: no room", "pyvmm-configure: no room"),
        ("dpkg: error processing y; and more", "dpkg: error processing y"),
        ("[ 1.0] Kernel panic - not syncing", "Kernel panic"),
        ("pyvmm-mark: 0000000000000000", "pyvmm-mark: 0000"),  # of another run
        ("", "were not configured"),
    ],
)
def test_a_machine_that_fails_says_why(said: str, told: str) -> None:
    script = f"printf '%s' '{said}' | tr ';' '\\n'; exit 0"
    with pytest.raises(ConfigError, match=f"x: its packages were not configured: .*{told}|{told}"):
        foreign_rootfs._run(wanted(size=64), machine(script), "work", "archive")


def test_the_archive_is_what_the_machine_wrote(tmp_path: Path) -> None:
    """`build` as a whole, with a machine that packs one file."""
    (tmp_path / "sources.list").write_text("")
    package = make_package(tmp_path, "one", {"etc/one": "1"})

    def download_all(pins: object, folder: str) -> list[str]:
        return [shutil.copy(package, folder)]

    client = SimpleNamespace(sources=str(tmp_path / "sources.list"), download_all=download_all)
    script = """
        for word; do
            case $word in
                *pyvmm.mark=*) mark=${word##*pyvmm.mark=} ;;
                *id=archive*) archive=${word##*file=} ;;
            esac
        done
        cd "${archive%/*}" && mkdir made && echo hello > made/file
        tar -C made -cf - . | dd of="$archive" conv=notrunc 2> /dev/null
        echo "pyvmm-package: one 1"; echo "pyvmm-package: two"; echo "pyvmm-mark: $mark"
    """
    room = tmp_path / "room"
    room.mkdir()
    init = recipes.load().file("rootfs", foreign_rootfs.SCRIPT)
    foreign_rootfs.build(
        *(wanted(size=64), machine(script), client, init, str(room), Progress(quiet=True))
    )
    assert (room / "packages").read_text() == "one 1\n"
    listed = subprocess.check_output(["tar", "-tf", room / "root.tar"], text=True)
    assert listed.split() == ["./", "./file"]
    assert not (room / "work.img").exists()


def test_a_machine_that_prints_without_end_is_kept_in_bounds(monkeypatch) -> None:
    monkeypatch.setattr(foreign_rootfs, "_MOST_SAID", 1000)
    lines = "print('x' * 100_000); print('y' * 500)"
    said = foreign_rootfs._console_of([sys.executable, "-c", lines])
    assert len(said) == 1000 and said.endswith(b"y" * 500 + b"\n")


def test_a_machine_that_does_not_end_is_ended(monkeypatch) -> None:
    monkeypatch.setattr(foreign_rootfs, "_PATIENCE", 0.1)
    with pytest.raises(ConfigError, match="did not end"):
        foreign_rootfs._console_of(["sleep", "1000"])
