"""`--disk` and what it becomes: a specification, a storage, the same in an emulated host."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from blk_rig import running

from pyvmm.emulated_host import HostDisk
from pyvmm.errors import ConfigError
from pyvmm.kinds.border import Border
from pyvmm.kinds.disk import parse as parse_disk
from pyvmm.kinds.disk.crossing import hand_over
from pyvmm.kinds.disk.storage import open_backend
from pyvmm.kinds.vm_spec import from_json, to_json, validate
from pyvmm.spec.vm import DiskSpec, VmSpec
from pyvmm.testing.blk_driver import IOERR, OK
from pyvmm.virtio.blk.backend import Backend
from pyvmm.virtio.blk.overlay_layout import layout_for

MIB = 1 << 20
SQUARES = """
from __future__ import annotations
import os
from pathlib import Path
from pyvmm.virtio.blk.backend import Backend, scatter

class Squares(Backend):
    read_only = True

    def __init__(self, sectors: int = 64, start: int = 0, path: Path | None = None):
        self.size_sectors, self.start, self.path = sectors, start, path

    def readv(self, views, size, offset):
        first = self.start + offset // 512
        numbers = range(first, first + size // 512)
        scatter(b"".join((b"%d" % n**2).ljust(512, b"\\0") for n in numbers), views)

class Broken(Squares):
    def readv(self, views, size, offset):
        os.stat("/does/not/exist")

class Empty(Squares):
    def __init__(self):
        self.size_sectors = 0

class Unsized(Backend):
    def readv(self, views, size, offset): ...

class Abstract(Backend):
    size_sectors = 1

not_a_backend = 3
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squares.py").write_text(SQUARES)
    (tmp_path / "a.img").write_bytes(os.urandom(MIB))
    return tmp_path


@pytest.mark.parametrize(
    "text, spec, kind",
    [
        ("a.img", DiskSpec("a.img"), "raw"),
        ("a.qcow2", DiskSpec("a.qcow2"), "qcow2"),
        ("A.QCOW2,ro", DiskSpec("A.QCOW2", read_only=True), "qcow2"),
        ("a.qcow2,format=raw", DiskSpec("a.qcow2", format="raw"), "raw"),
        ("a.img,format=qcow2", DiskSpec("a.img", format="qcow2"), "qcow2"),
        ("a,,b.img,direct", DiskSpec("a,b.img", direct=True), "raw"),
        (
            "a.img,snapshot,block-size=4096",
            DiskSpec("a.img", snapshot=True, block_size=4096),
            "raw",
        ),
        ("a.img,overlay=x,,y", DiskSpec("a.img", overlay="x,y"), "raw"),
        ("a.img,on-error=stop", DiskSpec("a.img", on_error="stop"), "raw"),
        ("ram:64M,id=r", DiskSpec("ram:64M", id="r"), "ram"),
        ("./ram:64M", DiskSpec("./ram:64M"), "raw"),
        ("a.py:B", DiskSpec("a.py:B"), "python"),
        (
            "d/a.py:B,id=b,size=3,text=x,,y",
            DiskSpec("d/a.py:B", id="b", arguments=(("size", "3"), ("text", "x,y"))),
            "python",
        ),
        ("a.py:3", DiskSpec("a.py:3"), "raw"),
    ],
)
def test_what_the_option_says(text: str, spec: DiskSpec, kind: str) -> None:
    parsed = parse_disk(text)
    assert parsed == spec
    assert parsed.storage == kind


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.img,block-size=513", "block-size cannot be '513'; choose from 512, 1024, 2048, 4096"),
        ("a.img,on-error=ignore", "choose from report, stop"),
        ("a.img,format=vmdk", "choose from raw, qcow2"),
        ("a.img,size=3", "unknown disk option 'size=3'"),
        ("a.img,overlay", "unknown disk option 'overlay'"),
        ("a.img,overlay=", "unknown disk option 'overlay='"),
        ("a.img,snapshot,readonly", "only one of"),
        ("a.img,snapshot,overlay=x", "only one of"),
        ("a.img,overlay=x,direct", "direct is for images that are written themselves"),
        ("ram:1M,snapshot", "nothing in it at the start"),
        ("ram:1M,direct", "direct and format= are for files"),
        ("ram:1M,overlay=x", "an overlay needs an image"),
        ("a.py:B,overlay=x", "an overlay needs an image"),
    ],
)
def test_what_makes_no_sense(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_disk(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_specification_survives_the_way_inside() -> None:
    disks = (
        parse_disk("a.py:B,k=v"),
        parse_disk("b.img,overlay=o,on-error=stop,block-size=512"),
        DiskSpec("c.img", snapshot=True, scratch="/run/x"),
    )
    spec = validate(VmSpec("kernel", disks=disks))
    assert from_json(to_json(spec)) == spec


def opened(text: str, closing: ExitStack) -> Backend:
    return open_backend(parse_disk(text), closing)


def test_a_disk_in_ram_keeps_and_frees() -> None:
    with ExitStack() as closing, running(opened("ram:4M", closing)) as rig:
        assert rig.disk.read(8191, 512).data == bytes(512)
        assert rig.disk.write(8191, b"r" * 512).status == OK
        assert rig.disk.read(8191, 512).data == b"r" * 512
        assert rig.disk.discard((8184, 8, 0)).status == OK
        assert rig.disk.read(8191, 512).data == bytes(512)
        assert rig.disk.flush().status == OK


@pytest.mark.parametrize("size", ["0", "x", "-1M", "", "99999999999G"])
def test_no_disk_in_ram_of_a_silly_size(size: str) -> None:
    with ExitStack() as closing, pytest.raises(ConfigError, match=r"^--disk: "):
        opened(f"ram:{size}", closing)


def test_a_disk_that_is_a_class() -> None:
    text = "squares.py:Squares,sectors=8,start=3"
    with ExitStack() as closing, running(opened(text, closing)) as rig:
        assert rig.driver.config(0, 8)[0] == 8
        assert rig.disk.read(2, 512).data == b"25" + bytes(510)
        assert rig.disk.write(2, bytes(512)).status == IOERR
    with ExitStack() as closing, running(opened(f"{text},snapshot", closing)) as rig:
        assert rig.disk.write(2, b"w" * 512).status == OK
        assert rig.disk.read(1, 1024).data == b"16" + bytes(510) + b"w" * 512


def test_what_the_class_raises_is_an_io_error() -> None:
    with ExitStack() as closing, running(opened("squares.py:Broken", closing)) as rig:
        assert rig.disk.read(2, 512).status == IOERR
        assert "No such file or directory" in rig.lines[0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("missing.py:Squares", "no file missing.py"),
        ("squares.py:Circles", "is not there; there is Squares"),
        ("squares.py:not_a_backend", "is not a Backend"),
        ("squares.py:Squares,sectors=many", "cannot read sectors='many'"),
        ("squares.py:Squares,corners=4", "has no option 'corners'"),
        ("squares.py:Empty", "has size_sectors 0"),
        ("squares.py:Unsized", "has size_sectors None"),
        ("squares.py:Abstract", "abstract"),
    ],
)
def test_a_class_that_is_no_disk(text: str, message: str) -> None:
    with ExitStack() as closing, pytest.raises(ConfigError) as caught:
        opened(text, closing)
    line = str(caught.value)
    assert line.startswith("--disk: ") and message in line and "\n" not in line


# --- inside an emulated host ----------------------------------------------------------------------

Handed = Callable[[str], tuple[DiskSpec, list[HostDisk]]]


@pytest.fixture
def handed(place: Path):  # type: ignore[no-untyped-def]
    with ExitStack() as closing:
        border = Border(closing, lambda path, option: os.path.realpath(path))

        def call(text: str) -> tuple[DiskSpec, list[HostDisk]]:
            crossing = hand_over(parse_disk(text), border)
            assert isinstance(crossing.spec, DiskSpec)
            return crossing.spec, list(crossing.disks)

        yield call


def size_of(disk: HostDisk) -> int:
    assert disk.fd is not None
    return os.lseek(disk.fd, 0, os.SEEK_END)


def test_an_image_keeps_its_path(handed: Handed, place: Path) -> None:
    inside, [disk] = handed("a.img,readonly,direct")
    assert inside == DiskSpec(str(place / "a.img"), read_only=True, direct=True, format="raw")
    assert (disk.path, disk.read_only, disk.direct) == ("a.img", True, True)


def test_a_disk_in_ram_comes_from_outside(handed: Handed) -> None:
    inside, [disk] = handed("ram:4M,id=x")
    assert inside.path == disk.path and inside.storage == "raw"
    assert size_of(disk) == 4 * MIB


def test_a_snapshots_changes_go_outside(handed: Handed, place: Path) -> None:
    before = set(place.iterdir())
    inside, [base, changes] = handed("a.img,snapshot")
    assert (base.read_only, changes.read_only) == (True, False)
    assert inside.snapshot and inside.scratch == changes.path
    assert size_of(changes) == layout_for(MIB).file_size
    assert set(place.iterdir()) == before


def test_an_overlay_is_made_and_locked_outside(handed: Handed, place: Path) -> None:
    inside, [base, changes] = handed("a.img,overlay=kept")
    assert inside.overlay == changes.path == str(place / "kept")
    assert (base.read_only, changes.read_only) == (True, False)
    with pytest.raises(ConfigError, match="in use"):
        handed("a.img,overlay=kept")
    with pytest.raises(ConfigError, match="in use"):
        handed("a.img")


def test_inside_it_is_the_same_disk(handed: Handed, place: Path) -> None:
    """The bind mounts of the emulated host, done here with the files themselves."""
    inside, [_, changes] = handed("a.img,snapshot")
    (place / "changes").touch()
    os.truncate(place / "changes", size_of(changes))
    spec = DiskSpec(inside.path, snapshot=True, scratch=str(place / "changes"), format="raw")
    content = (place / "a.img").read_bytes()
    with ExitStack() as closing, running(open_backend(spec, closing)) as rig:
        assert rig.disk.write(0, b"s" * 512).status == OK
        assert rig.disk.read(0, 1024).data == b"s" * 512 + content[512:1024]
    assert (place / "a.img").read_bytes() == content
    assert (place / "changes").stat().st_blocks > 0


def test_a_qcow2_image_is_raw_inside(handed: Handed, place: Path) -> None:
    head = struct.pack(">4sIQIIQI", b"QFI\xfb", 2, 0, 0, 16, MIB, 0)
    (place / "q.qcow2").write_bytes(head + bytes(MIB))
    inside, [disk] = handed("q.qcow2,readonly")
    [layer] = disk.layers
    assert (layer.format, disk.fd, disk.read_only) == ("qcow2", None, True)
    assert os.fstat(layer.image.fd).st_ino == (place / "q.qcow2").stat().st_ino
    assert inside.storage == "raw" and inside.path == str(place / "q.qcow2")
    with pytest.raises(ConfigError, match="is not a qcow2 image"):
        handed("a.img,format=qcow2")


def test_a_class_is_checked_and_goes_by_its_real_path(handed: Handed, place: Path) -> None:
    inside, disks = handed("squares.py:Squares,sectors=9,path=x")
    assert disks == []
    assert inside.path == f"{place / 'squares.py'}:Squares"
    assert inside.arguments == (("sectors", "9"), ("path", str(place / "x")))
    with pytest.raises(ConfigError, match="has no option"):
        handed("squares.py:Squares,no=1")
