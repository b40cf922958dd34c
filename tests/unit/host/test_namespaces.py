"""A root and namespaces of its own: of an ordinary user, of root, and where the kernel refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from c_claims import assert_in_c, needs_headers

from pyvmm.host import box, namespaces

ROOT = Path(__file__).resolve().parents[3]
SAFETY_TIMEOUT = 60
ORDINARY = 61001

# Enters the first layers, with PATH in sys.argv[1] left to be read; says what is there then.
SCRIPT = """
import os, socket, sys, threading
from pyvmm.host import box, namespaces
from pyvmm.host import confinement as c
from pyvmm.host.outside import Outside

def tried(what):
    try:
        return what()
    except OSError as error:
        return type(error).__name__

def see():
    print(tried(lambda: open("/etc/passwd").read(1) and "read"), end=" ")

named = sys.argv[1]
user = os.getuid(), os.getgid()
{before}
box.begin()
assert (os.getuid(), os.getgid()) == user
outside = Outside(box.stay_outside)
found = box.enter(box.Needs(read=(named, named + "/data", "/missing/for/ever")))
print(*(f"{{layer}}: {{reason}}" for layer, reason in found.off), sep="; ")
see()
outside.run(see)
print(tried(lambda: open(named + "/data").read()), end=" ")
print(tried(lambda: open(named + "/data", "a") and "written"), end=" ")
print(tried(lambda: open("/dev/null", "w").write("x")), end=" ")
print(len(os.listdir("/proc/self/task")) > 0, os.getcwd() == {cwd!r}, end=" ")
print(outside.run(c.capabilities)[:2] == (0, 0), end=" ")
thread = threading.Thread(target=see)  # as of a device
thread.start()
thread.join()
print(len(socket.if_nameindex()))
"""
INSIDE = "FileNotFoundError read x OSError 1 True True True FileNotFoundError 1"
INSIDE_OF_ROOT = INSIDE.replace("True True True", "True True False")
NO_CHANGE = "read read x written 1 True True"


def python() -> str:
    """A Python that any user can run pyvmm's modules with."""
    version = f"python3.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        command = [candidate, "-c", "import pyvmm.host.box"]
        try:
            if not subprocess.run(command, env=environment(), user=ORDINARY).returncode:
                return candidate
        except OSError:
            continue
    pytest.skip("no Python here can be used by all users")


def environment() -> dict[str, str]:
    paths = sysconfig.get_paths()
    places = (str(ROOT), paths["purelib"], paths["platlib"])
    return {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(places), "LANG": "C.UTF-8"}


