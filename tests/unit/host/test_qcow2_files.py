"""Row 74: which files a qcow2 image gets opened. None that only the image names."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from unit.virtio.blk.test_blk_nbd import opened, qemu_img, refusal, why_not

from pyvmm.emulated_host.qemu import Qcow2Disk, _qcow2_nodes
from pyvmm.errors import ConfigError, HostError
from pyvmm.host import confinement
from pyvmm.host.qcow2 import Header, Layer, blockdev, open_chain, read_header
from pyvmm.host.storage_daemon import EXPORT, StorageDaemon, _confined
from pyvmm.kinds.border import Border
from pyvmm.kinds.disk import parse as parse_disk
from pyvmm.kinds.disk.crossing import hand_over
from pyvmm.kinds.disk.storage import open_backend
from pyvmm.kinds.vm_spec import from_json, to_json, validate
from pyvmm.spec.vm import DiskSpec, VmSpec
from pyvmm.virtio.blk.backend import Backend
from pyvmm.virtio.blk.nbd import NbdBackend, load

needs_qemu = pytest.mark.skipif(bool(why_not()), reason=why_not())
MIB = 1 << 20
BACKING_FORMAT, DATA_FILE_NAME = 0xE2792ACA, 0x44415441
DATA_FILE = 1 << 2


# --- the header -----------------------------------------------------------------------------------


def extension(kind: int, data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">II", kind, size) + data + bytes(-len(data) % 8)


def header(
    *,
    version: int = 3,
    backing: bytes = b"",
    at: int | None = None,
    length: int | None = None,
    bits: int = 16,
    crypt: int = 0,
    features: int = 0,
    header_length: int | None = None,
    extensions: bytes = b"",
) -> bytes:
    """An image's beginning, right or wrong; the name comes behind the extensions."""
    own = 72 if version == 2 else 104
    place = own + len(extensions) + 8
    offset = (place if backing else 0) if at is None else at
    size = len(backing) if length is None else length
    start = struct.pack(">4sIQIIQI", b"QFI\xfb", version, offset, size, bits, MIB, crypt)
    start = start.ljust(72, b"\0")
    if version != 2:
        given = own if header_length is None else header_length
        start += struct.pack(">QQQII", features, 0, 0, 4, given)
    return (start + extensions + bytes(8) + backing).ljust(4096, b"\0")


def read(tmp_path: Path, content: bytes) -> Header:
    path = tmp_path / "image"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header("image", fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("version", [2, 3])
def test_what_a_header_says(tmp_path: Path, version: int) -> None:
    assert read(tmp_path, header(version=version)) == Header()
    names = extension(0x6803F857, bytes(48)) + extension(BACKING_FORMAT, b"raw")
    content = header(version=version, backing=b"/etc/shadow", extensions=names)
    assert read(tmp_path, content) == Header("/etc/shadow", "raw")
    content = header(version=version, backing=b"a\0b\xff", extensions=names)
    assert read(tmp_path, content).backing == "a"
    assert read(tmp_path, header(version=version, backing=b"\xff\n")).backing == "\\xff\n"


def test_an_external_data_file_is_a_feature_with_or_without_a_name(tmp_path: Path) -> None:
    named = extension(DATA_FILE_NAME, b"/etc/passwd")
    content = header(features=DATA_FILE, extensions=named)
    assert read(tmp_path, content) == Header(has_data_file=True, data_file="/etc/passwd")
    assert read(tmp_path, header(features=DATA_FILE)) == Header(has_data_file=True)
    # The name alone means nothing to QEMU, nor to us; version 2 has no features.
    assert not read(tmp_path, header(extensions=named)).has_data_file
    assert not read(tmp_path, header(version=2, extensions=named)).has_data_file


HOSTILE = {
    "version 1": header(version=1),
    "version 4": header(version=4),
    "clusters of 2**8 bytes": header(bits=8),
    "clusters of 2**4294967295 bytes": header(bits=0xFFFFFFFF),
    "a header of 100 bytes": header(header_length=100),
    "a header of 4294967295 bytes": header(header_length=0xFFFFFFFF),
    "a backing file's name of 1024 bytes": header(backing=b"x" * 1024),
    "a backing file's name of 4294967295 bytes": header(backing=b"x", length=0xFFFFFFFF),
    "a backing file's name of 1 bytes at 0xffffffffffffffff": header(backing=b"x", at=2**64 - 1),
    "a backing file's name of 1 bytes at 0x4": header(backing=b"x", at=4),
    "a backing file's name of 9 bytes at 0xfffc": header(backing=b"123456789", at=0xFFFC),
    "it is cut short": header(backing=b"x", at=0x8000),
    "a header extension of 4294967295 bytes": header(
        extensions=extension(BACKING_FORMAT, b"raw", 0xFFFFFFFF), backing=b"x"
    ),
    "is encrypted": header(crypt=2),
    "is encrypted, and": header(version=2, crypt=1),
    "is not a qcow2 image": b"QFI",
    "is not a qcow2 image; add": bytes(4096),
}


@pytest.mark.parametrize("why", HOSTILE)
def test_row74_hostile_headers(tmp_path: Path, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, HOSTILE[why])
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_row74_random_headers_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(74)
    good = header(
        backing=b"some/base.img",
        features=DATA_FILE,
        extensions=extension(BACKING_FORMAT, b"qcow2") + extension(DATA_FILE_NAME, b"data"),
    )
    refused = 0
    for _ in range(2000):
        content = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(8, 220)] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
        try:
            found = read(tmp_path, bytes(content[: rng.choice([20, 110, 4096])]))
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert len(found.backing) <= 4 * 1023
    assert 100 < refused < 1900


