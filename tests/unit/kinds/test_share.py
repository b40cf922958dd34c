"""``--share``: what it takes, one line for each thing that it refuses, and virtiofsd itself with a
driver in front that speaks FUSE."""

from __future__ import annotations

import base64
import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import traceback
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from socket import socketpair
from threading import Event

import pytest
from front_end_rig import restored, saved_of, until

from pyvmm import images
from pyvmm.emulated_host.qemu import _folder_arguments
from pyvmm.errors import ConfigError
from pyvmm.host import virtiofsd
from pyvmm.images import programs
from pyvmm.kinds import registry
from pyvmm.kinds.border import Border
from pyvmm.kinds.interface import Context
from pyvmm.kinds.share import Spec
from pyvmm.spec.record import with_defaults
from pyvmm.spec.vm import INTERNAL
from pyvmm.testing.attached import attached
from pyvmm.virtio.vhost_user import device


def check(*texts):
    return registry.check("share", [registry.parse("share", text) for text in texts], None)


# --- what can be said -----------------------------------------------------------------------------


def test_all_that_can_be_said(tmp_path):
    odd = tmp_path / "a:b,c"
    odd.mkdir()
    text = str(odd).replace(",", ",,")
    [spec] = check(f"{text}:/mnt/x,readonly,tag=src")
    assert spec == Spec(str(odd), "/mnt/x", True, "src")
    assert not spec.keeps and replace(spec, read_only=False).keeps
    assert check(text)[0].path == str(odd)
    place = base64.b64encode(b"/mnt/x").decode()
    assert spec.kernel_parameters == (f"pyvmm.share=src:ro:{place}",)
    assert check(str(tmp_path))[0].kernel_parameters == ()


def test_tags_are_made_up_and_never_twice(tmp_path):
    texts = [str(tmp_path), f"{tmp_path},tag=share0", str(tmp_path)]
    assert [spec.tag for spec in check(*texts)] == ["share1", "share0", "share2"]