def enter(folder: Path, *, ordinary: bool = False, before: str = "") -> list[str]:
    """What the script says. Its layers are the first ones, and no more."""
    folder.chmod(0o755)
    named = folder / "named"
    named.mkdir()
    (named / "data").write_text("x")
    if ordinary:
        if os.geteuid():
            command, user = [sys.executable], {}
        else:
            command, user = [python()], {"user": ORDINARY, "group": ORDINARY}
            for path in (named, named / "data"):
                os.chown(path, ORDINARY, ORDINARY)
    else:
        command, user = [sys.executable], {}
    script = SCRIPT.format(before=f"box.LAYERS = box._FIRST\n{before}", cwd=str(ROOT))
    done = subprocess.run(
        [*command, "-c", script, str(named)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SAFETY_TIMEOUT,
        **user,  # type: ignore[arg-type]
    )
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    return [first, *(line.strip() for line in others)]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users can reach."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def needs_root() -> None:
    if os.geteuid():
        pytest.skip("needs root")


def can_have_namespaces() -> None:
    off = dict(box.probe().off)
    if missing := {layer: off[layer] for layer in box._FIRST if layer in off}:
        pytest.skip(f"this machine lets us have no namespaces: {missing}")


def test_an_ordinary_user_is_in_a_root_with_nothing_but_what_is_named(folder: Path) -> None:
    can_have_namespaces()
    said = enter(folder, ordinary=True)
    if said[0]:
        pytest.skip(f"this machine lets ordinary users have no namespaces: {said[0]}")
    assert said[1:] == [INSIDE]


def test_an_ordinary_user_s_threads_make_way_and_come_back(folder: Path) -> None:
    can_have_namespaces()
    said = enter(
        folder,
        ordinary=True,
        before="""
import atexit
from pyvmm.host.pausing import Watcher
reads, writes = os.pipe()
heard = threading.Event()
Watcher(reads, "one", lambda: bool(os.read(reads, 1)) and (heard.set() or True))
atexit.register(lambda: (os.write(writes, b"x"), print("heard", heard.wait(60))))
""",
    )
    if "Operation not permitted" in said[0]:
        pytest.skip(f"this machine lets ordinary users have no namespaces: {said[0]}")
    assert said == ["", INSIDE, "heard True"]


NO_MORE = """
import ctypes
if ctypes.CDLL(None).unshare(0x10000000):  # CLONE_NEWUSER
    print("none at all")
    sys.exit()
for name, text in (("setgroups", "deny"), ("uid_map", f"{user[0]} {user[0]} 1"),
                   ("gid_map", f"{user[1]} {user[1]} 1")):
    open(f"/proc/self/{name}", "w").write(text)
open("/proc/sys/user/max_user_namespaces", "w").write("0")
# _LINUX_CAPABILITY_VERSION_3, and no capability
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, none) == 0
"""


def test_a_place_that_may_have_no_user_namespaces_is_told_of(folder: Path) -> None:
    """As who runs containers may set it."""
    can_have_namespaces()
    first, *_ = enter(folder, ordinary=True, before=NO_MORE)
    if first == "none at all":
        pytest.skip("this machine lets ordinary users have no namespaces")
    why = "this place may have no user namespaces (user.max_user_namespaces)"
    assert first == "; ".join(f"{layer}: {why}" for layer in box._FIRST)


def test_root_is_there_without_a_user_namespace(folder: Path) -> None:
    needs_root()
    can_have_namespaces()
    first, line = enter(folder)
    # Root's threads outside keep what they need for networks that come later.
    assert (first, line) == ("", INSIDE_OF_ROOT)


@pytest.mark.parametrize("ordinary", [False, True])
def test_a_file_has_the_name_in_it_by_which_it_was_opened(folder: Path, ordinary: bool) -> None:
    """By links, out of another folder that is there, by "..", and as an open file."""
    can_have_namespaces()
    for name in ("there/below", "tree", "link"):
        (folder / name).mkdir(parents=True)
    (folder / "there/file").write_text("by ..;")
    (folder / "file").write_text("another;")
    (folder / "there/below/out").write_text("out;")
    (folder / "open").write_text("open;")
    (folder / "tree/leads").symlink_to(folder / "there/below")
    (folder / "link/far").symlink_to(folder / "there/below")
    names = (f"{folder}/link/far/../file", f"{folder}/tree/leads/out", "/dev/fd/{0}", "/dev/null")
    said = enter(
        folder,
        ordinary=ordinary,
        before=f"""
import atexit
fd = os.open({str(folder / "open")!r}, os.O_RDONLY)
paths = [name.format(fd) for name in {names!r}]
usual = box._paths
box._paths = lambda needs: ((*usual(needs)[0], {str(folder / "tree")!r}, *paths), usual(needs)[1])
atexit.register(lambda: print(*(open(path).read() for path in paths)))
""",
    )
    if "Operation not permitted" in said[0]:
        pytest.skip(f"this machine lets ordinary users have no namespaces: {said[0]}")
    assert said[0] == "" and said[-1].split() == ["by", "..;", "out;", "open;"]
    assert len(said) == 3 and said[1] == (INSIDE if ordinary else INSIDE_OF_ROOT)


def test_an_ordinary_user_s_own_threads_are_named_as_the_reason(folder: Path) -> None:
    can_have_namespaces()
    first, line = enter(
        folder,
        ordinary=True,
        before="threading.Thread(target=threading.Event().wait, daemon=True).start()",
    )
    if "Operation not permitted" in first:
        pytest.skip(f"this machine lets ordinary users have no namespaces: {first}")
    reason = "threads run already, as of a device of yours"
    assert first == "; ".join(f"{layer}: {reason}" for layer in box._FIRST)
    assert line.startswith(NO_CHANGE)


def test_where_proc_is_read_only_a_user_stays_who_he_is() -> None:
    needs_root()
    can_have_namespaces()
    script = f"""
import os
from pyvmm.errors import ConfigError
from pyvmm.host import confinement, namespaces
namespaces._unshare(namespaces.CLONE_NEWNS)
namespaces._be_private()
MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
namespaces._mount(b"none", b"/proc", MS_RDONLY | MS_REMOUNT | MS_BIND)
os.setgid({ORDINARY})
os.setuid({ORDINARY})
PR_SET_DUMPABLE = 4
confinement.prctl(PR_SET_DUMPABLE, 1)
try:
    namespaces.for_all()
except ConfigError as error:
    print(error.message)
print(os.getuid(), os.getgid())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=SAFETY_TIMEOUT
    )
    said = f"/proc/self/uid_map: Read-only file system\n{ORDINARY} {ORDINARY}\n"
    assert (done.stdout, done.returncode) == (said, 0), done.stderr


def test_two_files_of_one_name_are_told(folder: Path) -> None:
    can_have_namespaces()
    (folder / "there/below").mkdir(parents=True)
    (folder / "far").symlink_to(folder / "there/below")
    (folder / "there/file").touch()
    (folder / "file").touch()
    two = f"{folder}/far/../file", f"{folder}/file"
    first, line = enter(
        folder,
        before=f"""
usual = box._paths
box._paths = lambda needs: ((*usual(needs)[0], *{two!r}), usual(needs)[1])
""",
    )
    assert first == f"root: {two[1]} and {two[0]} have one name in it"
    assert line.startswith("read read x written")


def test_where_the_root_cannot_be_replaced_it_is_covered(folder: Path) -> None:
    """pivot_root(2) fails on an initial RAM disk: here a filter says what it says there."""
    needs_root()
    can_have_namespaces()
    first, line = enter(
        folder,
        before=f"""
refuse = c.deny_list([{namespaces._PIVOT_ROOT}], {{}})
EINVAL = 22
c.install([(*a, b & ~0xFFFF | EINVAL) if b == c._REFUSE[3] else (*a, b) for *a, b in refuse], 0)
""",
    )
    assert (first, line) == ("", INSIDE_OF_ROOT)


def test_in_a_chroot_all_is_as_before_and_it_is_said(folder: Path) -> None:
    needs_root()
    can_have_namespaces()
    other = folder / "other"
    other.mkdir()
    first, line = enter(
        folder,
        before=f"""
namespaces._unshare(namespaces.CLONE_NEWNS)
namespaces._be_private()
for name in os.listdir("/"):
    source, target = "/" + name, {str(other)!r} + "/" + name
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
    elif os.path.isdir(source):
        os.mkdir(target)
        MS_BIND = 0x1000
        namespaces._mount(source.encode(), target.encode(), MS_BIND | namespaces._MS_REC)
os.chroot({str(other)!r})
os.chdir({str(ROOT)!r})
""",
    )
    assert first == "root: the root folder is no mount point here (chroot)"
    assert line.startswith(NO_CHANGE)


@pytest.mark.parametrize("ordinary", [False, True])
def test_where_the_kernel_refuses_all_is_as_before_and_it_is_said(
    folder: Path, ordinary: bool
) -> None:
    refuse = "c.no_new_privileges(); c.install(c.deny_list([{}], {{}}), 0)"
    first, line = enter(folder, ordinary=ordinary, before=refuse.format(namespaces._UNSHARE))
    reason = "this kernel cannot confine a program: unshare: Operation not permitted"
    assert first == "; ".join(f"{layer}: {reason}" for layer in box._FIRST)
    assert line.startswith(NO_CHANGE)


def test_a_root_that_cannot_be_entered_is_undone(folder: Path) -> None:
    needs_root()
    can_have_namespaces()
    refuse = f"c.install(c.deny_list([{namespaces._PIVOT_ROOT}], {{}}), 0)"
    first, line = enter(folder, before=refuse)
    reason = "this kernel cannot confine a program: pivot_root: Operation not permitted"
    assert first == f"root: {reason}"
    assert line.startswith(NO_CHANGE)


@needs_headers(["linux/mount.h"])
def test_the_kernel_s_numbers(tmp_path: Path) -> None:
    calls = ("unshare", "mount", "umount2", "pivot_root", "open_tree", "move_mount")
    claims = [f"__NR_{name} == {getattr(namespaces, '_' + name.upper())}" for name in calls]
    names = ("CLONE_NEWNS", "CLONE_NEWUTS", "CLONE_NEWIPC", "CLONE_NEWUSER", "CLONE_NEWNET")
    names += ("_MS_NOSUID", "_MS_NODEV", "_MS_NOEXEC", "_MS_MOVE", "_MS_REC", "_MS_PRIVATE")
    names += ("_MOVE_MOUNT_F_EMPTY_PATH", "_OPEN_TREE_CLONE", "_MOUNT_ATTR_RDONLY")
    names += ("_MOUNT_ATTR_NOSUID", "_MOUNT_ATTR_NODEV", "_MOUNT_ATTR_NOEXEC")
    names += ("_AT_FDCWD", "_AT_EMPTY_PATH", "_AT_RECURSIVE")
    claims += [f"{name.lstrip('_')} == {getattr(namespaces, name)}" for name in names]
    claims.append("sizeof(struct mount_attr) == 32")
    headers = ("asm/unistd_64.h", "linux/sched.h", "linux/mount.h", "linux/fcntl.h")
    assert_in_c(tmp_path, headers, claims)