def test_a_header_that_says_much_is_not_read_whole(tmp_path: Path) -> None:
    """An image of 2 MiB clusters whose extensions never end: 64 KiB of them are looked at."""
    many = extension(0x12345678, b"x" * 8) * (1 << 17)
    assert read(tmp_path, header(bits=21, extensions=many, at=0)) == Header()


# --- what gets opened -----------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a secret, a base, and an image on it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(b"s" * MIB)
    if why_not():
        return tmp_path
    qemu_img("create", "-q", "-f", "qcow2", "base.qcow2", MIB)
    write(tmp_path / "base.qcow2", b"b" * 512, 0)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2")
    write(tmp_path / "mid.qcow2", b"m" * 512, 512, backing=("base.qcow2",))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2")
    return tmp_path


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def write(path: Path, data: bytes, offset: int, **options: object) -> None:
    with ExitStack() as closing:
        opened(path, closing, **options).writev([memoryview(data)], len(data), offset)


def content(disk: Backend, size: int = 1536) -> bytes:
    data = bytearray(size)
    disk.readv([memoryview(data)], size, 0)
    return bytes(data)


@needs_qemu
@pytest.mark.parametrize(
    "name",
    [
        "/etc/shadow",
        "secret",
        "json:" + json.dumps({"driver": "raw", "file": {"driver": "file", "filename": "secret"}}),
        "nbd://127.0.0.1:10809/x",
        "fat:rw:/etc",
        "a\nb",
    ],
)
@pytest.mark.parametrize("options", [{}, {"read_only": True}, {"snapshot": True}])
def test_row74_a_backing_file_that_nobody_named(
    tmp_path: Path, name: str, options: dict[str, object]
) -> None:
    (tmp_path / "q.qcow2").write_bytes(header(backing=name.encode()))
    text = refusal(tmp_path / "q.qcow2", **options)
    assert "q.qcow2 builds on another file, " in text and repr(name)[:40] in text
    assert "; if you trust it, say which file that is: ,backing=FILE" in text


@needs_qemu
def test_row74_a_data_file_that_nobody_named(place: Path) -> None:
    secret = (place / "secret").read_bytes()
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=data", "q.qcow2", MIB)
    text = refusal(place / "q.qcow2")
    assert "q.qcow2 keeps its data in another file, 'data'" in text and ",data-file=FILE" in text
    # The same image, whose header now names somebody else's file.
    image = (place / "q.qcow2").read_bytes()
    (place / "q.qcow2").write_bytes(image.replace(b"data" + bytes(4), b"secret" + bytes(2)))
    assert "keeps its data in" in refusal(place / "q.qcow2")
    with ExitStack() as closing:
        disk = opened(place / "q.qcow2", closing, data_file="data")
        disk.writev([memoryview(b"d" * 512)], 512, 0)
        disk.flush()
        assert content(disk, 512) == b"d" * 512
    assert b"d" * 512 in (place / "data").read_bytes()
    assert (place / "secret").read_bytes() == secret


