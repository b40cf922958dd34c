"""A container image's tree as an ext4 file system, looked at by the system's own e2fsprogs."""

from __future__ import annotations

import ctypes
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from container_archives import Layout, directory, hardlink, layer, member, symlink

from pyvmm import images
from pyvmm.errors import ConfigError
from pyvmm.host import confinement
from pyvmm.images import programs
from pyvmm.images.container import attributes, disk
from pyvmm.images.container.load import load
from pyvmm.images.container.tree import Tree
from pyvmm.images.progress import Progress

MIB = 1 << 20
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
ACL = bytes.fromhex(
    "02000000010006000000000002000600e803000004000400ffffffff10000600ffffffff20000400ffffffff"
)


@pytest.fixture(scope="module")
def tools() -> str:
    if shutil.which("debugfs", path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
        pytest.skip("debugfs (e2fsprogs) is missing")
    try:
        return images.path("programs-ext4")
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def made(tmp_path: Path, tools: str):
    def made(*members: tuple[tarfile.TarInfo, bytes], size: int = 32 * MIB) -> Path:
        tree = tree_of(tmp_path, *members)
        target = tmp_path / "disk.ext4"
        target.unlink(missing_ok=True)
        disk.make(tree, str(target), size, tools, lambda size: None)
        return target

    return made


def tree_of(room: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Tree:
    layout = Layout()
    layout.add([layer(*members)])
    path = layout.archive(room / "image.tar")
    return load("oci-archive", path, None, str(room), 64 * MIB, Progress(quiet=True))[0]


def test_the_tar_stream_has_all_of_the_tree(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(3 * MIB + 17)
    tree = tree_of(
        tmp_path,
        directory(".", mode=0o751, uid=3, gid=4),
        member("f", data=content, mode=0o4750, uid=70000, gid=80000, mtime=1234567890),
        hardlink("g", "f"),
        symlink("l", "target"),
        member("n", tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("e/ü", data=b"2"),
        hardlink("e/v", "e/ü"),
    )
    file, heard = io.BytesIO(), []
    disk.write_tar(tree, file, heard.append)
    file.seek(0)
    with tarfile.open(fileobj=file) as archive:
        found = archive.getmembers()
        assert archive.extractfile("f").read() == content
        assert archive.extractfile("e/v").read() == b"2"
    assert sum(heard) == len(content) + 1
    assert [(one.name, one.type, one.linkname, one.size) for one in found] == [
        (".", tarfile.DIRTYPE, "", 0),
        ("f", tarfile.REGTYPE, "", len(content)),
        ("g", tarfile.LNKTYPE, "f", 0),
        ("l", tarfile.SYMTYPE, "target", 0),
        ("n", tarfile.CHRTYPE, "", 0),
        ("e", tarfile.DIRTYPE, "", 0),
        ("e/ü", tarfile.REGTYPE, "", 1),
        ("e/v", tarfile.LNKTYPE, "e/ü", 0),
    ]
    assert [(one.mode, one.uid, one.gid, one.mtime) for one in found[:2]] == [
        (0o751, 3, 4, 0),
        (0o4750, 70000, 80000, 1234567890),
    ]
    assert (found[4].devmajor, found[4].devminor) == (1, 3)
    binary = [one.name for one in found if one.pax_headers.get("hdrcharset") == "BINARY"]
    assert binary == ["e/ü", "e/v"]


def test_no_file_is_ever_in_memory_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tree_of(tmp_path, member("f", data=b"x" * (16 * MIB)))
    pieces, fetched, most = tree.spool.pieces, 0, 0

    def counted(start: int, size: int) -> Iterator[bytes]:
        nonlocal fetched
        for piece in pieces(start, size):
            fetched += len(piece)
            yield piece

    class Pipe(io.BytesIO):
        def write(self, data: object) -> int:
            nonlocal most
            most = max(most, fetched - self.tell())
            return super().write(data)

    monkeypatch.setattr(tree.spool, "pieces", counted)
    disk.write_tar(tree, Pipe(), lambda size: None)
    assert fetched == 16 * MIB and most <= 2 * MIB


def test_the_attributes_of_a_file_of_many_names_are_written_once(tmp_path: Path) -> None:
    tree = tree_of(
        tmp_path,
        member("a", xattrs={"user.x": b"1"}),
        hardlink("b", "a"),
        member("c", xattrs={"user.x": b"1"}),
        member("d"),
    )
    assert [*disk._attributes(tree)] == [
        attributes.record(path, {b"user.x": b"1"}) for path in (b"a", b"c")
    ]


def test_a_disk_s_size_follows_its_files(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, member("a"), hardlink("b", "a"), directory("d"))
    assert sum(1 for _ in tree.files()) == 3  # with the root; a file of two names is one
    assert disk.size_for(tree) == 1024 * MIB
    tree.find("a").size = 4096 * MIB
    assert 4096 * MIB + 512 * MIB <= disk.size_for(tree) <= 4096 * MIB * 5 // 4 + 513 * MIB
    assert disk.size_for(tree) % MIB == 0


def debugfs(image: Path, command: str) -> bytes:
    env = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    done = subprocess.run(["debugfs", "-R", command, image], capture_output=True, env=env)
    return done.stdout


def stat(image: Path, path: str) -> str:
    return debugfs(image, f'stat "{path}"').decode(errors="replace")


def check(image: Path) -> None:
    env = {"PATH": "/usr/sbin:/sbin"}
    done = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout


def test_everything_about_a_file_gets_into_the_file_system(made, tmp_path: Path) -> None:
    image = made(
        directory(".", mode=0o751, uid=3, gid=4),
        member("suid", data=b"x" * 5000, mode=0o4750, uid=70000, gid=80000, mtime=1234567890),
        hardlink("again", "suid"),
        symlink("short", "target"),
        symlink("long", "/x" * 500),
        directory("sticky", mode=0o1777),
        member("null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        member("disk", tarfile.BLKTYPE, devmajor=8, devminor=300),
        member("fifo", tarfile.FIFOTYPE, mode=0o600),
    )
    check(image)
    found = stat(image, "/suid")
    assert re.search(r"Mode: +04750 .*\n.*\nUser: 70000 +Group: 80000 .* Size: 5000\n", found)
    assert "mtime: 0x499602d2" in found and "Links: 2 " in found
    assert found == stat(image, "/again")
    assert debugfs(image, "cat suid") == b"x" * 5000
    assert re.search(r"Mode: +0751 .*\n.*\nUser: +3 +Group: +4 ", stat(image, "/"))
    assert 'Fast link dest: "target"' in stat(image, "/short")
    assert "Size: 1000\n" in stat(image, "/long")
    assert re.search(r"directory +Mode: +01777", stat(image, "/sticky"))
    assert "Device major/minor number: 01:03" in stat(image, "/null")
    assert "Device major/minor number: 08:300" in stat(image, "/disk")
    assert re.search(r"FIFO +Mode: +0600", stat(image, "/fifo"))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ((1 << 31) - 1, (1 << 31) - 1),
        (1 << 31, (1 << 31) - 1),  # in 2038
        ((1 << 32) + 7, (1 << 31) - 1),
        (1 << 33, (1 << 31) - 1),  # in 2242: beyond what octal digits of tar say
        (1 << 40, (1 << 31) - 1),
        (1, 1),
        (-1, 0),
        (-(1 << 40), 0),
    ],
)
def test_times_from_1970_to_2038_are_kept(made, time: int, seconds: int) -> None:
    """The nearest that it goes is what lies outside."""
    found = stat(made(member("file", mtime=time)), "/file")
    assert f"mtime: 0x{seconds:08x}:00000000" in found


def test_extended_attributes_get_there_whatever_they_and_the_names_hold(
    made, tmp_path: Path
) -> None:
    data = bytes(range(256))
    names = ["caps", 'quo"te', "back\\slash", " spaces  in it ", "bad\udcff", "ü", "tab\there"]
    everything = {
        "security.capability": CAPABILITY,
        "user.bin": data,
        "trusted.t": b"t",
        "system.posix_acl_access": ACL,
    }
    image = made(
        *(member(name, data=b"1", xattrs=everything) for name in names),
        directory("d", xattrs={"user.bin": data}),
        directory(".", xattrs={"user.root": b"r"}),
        member("plain"),
        hardlink("second", "caps"),
    )
    check(image)
    for name in names:
        path = name.encode("utf-8", "surrogateescape").replace(b'"', b'""')
        listed = run_debugfs(image, b'ea_list "/' + path + b'"')
        for attribute in everything:
            assert attribute.encode() in listed, (name, listed)
        value = tmp_path / "value"
        run_debugfs(image, b"ea_get -f " + bytes(value) + b' "/' + path + b'" user.bin')
        assert value.read_bytes() == data
        value.unlink()
    assert b"user.bin (256)" in debugfs(image, "ea_list /d")
    assert b"user.root" in debugfs(image, "ea_list /")
    assert b"user." not in debugfs(image, "ea_list /plain")


def run_debugfs(image: Path, command: bytes) -> bytes:
    """By a script, as a command line does not take any bytes."""
    return subprocess.run(
        ["debugfs", "-f", "-", image],
        input=command + b"\n",
        capture_output=True,
        env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"},
    ).stdout


def test_an_attribute_that_cannot_be_set_is_told(made) -> None:
    bad = {"system.posix_acl_access": b"no access list"}
    with pytest.raises(ConfigError, match=r"attributes: 'd/f': ext2fs_xattr_set: "):
        made(member("d/f", xattrs=bad))


def attribute(image: Path, path: str, name: str) -> bytes | None:
    """Its value, by a way that has no syntax; None if there is no such attribute."""
    library, errors = ctypes.CDLL("libext2fs.so.2"), ctypes.CDLL("libcom_err.so.2")
    system, inode, handle = ctypes.c_void_p(), ctypes.c_uint32(), ctypes.c_void_p()
    manager = ctypes.c_void_p.in_dll(library, "unix_io_manager")
    assert not library.ext2fs_open(bytes(image), 0x20000, 0, 0, manager, ctypes.byref(system))
    value, size = ctypes.POINTER(ctypes.c_char)(), ctypes.c_size_t()
    try:
        found = path.encode("utf-8", "surrogateescape")
        assert not library.ext2fs_namei(system, 2, 2, found, ctypes.byref(inode)), errors
        assert not library.ext2fs_xattrs_open(system, inode, ctypes.byref(handle))
        assert not library.ext2fs_xattrs_read(handle)
        key = name.encode("utf-8", "surrogateescape")
        at = (ctypes.byref(value), ctypes.byref(size))
        missing = library.ext2fs_xattr_get(handle, key, *at)
        return None if missing else value[: size.value]
    finally:
        library.ext2fs_xattrs_close(ctypes.byref(handle))
        library.ext2fs_close(system)


def test_no_name_is_ever_a_command(made, tmp_path: Path) -> None:
    """They were lines of a debugfs script: its buffer ends at 8,191 bytes, quotes are syntax."""
    secret, marker = tmp_path / "secret", tmp_path / "marker"
    secret.write_bytes(b"the host's own")
    touch = " " * 245 + "!touch "
    where = [*str(marker).strip("/").split("/")]
    long = "/".join([*["a" * 250] * 31, "b" * 130, touch, *where[:-1], f"{where[-1]} #"])
    assert len(long) > 8192
    names = [
        long,
        *("new\nline", "a\n!touch x", "a\r\nquit", "-f", "--help", '"', "'", "`id`", "$(id)", "%n"),
        *("\\", "\x1b[31m", "bad\udcff", "ü", " ", "a b", "<12>", "#", "é" * 127),
    ]
    attributes = [
        f'user.x" -f "{secret}',
        "user.a\nb",
        "user.\x1b",
        "user.ü",
        'user."',
    ]
    image = made(
        *(member(name, data=b"1", xattrs=dict.fromkeys(attributes, b"v")) for name in names),
        symlink("l", 'x" "y\n!id'),
    )
    check(image)
    for name in names:
        for one in attributes:
            assert attribute(image, name, one) == b"v", (name, one)
        assert attribute(image, name, "user.x") is None
    assert b"the host's own" not in image.read_bytes()
    assert not marker.exists()


def test_what_makes_the_file_system_can_write_nothing_else(
    tmp_path: Path, tools: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both programs, taken over by somebody: here they are this one instead."""
    probe = (
        "import os, socket, sys; sys.stdin.buffer.read(); said = []\n"
        "for what in [lambda: open(sys.argv[1], 'r+b').write(b'written'),\n"
        "             lambda: open(sys.argv[2], 'wb'), lambda: open(sys.argv[2]), socket.socket,\n"
        "             os.fork, lambda: os.kill(os.getppid(), 9),\n"
        "             lambda: os.chmod(sys.argv[2], 0)]:\n"
        "    try: what(); said.append('done')\n"
        "    except OSError: said.append('refused')\n"
        "sys.exit(' '.join(said))"
    )
    mine = tmp_path / "mine"
    mine.write_text("whole")
    target = str(tmp_path / "disk")
    python = os.path.realpath(sys.executable)
    ran: list[list[str]] = []

    def mke2fs(image: str, program: str, name: str) -> list[str]:
        ran.append([image, program, name])
        return [python, "-I", "-S", "-c", probe, target, str(mine)]

    monkeypatch.setattr(programs, "command", mke2fs)
    system = (*confinement.SYSTEM, sys.base_prefix)
    room = confinement.Room
    monkeypatch.setattr(
        confinement,
        "Room",
        lambda read, execute, **more: room(
            read=(*read, *system), execute=(*execute, *system), **more
        ),
    )
    with pytest.raises(ConfigError, match=r"done refused refused refused refused refused refused$"):
        disk.make(tree_of(tmp_path, member("a")), target, 32 * MIB, tools, lambda size: None)
    assert ran and mine.read_text() == "whole" and (mine.stat().st_mode & 0o777) == 0o644
    assert Path(target).read_bytes() == b"written"


def test_names_are_any_bytes_and_lost_found_may_be_the_image_s(made) -> None:
    image = made(
        member("ü"),
        member("bad\udcff"),
        member("new\nline"),
        directory("lost+found", mode=0o750, uid=9),
        member("lost+found/f", data=b"found"),
    )
    check(image)
    listed = debugfs(image, "ls -p /")
    assert b"/\xc3\xbc/" in listed and b"bad" in listed and b"new" in listed
    assert debugfs(image, "cat lost+found/f") == b"found"


def test_a_small_disk_takes_long_links_and_attributes_too(made) -> None:
    target = "/".join(["x" * 99] * 30)
    image = made(
        symlink("l", target), member("f", xattrs={"user.long": b"v" * 2500}), size=64 * MIB
    )
    check(image)
    assert target.encode() in image.read_bytes()
    assert b"v" * 2500 in debugfs(image, "ea_get /f user.long")


def test_links_of_any_length(made) -> None:
    """mke2fs 1.47.2 writes behind its buffer for 1,024 bytes, and for 2,048."""
    lengths = [1, 59, 60, 61, 1023, 1024, 1025, 2047, 2048, 4095]
    image = made(*(symlink(str(length), "t" * length) for length in lengths))
    check(image)
    for length in lengths:
        assert f"Size: {length}\n" in stat(image, f"/{length}")


def test_control_c_while_the_file_system_is_made_is_no_failure_of_it(
    tmp_path: Path, tools: str
) -> None:
    """The terminal sends it to both."""
    tree = tree_of(tmp_path, member("a", data=b"a" * MIB))

    def interrupt(size: int) -> None:
        [child] = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        os.waitid(os.P_PID, int(child), os.WEXITED | os.WNOWAIT)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.make(tree, str(tmp_path / "disk"), 32 * MIB, tools, interrupt)


def test_an_image_that_does_not_fit_is_told(made) -> None:
    for length in (12 * MIB, 7 * MIB + MIB // 2):
        with pytest.raises(ConfigError, match=r"does not fit into 8 MiB; give it a larger --size"):
            made(member("big", data=b"x" * length), size=8 * MIB)
    with pytest.raises(ConfigError, match=r"does not fit into 8 MiB; give it a larger --size"):
        made(*(member(str(number), data=b"x" * 900) for number in range(8000)), size=8 * MIB)


def test_many_small_files_fit(made, tmp_path: Path) -> None:
    image = made(*(member(f"d/{number}") for number in range(5000)), size=32 * MIB)
    check(image)
    free = re.search(rb"Free inodes: +(\d+)", debugfs(image, "stats"))
    assert int(free[1]) > 2000  # a guest adds files of its own
    tree = tree_of(tmp_path, member("x", data=b"x" * MIB))
    assert disk.size_for(tree) == 1024 * MIB


def test_nothing_of_it_is_ever_unpacked_here(made, tmp_path: Path) -> None:
    made(member("caps", data=b"1", xattrs={"user.x": b"1"}), member("etc/shadow", mode=0o4777))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"image.tar", "contents", "disk.ext4"}


def test_lost_found_is_a_directory(made) -> None:
    check(made(directory("lost+found", mode=0o1777, uid=5)))
    for other in (member("lost+found"), symlink("lost+found", "/etc")):
        with pytest.raises(ConfigError, match="is not a directory"):
            made(other)


def test_an_empty_access_list_is_none(made) -> None:
    image = made(member("f", xattrs={"system.posix_acl_access": b"", "user.a": b""}))
    check(image)
    assert b"acl" not in debugfs(image, "ea_list /f") and b"user.a" in debugfs(image, "ea_list /f")