def test_a_file_says_the_same(tmp_path):
    table = {"path": str(tmp_path), "mountpoint": "/mnt", "read_only": True}
    assert registry.read("share", table) == [Spec(str(tmp_path), "/mnt", True)]
    assert registry.plain("share", [Spec(str(tmp_path), "/mnt", True)]) == [table]
    assert registry.with_paths(Spec("src"), lambda path: f"/there/{path}").path == "/there/src"
    # Nothing is named, and nothing is what it stays.
    assert registry.with_paths(Spec(""), lambda path: f"/there/{path}").path == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no directory is named; use DIR"),
        ("/nowhere", "there is no /nowhere; check the path"),
        ("/usr:mnt", "'mnt' is no absolute path to mount /usr at; use one, as /mnt"),
        ("FILE", "is not a directory; share the directory that it is in"),
        ("/", "all of this machine's files would be the guest's to change; add ,readonly"),
        ("/tmp/..", "add ,readonly"),
        ("DIR,color=red", "unknown option 'color=red'"),
        ("DIR,readonly=1", "unknown option 'readonly=1'"),
        ("DIR,tag=", "unknown option 'tag='"),
        ("DIR,tag=a b", "'a b' is not a tag"),
        ("DIR,tag=ä", "is not a tag"),
        ("DIR,tag=" + 37 * "x", "is not a tag"),
        ("DIR:/", "not a place to mount it at"),
        ("DIR:/mnt/../etc", "not a place to mount it at"),
        ("DIR:/mnt/", "not a place to mount it at"),
        ("DIR://mnt", "not a place to mount it at"),
        ("DIR:/mnt/\udcff", "is not UTF-8"),
        ("DIR:/" + 260 * "x", "at most 255 bytes"),
        ("DIR:/run/x", "init mounts over /run/x; use another place"),
        ("DIR:/tmp", "init mounts over /tmp"),
    ],
)
def test_what_it_refuses(tmp_path, text, why):
    (tmp_path / "file").write_bytes(b"")
    text = text.replace("FILE", str(tmp_path / "file")).replace("DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="--share") as caught:
        check(text)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_two_that_collide(tmp_path):
    with pytest.raises(ConfigError, match="two shares with the tag x"):
        check(f"{tmp_path},tag=x", f"{tmp_path},tag=x")
    with pytest.raises(ConfigError, match="two shares at /mnt"):
        check(f"{tmp_path}:/mnt", f"{tmp_path}:/mnt")


def test_a_directory_that_is_somebody_elses(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="is not yours to read"):
        check(str(tmp_path))


def test_all_of_the_machine_may_be_read():
    assert check("/,readonly")[0].read_only


def test_what_an_emulated_host_gets(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "virtiofsd_command", lambda make, machine="": ["virtiofsd"])
    border = Border(None, lambda path, flag: path)  # type: ignore[arg-type]
    odd = tmp_path / "a,b"
    odd.mkdir()
    (tmp_path / "link").symlink_to(odd)
    crossing = registry.cross(Spec(str(tmp_path / "link"), "/mnt", True, "t"), border)
    assert crossing.spec.path == "/run/pyvmm-share-0"
    [folder] = crossing.folders
    assert (folder.tag, folder.path, folder.read_only) == ("pyvmm-share-0", str(odd), True)
    arguments = _folder_arguments(crossing.folders)
    assert f"path={str(odd).replace(',', ',,')},security_model=none,readonly=on" in arguments[1]


def test_a_machine_of_another_architecture_has_a_virtiofsd_of_its_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(images, "folders", lambda names, make: asked.append(names) or ["/image"])
    border = Border(None, lambda path, flag: path, machine="aarch64")  # type: ignore[arg-type]
    crossing = registry.cross(Spec(str(tmp_path), "/mnt", True, "t"), border)
    assert crossing.spec.path == "/run/pyvmm-share-0"
    assert asked == [["programs-virtiofsd-arm64"]]
    assert images.virtiofsd_command(True, "aarch64") == [
        "/image/root/usr/lib/ld-linux-aarch64.so.1",
        *("--library-path", "/image/root/usr/lib/aarch64-linux-gnu"),
        *("--argv0", "virtiofsd", "/image/root/usr/libexec/virtiofsd"),
    ]
    # One that runs sees this machine's files below a folder, for its own programs are in /usr.
    border = Border(None, lambda path, flag: path, runs=True, machine="aarch64")  # type: ignore[arg-type]
    crossing = registry.cross(Spec(str(tmp_path), "/mnt", True, "t"), border)
    there = "/run/machine" if os.uname().machine != "aarch64" else ""
    assert crossing.spec.path == f"{there}{tmp_path}"
    with pytest.raises(ConfigError, match="no virtiofsd for the architecture vax"):
        images.virtiofsd_command(True, "vax")


# --- virtiofsd ------------------------------------------------------------------------------------

# <linux/fuse.h>: opcodes, and struct fuse_in_header, fuse_init_in, fuse_entry_out, …
LOOKUP, FORGET, GETATTR, READLINK, SYMLINK, MKNOD, MKDIR, UNLINK = 1, 2, 3, 5, 6, 8, 9, 10
OPEN, READ, WRITE, INIT, CREATE = 14, 15, 16, 26, 35
ROOT = 1
ENOENT, EACCES, EPERM, EROFS, ENOSPC, EIO = 2, 13, 1, 30, 28, 5


class Fuse:
    """A guest's file system client, as far as it goes."""

    def __init__(self, driver):
        self.driver = driver
        self.unique = 0
        self.user = os.getuid(), os.getgid()  # who asks, in the guest
        self.ask(INIT, 0, struct.pack("<IIIIII40x", 7, 36, 0, 0, 0, 0), room=64)

    def ask(self, opcode, node, body=b"", room=4096, queue=1):
        """A request's error, and the body of the answer."""
        self.unique += 1
        size = 40 + len(body)
        head = struct.pack("<IIQQIIIHH", size, opcode, self.unique, node, *self.user, 1, 0, 0)
        answer = self.driver.request([head + body], [16, room], queue=queue).data
        length, error, unique = struct.unpack("<IiQ", answer[:16])
        assert (length, unique) == (len(answer), self.unique)
        return -error, answer[16:]

    def lookup(self, name, node=ROOT):
        """Error, number of the node, its mode and owner."""
        error, body = self.ask(LOOKUP, node, name + b"\0")
        if error:
            return error, 0, 0, 0
        mode, _, uid = struct.unpack("<III", body[40 + 60 : 40 + 72])
        return 0, struct.unpack("<Q", body[:8])[0], mode, uid

    def read(self, name):
        error, node, _, _ = self.lookup(name)
        if error:
            return error
        error, body = self.ask(OPEN, node, struct.pack("<II", os.O_RDONLY, 0))
        if error:
            return error
        [handle] = struct.unpack("<Q", body[:8])
        error, data = self.ask(READ, node, struct.pack("<QQIIQII", handle, 0, 4096, 0, 0, 0, 0))
        return error or data

    def create(self, name, data):
        body = struct.pack("<IIII", os.O_RDWR | os.O_CREAT, 0o100644, 0, 0) + name + b"\0"
        error, body = self.ask(CREATE, ROOT, body)
        if error:
            return error
        [node] = struct.unpack("<Q", body[:8])
        [handle] = struct.unpack("<Q", body[128:136])
        head = struct.pack("<QQIIQII", handle, 0, len(data), 0, 0, 0, 0)
        error, _ = self.ask(WRITE, node, head + data)
        return error


def needs_virtiofsd():
    try:
        images.virtiofsd_command()
    except ConfigError as error:
        pytest.skip(str(error))


@contextmanager
def shared(text):
    """The device of ``--share TEXT`` with a client, and virtiofsd's process."""
    needs_virtiofsd()
    [spec] = check(text)
    with served(spec) as found:
        yield found


@contextmanager
def served(spec):
    with ExitStack() as closing:
        device = registry.open_device(spec, Context("vm", None, closing))
        [server] = children()
        with attached(device, irqfd=True, queue_sizes=[64, 64]) as driver:
            yield Fuse(driver), driver, server


def children():
    """The processes called virtiofsd that this one has started; its own child, if any, too."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "stat").read_text().rpartition(")")[2].split()
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if int(words[1]) == os.getpid() and b"--shared-dir=" in line:
            found.append(int(entry.name))
    return found


@pytest.fixture
def folder(tmp_path):
    """With a file, one that is not UTF-8, a link out of it, a hard link, a socket and a FIFO."""
    place = tmp_path / "shared"
    place.mkdir()
    (tmp_path / "secret").write_text("out of reach")
    (place / "file").write_text("hello")
    os.link(place / "file", place / "twin")
    Path(os.fsdecode(os.fsencode(place) + b"/\xff\xfe")).write_text("bytes")
    (place / "out").symlink_to(tmp_path / "secret")
    os.mkfifo(place / "fifo")
    return place


def test_a_guest_reads_and_writes(folder):
    with shared(str(folder)) as (fuse, driver, server):
        assert driver.config(0, 40) == b"share0".ljust(36, b"\0") + struct.pack("<I", 1)
        assert fuse.read(b"file") == b"hello"
        assert fuse.read(b"\xff\xfe") == b"bytes"
        assert fuse.lookup(b"nothing")[0] == ENOENT
        assert fuse.create(b"new", b"from the guest") == 0
        assert (folder / "new").read_text() == "from the guest"
        assert fuse.lookup(b"file")[1] == fuse.lookup(b"twin")[1]  # one file
        assert stat.S_ISFIFO(fuse.lookup(b"fifo")[2])
        _, node, mode, _ = fuse.lookup(b"out")
        assert stat.S_ISLNK(mode)  # for the guest to follow, in its own files
        assert fuse.ask(READLINK, node)[1] == str(folder.parent / "secret").encode()
    assert children() == []
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


def test_a_guest_that_boots_again_has_it_again(folder):
    """It did not unmount, and its kernel knows nothing of what was open."""
    with shared(str(folder)) as (fuse, driver, _):
        assert fuse.read(b"file") == b"hello"
        driver.mmio.start(queue_sizes=[64, 64])
        assert Fuse(driver).read(b"file") == b"hello"
        assert not driver.needs_reset and not driver.log


def test_nothing_above_it_is_there(folder):
    with shared(str(folder)) as (fuse, _, _):
        assert fuse.lookup(b"..")[0] != 0 or fuse.lookup(b"..")[1] in (0, ROOT)
        assert fuse.lookup(b"../secret")[0] != 0
        assert fuse.lookup(b"/etc/passwd")[0] != 0


def test_a_device_node_is_not_made(folder):
    with shared(str(folder)) as (fuse, _, _):
        body = struct.pack("<IIII", stat.S_IFCHR | 0o666, os.makedev(1, 1), 0, 0) + b"mem\0"
        assert fuse.ask(MKNOD, ROOT, body)[0] == EPERM
    assert not (folder / "mem").exists()


def test_read_only_means_that(folder):
    with shared(f"{folder},readonly") as (fuse, _, _):
        assert fuse.read(b"file") == b"hello"
        assert fuse.create(b"new", b"x") == EROFS
        assert fuse.ask(UNLINK, ROOT, b"file\0")[0] == EROFS
    assert sorted(os.listdir(os.fsencode(folder))) == [
        b"fifo",
        b"file",
        b"out",
        b"twin",
        b"\xff\xfe",
    ]


def test_a_directory_that_vanishes(folder):
    """The guest's requests fail; the VM goes on."""
    with shared(str(folder)) as (fuse, driver, _):
        assert fuse.read(b"file") == b"hello"
        subprocess.run(["rm", "-r", str(folder)], check=True)
        assert fuse.lookup(b"other")[0] == ENOENT
        assert fuse.create(b"new", b"x") == ENOENT
        assert not driver.needs_reset


def test_all_of_the_machine_is_served():
    """/ cannot be exchanged for itself (pivot_root(2)): it is served from another place."""
    with shared("/,readonly") as (fuse, _, _):
        assert fuse.lookup(b"etc")[0] == 0 and fuse.lookup(b"..")[1] in (0, ROOT)
        assert fuse.lookup(b"proc")[1] != fuse.lookup(b"sys")[1]
        assert fuse.create(b"new", b"x") == EROFS
    assert children() == []
    with open("/proc/self/mounts") as mounts:
        assert [line.split()[1] for line in mounts].count("/sys") <= 1  # here nothing is new


def test_an_overlay_gets_what_is_mounted_in_its_root(folder):
    """Linux's overlay shows nothing where a mountpoint is announced."""
    needs_virtiofsd()
    seen = []
    usual = Spec(str(folder), tag="t")
    for spec in (replace(usual, read_only=True, is_root=True), usual):
        with served(spec) as (_, _, server):
            seen.append(Path(f"/proc/{server}/cmdline").read_bytes())
    assert [b"--no-announce-submounts" in line for line in seen] == [True, False]


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("exec sleep 1000", r"virtiofsd has not answered GET_FEATURES in 0\.2 s"),
        ("exit 1", "virtiofsd has gone (at|before) GET_FEATURES"),
        ("echo 'no such file' >&2; exit 1", "no such file"),
    ],
)
def test_a_virtiofsd_that_serves_nothing_is_told_with_what_it_did(
    does: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "STARTING", 0.2 if "sleep" in does else 60)
    monkeypatch.setattr(virtiofsd, "_PATIENCE", 0.1 if "sleep" in does else 60)
    command = ["sh", "-c", does, "virtiofsd"]
    monkeypatch.setattr(images, "virtiofsd_command", lambda make=False: command)
    with ExitStack() as closing, pytest.raises(ConfigError, match=f"cannot be shared: {said}"):
        registry.open_device(Spec(str(tmp_path), tag="t"), Context("vm", None, closing))


