"""Archives that umoci and skopeo make (and, by skopeo's word, Docker) become the same tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from pyvmm.images.container.load import load
from pyvmm.images.container.tree import Tree
from pyvmm.images.progress import Progress


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with the image `top`: three layers, with whiteouts and odd owners."""
    for program in ("umoci", "skopeo"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing (guest-images/system-packages.txt)")
    if os.geteuid() != 0:
        pytest.skip("only root can give files away, which umoci is to pack")
    room = tmp_path_factory.mktemp("umoci")

    def umoci(*args: object) -> None:
        subprocess.run(["umoci", *map(str, args)], cwd=room, check=True, capture_output=True)

    def repack(tag: str) -> None:
        umoci("repack", "--image", f"layout:{tag}", "bundle")
        shutil.rmtree(room / "bundle")
        umoci("unpack", "--image", f"layout:{tag}", "bundle")

    umoci("init", "--layout", "layout")
    umoci("new", "--image", "layout:base")
    umoci("unpack", "--image", "layout:base", "bundle")
    root = room / "bundle/rootfs"
    for name in ("srv", "old", "gone/deep"):
        (root / name).mkdir(parents=True)
    (root / "srv/file").write_bytes(b"one")
    os.chown(root / "srv/file", 70000, 80000)
    os.chmod(root / "srv/file", 0o4750)
    os.link(root / "srv/file", root / "srv/hard")
    os.symlink("srv", root / "link")
    os.setxattr(root / "srv/file", "user.note", bytes(range(200)))
    for name in ("old/a", "old/b", "gone/deep/file"):
        (root / name).write_bytes(b"x")
    repack("base")
    shutil.rmtree(root / "gone")
    (root / "old/a").unlink()
    (root / "srv/second").write_bytes(b"two" * 100_000)
    repack("middle")
    (root / "old/b").unlink()
    (root / "old/b").mkdir()
    (root / "old/b/new").write_bytes(b"three")
    repack("top")
    umoci(
        *("config", "--image", "layout:top", "--config.user", "1000:1000"),
        *("--config.cmd", "/srv/file", "--config.env", "A=b"),
    )
    return room / "layout"


def check(tree: Tree) -> None:
    names = {path for path, _ in tree.walk()}
    assert names >= {"srv", "srv/file", "srv/hard", "srv/second", "old/b/new", "link"}
    assert not names & {"gone", "gone/deep", "old/a"}
    file = tree.find("srv/file")
    assert file is tree.find("link/hard")
    assert (file.uid, file.gid, file.mode) == (70000, 80000, 0o4750)
    assert file.xattrs == {b"user.note": bytes(range(200))}
    assert tree.read("srv/second", 1 << 20) == b"two" * 100_000
    assert tree.find("old/b").kind == tarfile.DIRTYPE
    assert tree.read("old/b/new", 9) == b"three"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("oci", []),
        ("oci", ["--dest-compress-format", "zstd", "--dest-compress"]),
        ("oci-archive", []),
        ("docker-archive", []),
    ],
    ids=["oci", "oci, zstd", "oci-archive", "docker-archive"],
)
def test_what_skopeo_saves(layout: Path, tmp_path: Path, kind: str, options: list[str]) -> None:
    name = "example/top:1" if kind == "docker-archive" else "top"
    target = tmp_path / "saved"
    subprocess.run(
        ["skopeo", "copy", "-q", *options, f"oci:{layout}:top", f"{kind}:{target}:{name}"],
        check=True,
        capture_output=True,
    )
    for wanted in (None, name):
        room = tmp_path / f"room-{wanted is None}"
        room.mkdir()
        most = 64 << 20
        tree, image = load(kind, str(target), wanted, str(room), most, Progress(quiet=True))
        check(tree)
        assert image.config["User"] == "1000:1000"
        assert image.config["Cmd"] == ["/srv/file"]


def test_umoci_s_own_layout(layout: Path, tmp_path: Path) -> None:
    tree, image = load("oci", str(layout), "top", str(tmp_path), 64 << 20, Progress(quiet=True))
    check(tree)
    assert len(image.layers) == 3
