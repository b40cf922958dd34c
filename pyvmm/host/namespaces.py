"""Namespaces of its own for a process that needs little of the machine around it (namespaces(7)).

`for_all` is for a process without rights, while it has one thread: a user namespace gives it those
that the others take. `of_others`, `network` and `root` are the calling thread's, and those's that
it starts later; threads that run already stay where they are.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress

from pyvmm.errors import ConfigError
from pyvmm.host import confinement as c
from pyvmm.host.call_names import number_of

# <linux/sched.h>
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
_BOTH = CLONE_NEWUTS | CLONE_NEWIPC
_UNSHARE, _MOUNT = number_of("unshare"), number_of("mount")
_UMOUNT2, _PIVOT_ROOT = number_of("umount2"), number_of("pivot_root")
_OPEN_TREE, _MOVE_MOUNT = number_of("open_tree"), number_of("move_mount")
_MOUNT_SETATTR = number_of("mount_setattr")
# <linux/mount.h>, <linux/fcntl.h>
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_MOVE, _MS_REC, _MS_PRIVATE = 0x2000, 0x4000, 0x40000
_MNT_DETACH = 2
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000

# Ubuntu since 23.10: a user namespace can be had, and nothing can be done in it.
_APPARMOR = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"
_ROOT_OPTIONS = b"mode=755,size=1m"
_PLACE = b"/proc"  # where the new root is put together, whatever is there otherwise


def for_all() -> None:
    """Give this process, all of whose rights a user namespace is to give, that one. It stays the
    same user there, and has every capability over namespaces that are made from now on, but none
    over anything else. Raises ConfigError."""
    with suppress(OSError), open(_APPARMOR) as file:
        if file.read().strip() == "1":
            raise ConfigError("AppArmor lets ordinary users have no namespaces")
    user, group = os.geteuid(), os.getegid()
    texts = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    # Who is in one that has no map is nobody, and does not come back.
    _write({"uid_map": ""})
    done = c.call_kernel(_UNSHARE, CLONE_NEWUSER | _BOTH)
    if done < 0 and ctypes.get_errno() == errno.EINVAL and len(os.listdir("/proc/self/task")) > 1:
        raise ConfigError("threads run already, as of a device of yours")
    if done < 0 and ctypes.get_errno() == errno.ENOSPC:
        raise ConfigError("this place may have no user namespaces (user.max_user_namespaces)")
    c.checked(done, "unshare")
    _write(texts)


def _write(texts: dict[str, str]) -> None:
    """Raises ConfigError."""
    for name, text in texts.items():
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as error:
            raise ConfigError(f"/proc/self/{name}: {error.strerror}") from None


def of_others() -> None:
    """A host name, and message queues and shared memory by key, that are nobody else's. Raises
    ConfigError."""
    _unshare(_BOTH)


def network() -> None:
    """A network without any interface. Raises ConfigError."""
    _unshare(CLONE_NEWNET)


def root(read: Sequence[str], devices: Sequence[str]) -> None:
    """A root folder with nothing in it but `read`, files or folders with all that is in them, and
    the device nodes `devices`, all where they were, and read-only; what is missing is skipped. The
    current folder keeps its name and is otherwise empty. Raises ConfigError, and nothing has
    changed."""
    try:
        folder = os.getcwd()
    except OSError:  # it was removed
        folder = "/"
    before = os.open(".", os.O_PATH | os.O_CLOEXEC)
    own = os.path.realpath("/proc/self") + "/"
    trees: dict[str, int] = {}
    sources: dict[str, tuple[str, int]] = {}
    links: dict[str, str] = {}
    mounted = False
    try:
        _unshare(CLONE_NEWNS)
        _be_private()
        more = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID
        for paths, attributes in (
            (devices, more | _MOUNT_ATTR_NOEXEC),
            (read, more | _MOUNT_ATTR_NODEV),
        ):
            folders = tuple(os.path.abspath(path) + "/" for path in paths)
            for path in paths:
                named = os.path.abspath(path)
                own_files = _own_files(path, own)
                if own_files is not None:
                    links[os.path.dirname(os.path.join(folder, path))] = own_files
                    continue
                if named.startswith(folders):
                    named = os.path.realpath(path)  # a link in that folder may lead out of it
                if named in sources:
                    other, _ = sources[named]
                    if not _same(path, other):
                        raise ConfigError(f"{path} and {other} have one name in it")
                    continue
                sources[named] = path, attributes
        # What is below another one comes with that. (To close a tree takes the kernel milliseconds,
        # unless it was put somewhere.)
        for named in sorted(sources):
            if not named.startswith(tuple(f"{one}/" for one in trees)):
                tree = _tree(*sources[named])
                if tree is not None:
                    trees[named] = tree
        _mount(b"tmpfs", _PLACE, _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, _ROOT_OPTIONS)
        mounted = True
        os.chdir(_PLACE)
        _furnish(trees)
        for path in read:
            if os.path.dirname(os.path.join(folder, path)) not in links:
                _make_folders(os.path.dirname(os.path.join(folder, path)))
        _make_folders(folder)
        _link(links)
        attributes = more | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC
        _set_attributes(_AT_FDCWD, b".", 0, attributes)
        _enter()
    except (ConfigError, OSError) as error:
        if mounted:
            c.call_kernel(_UMOUNT2, ctypes.c_char_p(_PLACE), _MNT_DETACH)
        os.fchdir(before)
        message = error.message if isinstance(error, ConfigError) else str(error)
        raise ConfigError(message) from None
    finally:
        os.close(before)
        for fd in trees.values():
            os.close(fd)
    with suppress(OSError):
        os.chdir(folder)


def _be_private() -> None:
    """Let nothing that is mounted from now on be seen outside, or the other way round. Raises
    ConfigError."""
    done = c.call_kernel(_MOUNT, None, ctypes.c_char_p(b"/"), None, _MS_REC | _MS_PRIVATE, None)
    if done < 0 and ctypes.get_errno() == errno.EINVAL:
        raise ConfigError("the root folder is no mount point here (chroot)")
    c.checked(done, "mount")


def _furnish(trees: dict[str, int]) -> None:
    """Put `trees` where they belong below the current folder. Raises ConfigError, OSError."""
    for path in trees:
        below = "." + path
        _make_folders(os.path.dirname(path))
        if stat.S_ISDIR(os.fstat(trees[path]).st_mode):
            os.mkdir(below)
        else:
            os.close(os.open(below, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        moved = c.call_kernel(
            _MOVE_MOUNT,
            *(trees[path], ctypes.c_char_p(b"")),
            *(_AT_FDCWD, ctypes.c_char_p(os.fsencode(below)), _MOVE_MOUNT_F_EMPTY_PATH),
        )
        c.checked(moved, f"move_mount {path}")


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # whoever opens it tells
        return True


def _own_files(path: str, own: str) -> str | None:
    """The name of the folder of `path` by way of /proc/self, which is `own`, if that is where it
    is: what is there are open files, which can be no mount, and stay."""
    folder = os.path.realpath(os.path.dirname(path)) + "/"
    return "/proc/self/" + folder[len(own) : -1] if folder.startswith(own) else None


def _link(links: dict[str, str]) -> None:
    """Make symbolic links of these names to these targets. Raises OSError."""
    for name, target in links.items():
        if not os.path.lexists("." + name):
            _make_folders(os.path.dirname(name))
            os.symlink(target, "." + name)


def _make_folders(path: str) -> None:
    """Make the folder `path`, an absolute one, below the current one, with all that it goes through
    by "..". Raises OSError."""
    names: list[str] = []
    for name in filter(None, path.split("/")):
        if name == "..":
            del names[-1:]
            continue
        names.append(name)
        below = "./" + "/".join(names)
        if not os.path.isdir(below):
            os.mkdir(below)
            os.chmod(below, 0o755)  # whatever the umask: we may become another user


def _enter() -> None:
    """Make the current folder, at which something is mounted, the root. Raises ConfigError,
    OSError."""
    here = ctypes.c_char_p(b".")
    moved = c.call_kernel(_PIVOT_ROOT, here, here)
    if moved < 0 and ctypes.get_errno() == errno.EINVAL:
        # pivot_root(2): it is the first root of all, an initial RAM disk's, and stays below.
        _mount(b".", b"/", _MS_MOVE)
        os.chroot(".")
    else:
        c.checked(moved, "pivot_root")
        # The old root lies above the new one.
        c.checked(c.call_kernel(_UMOUNT2, here, _MNT_DETACH), "umount2")
    os.chdir("/")


def _tree(path: str, attributes: int) -> int | None:
    """A copy of the mounts at `path` and below it, with `attributes`; None if nothing is there.
    Raises ConfigError."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
    name = ctypes.c_char_p(os.fsencode(path))
    tree = c.call_kernel(_OPEN_TREE, _AT_FDCWD, name, flags)
    if tree < 0 and not os.access(path, os.F_OK):
        return None
    c.checked(tree, f"open_tree {path}")
    try:
        _set_attributes(tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, attributes)
    except ConfigError:
        os.close(tree)
        raise
    return tree


def _set_attributes(fd: int, path: bytes, flags: int, attributes: int) -> None:
    wanted = struct.pack("=4Q", attributes, 0, 0, 0)  # struct mount_attr
    done = c.call_kernel(
        _MOUNT_SETATTR, fd, ctypes.c_char_p(path), flags, ctypes.c_char_p(wanted), len(wanted)
    )
    c.checked(done, "mount_setattr")


def _unshare(flags: int) -> None:
    c.checked(c.call_kernel(_UNSHARE, flags), "unshare")


def _mount(source: bytes, target: bytes, flags: int, options: bytes | None = None) -> None:
    """A file system that is made has no other source than its name. Raises ConfigError."""
    words = [ctypes.c_char_p(word) for word in (source, target, source)]
    done = c.call_kernel(_MOUNT, *words, flags, ctypes.c_char_p(options))
    c.checked(done, "mount")