SHARES = """
import ctypes, os, sys
from pyvmm.errors import ConfigError
from pyvmm.host import apart, box, passt, virtiofsd
{before}
try:
    virtiofsd.serve(["false"], "/srv", read_only=True)
except ConfigError as error:
    print(error)
"""
ROOT_IN_A_CONTAINER = "box.drop_capabilities(frozenset((21,)))  # CAP_SYS_ADMIN"
NO_USER_NAMESPACES = """
if not os.getuid():
    os.setresuid(61000, 61000, 61000)
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE, or /proc/self would be root's
user = os.getuid()
if ctypes.CDLL(None).unshare(0x10000000):  # CLONE_NEWUSER
    sys.exit("none at all")
open("/proc/self/uid_map", "w").write(f"{user} {user} 1")
open("/proc/sys/user/max_user_namespaces", "w").write("0")
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (
            ROOT_IN_A_CONTAINER,
            "and root without CAP_SYS_ADMIN has none; start pyvmm with that capability",
        ),
        (
            NO_USER_NAMESPACES,
            "and this place may have no user namespaces; raise user.max_user_namespaces",
        ),
    ],
)
def test_a_place_without_namespaces_shares_nothing_and_says_so(before: str, said: str) -> None:
    if os.getuid() and before == ROOT_IN_A_CONTAINER:
        pytest.skip("root alone has capabilities to lose")
    done = subprocess.run(
        [sys.executable, "-c", SHARES.format(before=before)], capture_output=True, text=True
    )
    if "none at all" in done.stderr:
        pytest.skip("this machine lets ordinary users have no namespaces")
    assert done.stdout == f"/srv cannot be shared: virtiofsd needs namespaces, {said}\n", done


@pytest.fixture
def as_user(monkeypatch):
    """A function that has another user call one, in a process of its own, and asserts that it
    returns."""
    if os.getuid():
        pytest.skip("only root can be another user; as an ordinary one the other tests run")
    needs_virtiofsd()
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        [source] = images.folders(["programs-virtiofsd"], make=False)
        copied = shutil.copytree(source, os.path.join(place, "program"), symlinks=True)
        os.chmod(copied, 0o755)
        command = programs.command(copied, "usr/libexec/virtiofsd", "virtiofsd")
        monkeypatch.setattr(images, "virtiofsd_command", lambda make=False, machine="": command)
        folder = Path(place, "folder")
        folder.mkdir()
        os.chown(folder, USER, USER)
        (folder / "strangers").write_text("for all to read")

        def call(function):
            child = os.fork()
            if not child:
                code = 1
                try:
                    os.setgroups([])
                    os.setgid(USER)
                    os.setuid(USER)
                    function(folder)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

        yield call


USER = 4711
EINVAL = 22


def test_an_ordinary_user_is_root_in_the_guest(as_user):
    def use(folder):
        [spec] = check(str(folder))
        with served(spec) as (fuse, _, _):
            fuse.user = (0, 0)
            assert fuse.create(b"new", b"x") == 0
            assert fuse.lookup(b"new")[3] == 0 and os.stat(folder / "new").st_uid == USER
            fuse.user = (33, 33)
            assert fuse.create(b"other", b"x") == EINVAL

    as_user(use)


def test_an_ordinary_user_is_the_same_in_a_guest_on_his_files(as_user):
    def use(folder):
        with served(Spec(str(folder), "/mnt", tag="t", is_part=True)) as (fuse, _, _):
            fuse.user = (USER, USER)
            assert fuse.create(b"new", b"x") == 0
            assert fuse.lookup(b"new")[3] == USER == os.stat(folder / "new").st_uid
            assert fuse.lookup(b"strangers")[3] == 0
            fuse.user = (0, 0)
            assert fuse.create(b"other", b"x") == EINVAL

    as_user(use)


# --- in a snapshot --------------------------------------------------------------------------------


def test_what_a_state_can_say_of_it():
    """Who owns files in there, as the guest goes on; nothing of this machine's that is not a
    directory to share."""
    said = Spec("/x", tag="t", ninep="other", saved="/etc/shadow", is_root=True, is_part=True)
    assert with_defaults(said, INTERNAL) == Spec("/x", tag="t", is_root=True, is_part=True)


def opened(fuse, name, node=ROOT):
    """The numbers of a file's node and of its handle."""
    error, node, _, _ = fuse.lookup(name, node)
    assert not error
    error, body = fuse.ask(OPEN, node, struct.pack("<II", os.O_RDWR, 0))
    assert not error
    return node, struct.unpack("<Q", body[:8])[0]