@needs_qemu
def test_row74_each_of_a_chain_is_named_or_refused(place: Path, closing: ExitStack) -> None:
    text = refusal(place / "top.qcow2")
    assert "top.qcow2 builds on another file, 'mid.qcow2'" in text
    text = refusal(place / "top.qcow2", backing=("mid.qcow2",))
    assert "mid.qcow2 builds on another file, 'base.qcow2'" in text
    disk = opened(place / "top.qcow2", closing, backing=("mid.qcow2", "base.qcow2"))
    assert content(disk) == b"b" * 512 + b"m" * 512 + bytes(512)
    before = {name: (place / name).read_bytes() for name in ("mid.qcow2", "base.qcow2")}
    disk.writev([memoryview(b"t" * 512)], 512, 1024)
    disk.flush()
    assert before == {name: (place / name).read_bytes() for name in before}
    # They are locked, as QEMU locks them: who wants to write to one is refused.
    done = subprocess.run(
        ["qemu-io", "-c", "write 0 512", "base.qcow2"], capture_output=True, text=True
    )
    assert "lock" in done.stderr


@needs_qemu
def test_the_file_that_the_user_names_counts_not_the_image_s_name(
    place: Path, closing: ExitStack
) -> None:
    os.rename("base.qcow2", "moved.qcow2")
    shutil.copy("secret", "base.qcow2")
    disk = opened(place / "mid.qcow2", closing, backing=("moved.qcow2",))
    assert content(disk) == b"b" * 512 + b"m" * 512 + bytes(512)


@needs_qemu
def test_a_backing_file_is_raw_if_its_name_and_the_image_say_so(
    place: Path, closing: ExitStack
) -> None:
    """Never because of what is in it: it begins as an image does that builds on the secret."""
    (place / "raw.img").write_bytes(header(backing=b"secret").ljust(MIB, b"r"))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "raw.img", "-F", "raw", "q.qcow2")
    disk = opened(place / "q.qcow2", closing, backing=("raw.img",))
    assert content(disk, 4) == b"QFI\xfb"


@needs_qemu
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"backing": ("secret",)}, "needs no other file, but secret is named; leave backing= out"),
        ({"data_file": "secret"}, "but secret is named; leave data-file= out"),
    ],
)
def test_a_file_that_is_named_for_nothing(
    place: Path, options: dict[str, object], why: str
) -> None:
    assert why in refusal(place / "base.qcow2", **options)


@needs_qemu
def test_a_backing_file_in_another_format(place: Path) -> None:
    named = extension(BACKING_FORMAT, b"vmdk")
    (place / "q.qcow2").write_bytes(header(backing=b"x", extensions=named))
    assert "in the format 'vmdk'" in refusal(place / "q.qcow2", backing=("secret",))


@needs_qemu
def test_row74_what_was_checked_is_what_is_served(place: Path, closing: ExitStack) -> None:
    """Between the two another file comes to the image's name, and to that of its base."""
    layers = open_chain("mid.qcow2", ("base.qcow2",), None, read_only=False, closing=closing)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "secret", "-F", "raw", "evil.qcow2")
    os.replace("evil.qcow2", "mid.qcow2")
    os.replace("secret", "base.qcow2")
    _, disk = served(layers, closing)
    assert content(disk) == b"b" * 512 + b"m" * 512 + bytes(512)


# --- the room of the storage daemon ---------------------------------------------------------------

confines = pytest.mark.skipif(
    not confinement.available(), reason="this kernel has no Landlock, or it is not x86-64"
)


def served(layers: tuple[Layer, ...], closing: ExitStack) -> tuple[StorageDaemon, Backend]:
    daemon = StorageDaemon(layers, direct=False)
    closing.callback(daemon.close)
    disk = NbdBackend(load(), daemon.socket, EXPORT)
    closing.callback(disk.close)
    return daemon, disk