def read(fuse, node, handle):
    error, data = fuse.ask(READ, node, struct.pack("<QQIIQII", handle, 0, 4096, 0, 0, 0, 0))
    return error or data


@contextmanager
def goes_on(driver, spec, state, known, place):
    """With another virtiofsd, which is told what is `known` by way of the file `place`."""
    place.write_bytes(known)
    with ExitStack() as closing:
        with_state = registry.with_contents(spec, str(place))
        device = registry.open_device(with_state, Context("vm", None, closing))
        with restored(driver, device, state):
            yield device


def saved(driver):
    """Its state, and what virtiofsd has told."""
    state = saved_of(driver)
    size, pieces = registry.contents_of(Spec("."), driver.transport.device)
    known = b"".join(bytes(piece) for _, piece in pieces)
    assert len(known) == size > 0
    return state, known


def use_in_a_snapshot(folder):
    names = (b"kept", b"renamed", b"deleted", b"replaced")
    for name in names:
        (folder / name.decode()).write_bytes(name)
    (folder / "deep").mkdir()
    (folder / "deep" / "er").write_text("deeper")
    place = folder.parent / "known"
    [spec] = check(str(folder))
    with served(spec) as (fuse, driver, _):
        fuse.user = (0, 0)
        files = {name: opened(fuse, name) for name in names}
        _, deep, _, _ = fuse.lookup(b"deep")
        files[b"er"] = opened(fuse, b"er", deep)
        state, known = saved(driver)
        driver.transport.close()
        (folder / "renamed").rename(folder / "elsewhere")
        (folder / "deleted").unlink()
        (folder / "other").write_text("another file")
        (folder / "other").rename(folder / "replaced")
        with goes_on(driver, spec, state, known, place):
            seen = {name: read(fuse, *numbers) for name, numbers in files.items()}
            lost = dict.fromkeys((b"renamed", b"deleted", b"replaced"), EIO)
            assert seen == {b"kept": b"kept", b"er": b"deeper", **lost}
            # The numbers are those that the guest's kernel knows, and new ones are others.
            assert fuse.lookup(b"kept")[1] == files[b"kept"][0]
            assert fuse.lookup(b"er", deep)[1] == files[b"er"][0]
            assert fuse.lookup(b"elsewhere")[1] not in [node for node, _ in files.values()]
            assert (
                fuse.read(b"replaced") == b"another file" and fuse.read(b"elsewhere") == b"renamed"
            )
            assert fuse.lookup(b"deleted")[0] == ENOENT and fuse.create(b"new", b"x") == 0
            assert not driver.needs_reset and not driver.log
            state, known = saved(driver)
        with goes_on(driver, spec, state, known, place):
            assert read(fuse, *files[b"kept"]) == b"kept" and fuse.read(b"new") == b"x"
            assert read(fuse, *files[b"deleted"]) == EIO