@needs_qemu
@confines
def test_row74_the_daemon_can_open_nothing_that_it_was_not_given(
    place: Path, closing: ExitStack
) -> None:
    """Somebody who can write to the image changes its header after we have looked at it. No option
    keeps QEMU from a data file; that it can open no file does."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={place}/data", "q.qcow2", MIB)
    changed = (place / "q.qcow2").read_bytes()
    qemu_img("create", "-q", "-f", "qcow2", "q.qcow2", MIB)
    layers = open_chain("q.qcow2", (), None, read_only=False, closing=closing)
    (place / "q.qcow2").write_bytes(changed)
    daemon = StorageDaemon(layers, direct=False)
    closing.callback(daemon.close)
    with pytest.raises(HostError):
        NbdBackend(load(), daemon.socket, EXPORT)
    assert "data': Permission denied" in daemon.why_it_failed()


@needs_qemu
@confines
def test_row74_the_daemon_is_in_a_room(place: Path, closing: ExitStack) -> None:
    layers = open_chain("mid.qcow2", ("base.qcow2",), None, read_only=False, closing=closing)
    daemon, _ = served(layers, closing)
    assert daemon._process is not None
    status = Path(f"/proc/{daemon._process.pid}/status").read_text()
    assert "\nNoNewPrivs:\t1\n" in status and "\nSeccomp:\t2\n" in status
    environment = Path(f"/proc/{daemon._process.pid}/environ").read_bytes()
    assert environment == b""


@needs_qemu
@confines
def test_row74_a_base_can_be_read_only(place: Path, closing: ExitStack) -> None:
    """A daemon that was taken over could open what it inherited again, for writing."""
    layers = open_chain("mid.qcow2", ("base.qcow2",), None, read_only=False, closing=closing)
    files = [layer.image for layer in layers]
    program = shutil.which("dd")
    assert program is not None
    for image, may in zip(files, (True, False), strict=True):
        line = _confined(
            [program, "if=/dev/zero", f"of=/proc/self/fd/{image.fd}", "conv=notrunc", "count=0"],
            layers,
        )
        done = subprocess.run(line, pass_fds=[file.fd for file in files], capture_output=True)
        assert (done.returncode == 0) is may, done.stderr


def test_a_kernel_that_confines_nothing(
    place: Path,
    closing: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (place / "q.qcow2").write_bytes(header())
    layers = open_chain("q.qcow2", (), None, read_only=False, closing=closing)
    monkeypatch.setattr(confinement, "landlock_version", lambda: 0)
    assert _confined(["/usr/bin/qemu-storage-daemon"], layers) == ["/usr/bin/qemu-storage-daemon"]
    assert "cannot confine qemu-storage-daemon" in capsys.readouterr().err


# --- images in other states -----------------------------------------------------------------------


def set_feature(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(72)
        value = int.from_bytes(file.read(8), "big") | 1 << bit
        file.seek(72)
        file.write(value.to_bytes(8, "big"))


@needs_qemu
def test_a_dirty_image_is_mended_and_served(place: Path, closing: ExitStack) -> None:
    set_feature(place / "base.qcow2", 0)
    assert content(opened(place / "base.qcow2", closing), 512) == b"b" * 512


@needs_qemu
def test_a_corrupt_image_is_served_read_only(place: Path, closing: ExitStack) -> None:
    set_feature(place / "base.qcow2", 1)
    assert "Image is corrupt" in refusal(place / "base.qcow2")
    assert content(opened(place / "base.qcow2", closing, read_only=True), 512) == b"b" * 512


@needs_qemu
def test_internal_snapshots_change_nothing(place: Path, closing: ExitStack) -> None:
    qemu_img("snapshot", "-c", "before", "base.qcow2")
    disk = opened(place / "base.qcow2", closing)
    disk.writev([memoryview(b"n" * 512)], 512, 0)
    assert content(disk, 512) == b"n" * 512


@needs_qemu
def test_an_encrypted_image(place: Path) -> None:
    (place / "e.qcow2").write_bytes(header(crypt=2))  # LUKS
    assert "e.qcow2 is encrypted" in refusal(place / "e.qcow2")


# --- an emulated host's QEMU ----------------------------------------------------------------------


@needs_qemu
def test_row74_an_emulated_host_gets_descriptors_too(place: Path, closing: ExitStack) -> None:
    disk = validated("mid.qcow2,backing=base.qcow2")
    with ExitStack() as refused, pytest.raises(ConfigError, match="builds on another file"):
        hand_over(validated("mid.qcow2"), Border(refused, lambda path, option: path))
    crossing = hand_over(disk, Border(closing, lambda path, option: path))
    inside, [given] = crossing.spec, crossing.disks
    assert isinstance(inside, DiskSpec)
    assert (inside.storage, inside.backing) == ("raw", ())
    words = _qcow2_nodes(3, Qcow2Disk(given.layers, given.direct))
    assert words[0::2] == ["-add-fd", "-add-fd", "-blockdev"]
    node = json.loads(words[-1])
    assert node["file"]["filename"] == "/dev/fdset/4000"
    assert node["backing"]["file"]["filename"] == "/dev/fdset/4001"
    assert node["backing"]["backing"] is None
    assert [words[1], words[3]] == [
        f"fd={layer.image.fd},set={4000 + n}" for n, layer in enumerate(given.layers)
    ]


@needs_qemu
@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="no qemu-system-x86_64")
@pytest.mark.parametrize("options", ["", ",readonly", ",direct"])
def test_row74_qemu_takes_those_descriptors(place: Path, closing: ExitStack, options: str) -> None:
    """The real one, without a machine: it opens the chain, and tells of what it consists."""
    disk = validated(f"mid.qcow2,backing=base.qcow2{options}")
    try:
        [given] = hand_over(disk, Border(closing, lambda path, option: path)).disks
    except ConfigError as error:
        pytest.skip(str(error))
    fds = [layer.image.fd for layer in given.layers]
    qemu = ["qemu-system-x86_64", "-machine", "none", "-display", "none", "-qmp", "stdio"]
    commands = ("qmp_capabilities", "query-named-block-nodes", "quit")
    done = subprocess.run(
        [*qemu, *_qcow2_nodes(0, Qcow2Disk(given.layers, given.direct))],
        input="".join(json.dumps({"execute": command}) + "\n" for command in commands),
        capture_output=True,
        text=True,
        pass_fds=fds,
    )
    assert done.returncode == 0, done.stderr
    [nodes] = [
        answer["return"]
        for answer in map(json.loads, done.stdout.splitlines())
        if isinstance(answer.get("return"), list)
    ]
    found = {node["file"] for node in nodes if node["drv"] == "file"}
    assert found == {"/dev/fdset/1000", "/dev/fdset/1001"}
    assert [node["ro"] for node in nodes if node["file"] == "/dev/fdset/1001"] == [True, True]


def test_nothing_is_left_for_qemu_to_take_from_an_image(place: Path, closing: ExitStack) -> None:
    (place / "q.qcow2").write_bytes(header())
    layers = open_chain("q.qcow2", (), None, read_only=True, closing=closing)
    node = blockdev(layers, "disk", str, direct=False)
    assert node["backing"] is None  # not absent: that would be "as the image says"
    assert node["file"]["locking"] == "off" and not node["file"]["auto-read-only"]


# --- how a user says it ---------------------------------------------------------------------------


def validated(text: str) -> DiskSpec:
    return validate(VmSpec("k", disks=(parse_disk(text),))).disks[0]


def test_the_options() -> None:
    disk = parse_disk("a.qcow2,backing=b.qcow2,backing=c,,d.img,data-file=x")
    assert (disk.backing, disk.data_file) == (("b.qcow2", "c,d.img"), "x")
    spec = validate(VmSpec("k", disks=(disk,)))
    assert from_json(to_json(spec)) == spec
    for text in ("a.img,backing=b", "ram:1M,backing=b", "a.img,data-file=b"):
        with pytest.raises(ConfigError, match="are for qcow2 images"):
            parse_disk(text)
    assert parse_disk("a.py:Disk,backing=b").arguments == (("backing", "b"),)


def test_the_options_in_a_configuration_file(tmp_path: Path) -> None:
    from pyvmm.api.config_file import load

    path = tmp_path / "vm.toml"
    for written, backing in (('["b.img"]', ("b.img",)), ('["b.img", "/c"]', ("b.img", "/c"))):
        path.write_text(
            f'kernel = "k"\n[[disks]]\npath = "a.qcow2"\nbacking = {written}\ndata_file = "d"\n'
        )
        [disk] = load(str(path))["disks"]
        assert disk.backing == tuple(os.path.join(tmp_path, name) for name in backing)
        assert disk.data_file == str(tmp_path / "d")


# --- our own overlays -----------------------------------------------------------------------------


def test_row74_an_overlay_names_no_base(tmp_path: Path) -> None:
    """Only a hash of it: whatever its file holds, the base is the one that the user names."""
    (tmp_path / "base").write_bytes(b"b" * MIB)
    spec = DiskSpec(str(tmp_path / "base"), overlay=str(tmp_path / "changes"))
    with ExitStack() as closing:
        open_backend(spec, closing).writev([memoryview(b"x" * 512)], 512, 0)
    kept = (tmp_path / "changes").read_bytes()
    assert os.fsencode(tmp_path) not in kept and b"base" not in kept
    (tmp_path / "other").write_bytes(b"o" * MIB)
    wrong = DiskSpec(str(tmp_path / "other"), overlay=str(tmp_path / "changes"))
    with ExitStack() as closing, pytest.raises(ConfigError, match="is for another base"):
        open_backend(wrong, closing)


WHOLE = {"driver": "raw", "file": {"driver": "file", "filename": "base"}}


@needs_qemu
@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({**WHOLE, "offset": 65536}, "'offset'"),
        ({**WHOLE, "size": 512}, "'size'"),
        ({"driver": "raw", "file.filename": "base", "file.offset": 0}, "'file.offset'"),
        ({"driver": "raw", "file": {**WHOLE, "offset": 1}}, "'offset'"),
        ({"driver": "quorum", "children": [WHOLE]}, "the driver 'quorum'"),
        ({"driver": "raw", "file": {"driver": "nbd", "host": "localhost"}}, "the driver 'nbd'"),
        ({"driver": ["raw"]}, "the driver ['raw']"),
        ({"file": 1}, "'file'"),
        ([WHOLE], "[{"),
        (None, "None"),
    ],
)
def test_row74_a_base_that_is_more_or_less_than_a_file(
    tmp_path: Path, node: object, said: str
) -> None:
    """QEMU would show another content than the file that the user names."""
    (tmp_path / "base").write_bytes(bytes(MIB))
    (tmp_path / "q.qcow2").write_bytes(header(backing=f"json:{json.dumps(node)}".encode()))
    text = refusal(tmp_path / "q.qcow2", backing=(str(tmp_path / "base"),))
    assert f"builds on more than a file: its name for that has {said}" in text


@needs_qemu
@pytest.mark.parametrize("text", [b"json:{", b"json:", b"json:" + b"[" * 1000])
def test_row74_a_base_s_name_that_is_no_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "base").write_bytes(bytes(MIB))
    (tmp_path / "q.qcow2").write_bytes(header(backing=text))
    assert "has text that is not JSON" in refusal(
        tmp_path / "q.qcow2", backing=(str(tmp_path / "base"),)
    )


@needs_qemu
@pytest.mark.parametrize(
    "node",
    [WHOLE, {"driver": "raw", "file.driver": "file", "file.filename": "base"}, {"file": "base"}],
)
def test_a_base_by_json_that_is_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closing: ExitStack, node: object
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").write_bytes(b"b" * MIB)
    qemu_img("create", "-q", "-f", "qcow2", "q.qcow2", MIB)
    name = f"json:{json.dumps(node)}"
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", name, "-F", "raw", "q.qcow2")
    assert content(opened(tmp_path / "q.qcow2", closing, backing=("base",)), 512) == b"b" * 512


@needs_qemu
def test_a_raw_base_that_is_called_qcow2(tmp_path: Path) -> None:
    base = tmp_path / "base.qcow2"
    base.write_bytes(bytes(MIB))
    (tmp_path / "q.qcow2").write_bytes(header(backing=b"base.qcow2"))
    text = refusal(tmp_path / "q.qcow2", backing=(str(base),))
    assert f"is not a qcow2 image; qemu-img rebase -u -F raw -b {base} " in text