def test_what_a_guest_has_open_goes_along(folder):
    """If it is still there; a file in its place is none that the guest has opened."""
    needs_virtiofsd()
    use_in_a_snapshot(folder)


def test_what_an_ordinary_users_guest_has_open_goes_along(as_user):
    def use(folder):
        os.umask(0o077)
        inner = folder / "own"
        inner.mkdir()
        use_in_a_snapshot(inner)

    as_user(use)


def test_where_files_have_no_handles_their_names_count(folder, monkeypatch):
    needs_virtiofsd()
    monkeypatch.setattr(virtiofsd, "_has_handles", lambda folder: False)
    [spec] = check(str(folder))
    with served(spec) as (fuse, driver, _):
        file = opened(fuse, b"file")
        state, known = saved(driver)
        driver.transport.close()
        (folder / "other").write_text("another file")
        (folder / "other").rename(folder / "file")
        with goes_on(driver, spec, state, known, folder.parent / "known"):
            assert read(fuse, *file) == b"another file"


@pytest.mark.parametrize("what", ["nothing", "short", "numbers", "noise", "directory"])
def test_a_state_that_cannot_be(folder, what):
    needs_virtiofsd()
    [spec] = check(str(folder))
    with served(spec) as (fuse, driver, _):
        opened(fuse, b"file")
        state, known = saved(driver)
        driver.transport.close()
        changed = {
            "nothing": b"",
            "short": known[:-3],
            "numbers": known[:9] + b"\xff" * 40 + known[9:],
            "noise": bytes(range(256)) * 300,
        }
        if what == "directory":  # another one by that name
            folder.rename(folder.parent / "former")
            folder.mkdir()
        why = r"the saved state of share-share0.*: the back end at .*/shared does not take it"
        known = changed.get(what, known)
        with (
            pytest.raises(ConfigError, match=why) as caught,
            goes_on(driver, spec, state, known, folder.parent / "known"),
        ):
            pass
    assert "\n" not in str(caught.value) and children() == []


def test_a_state_that_is_not_there(folder):
    [spec] = check(str(folder))
    spec = registry.with_contents(spec, "/nowhere/known")
    with ExitStack() as closing, pytest.raises(ConfigError, match="/nowhere/known cannot be read"):
        registry.open_device(spec, Context("vm", None, closing))
    assert children() == []


def test_a_full_file_system(folder):
    tmpfs = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    done = subprocess.run(tmpfs, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr}")
    try:
        with shared(str(folder)) as (fuse, driver, _):
            assert fuse.create(b"large", bytes(3 * 4096)) == ENOSPC
            assert fuse.create(b"small", b"x") in (0, ENOSPC)
            assert fuse.lookup(b"large")[0] == 0 and not driver.needs_reset
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_virtiofsd_that_is_killed(folder, capfd):
    """The guest is told that the file system is gone, at once and from then on."""
    with shared(str(folder)) as (fuse, driver, server):
        assert driver.device.stats()["served_by"] == "virtiofsd"
        os.killpg(server, 9)  # it forks for its namespaces
        for _ in range(3):
            assert fuse.lookup(b"file")[0] == 107
        assert not driver.needs_reset
        until(lambda: not driver.device.stats()["connected"])
        said = []
        until(lambda: said.append(capfd.readouterr().err) or "is served no more" in "".join(said))
    assert f"{folder} is served no more" in "".join(said)


def test_it_goes_with_whoever_started_it(folder):
    """By SIGKILL, that is with nobody left to end it."""
    needs_virtiofsd()
    code = (
        "import sys, time\n"
        "from pyvmm import images\n"
        "from pyvmm.host.virtiofsd import Virtiofsd\n"
        "one = Virtiofsd(images.virtiofsd_command(), sys.argv[1], read_only=False)\n"
        "print(one._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    server = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    until(lambda: not _serves(server))


def _serves(pid):
    """True if it is there, and no corpse."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_virtiofsd_that_ends_as_its_connection_is_closed_is_not_told_of(capfd):
    """It may be gone before we come to look for its end."""
    says, writes = os.pipe()
    gone = Event()
    ours, its = socketpair()
    served = virtiofsd.Served("/shared", ours, says, gone.set)
    ours.close()
    its.close()
    os.close(writes)
    gone.wait()
    served.close()
    os.close(says)
    assert "is served no more" not in capfd.readouterr().err
