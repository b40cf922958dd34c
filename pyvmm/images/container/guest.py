"""Additions that make a container's files a guest: an init and its programs, in /.pyvmm.

An image may be without any program, so what init runs is a static busybox. Nothing of the image's
own is replaced but what container engines replace too: /etc/hosts, /etc/hostname, /etc/resolv.conf;
and poweroff, halt and reboot where they are busybox's, which would ask an init that is not there.
"""

from __future__ import annotations

import shlex
import tarfile

from pyvmm.images.container.tree import Tree
from pyvmm.images.user_image import Process

FOLDER = ".pyvmm"
SCRIPTS = ("init", "network")  # pyvmm-init, pyvmm-network
CMDLINE = f"init=/{FOLDER}/init"
# A system's root disk has them; an image made from nothing has not.
_FOLDERS = {"dev": 0o755, "proc": 0o555, "sys": 0o555, "run": 0o755, "tmp": 0o1777, "etc": 0o755}
_ENDINGS = ("poweroff", "halt", "reboot")  # what pyvmm-init does under these names
_SHELLS = ("bin/sh", "usr/bin/sh")
_HOSTS = b"127.0.0.1 localhost\n127.0.1.1 pyvmm\n::1 localhost\n"


def prepare(tree: Tree, process: Process, programs: dict[str, bytes], *, name: str) -> None:
    """Add the guest's files to `tree`. `programs` are busybox, the agent and, as the root disks of
    the recipes have them, the SCRIPTS; `name` becomes its host name. Raises Refused."""
    tree.next_layer()
    for folder, mode in _FOLDERS.items():
        tree.directory(folder, mode)
    tree.write("etc/hosts", _HOSTS)
    tree.write("etc/hostname", f"{name}\n".encode())
    tree.link("etc/resolv.conf", "/run/resolv.conf")  # which pyvmm-network writes
    tree.directory(process.cwd.lstrip("/") or "etc")
    _add_account(tree, process)
    tree.root.drop(FOLDER)
    tree.directory(FOLDER)
    for file in ("busybox", "agent"):
        tree.write(f"{FOLDER}/{file}", programs[file], 0o755)
    for file in SCRIPTS:
        tree.write(f"{FOLDER}/{file}", _moved(programs[file]), 0o755)
    tree.write(f"{FOLDER}/entry", entry_script(process, _shell(tree)).encode(), 0o755)
    for command in _ENDINGS:
        _add_ending(tree, command)


def _add_ending(tree: Tree, command: str) -> None:
    tree.link(f"{FOLDER}/{command}", "init")
    folder = tree.find("sbin")
    own = tree.find(f"sbin/{command}")
    if folder is not None and folder.is_directory and own in (None, tree.find("bin/busybox")):
        tree.link(f"sbin/{command}", f"/{FOLDER}/{command}")


def _moved(script: bytes) -> bytes:
    """A script of the recipes' root disks, with its programs in our folder."""
    for path in ("/bin/busybox", "/sbin/pyvmm-network", "/sbin/pyvmm-agent"):
        file = path.rpartition("/")[2].removeprefix("pyvmm-")
        script = script.replace(path.encode(), f"/{FOLDER}/{file}".encode())
    return script


def _shell(tree: Tree) -> str:
    for path in _SHELLS:
        node = tree.find(path)
        if node is not None and node.kind == tarfile.REGTYPE:
            return f"/{path}"
    return ""


def entry_script(process: Process, shell: str) -> str:
    """sh: what `process` says, or `shell`, or busybox's own shell."""
    busybox = f"/{FOLDER}/busybox"
    program, *arguments = process.argv() or ([shell] if shell else [busybox, "sh"])
    words = [busybox, "env", "-i", 'TERM="$TERM"', *map(shlex.quote, process.env)]
    words += [f"/{FOLDER}/agent", "--as", process.account, shlex.quote(program)]
    words += map(shlex.quote, arguments)
    return f"#!{busybox} sh\ncd {shlex.quote(process.cwd)} || exit 126\nexec {' '.join(words)}\n"


def _add_account(tree: Tree, process: Process) -> None:
    """A line in /etc/passwd for a user whom only a number names: programs find it odd without."""
    uid, gid = process.user.split(":")
    passwd = tree.read("etc/passwd", 1 << 20)
    known = {fields[2] for line in passwd.split(b"\n") if len(fields := line.split(b":")) > 6}
    if uid.encode() in known:
        return
    if passwd and not passwd.endswith(b"\n"):
        passwd += b"\n"
    name, home = ("root", "/root") if uid == "0" else (f"pyvmm{uid}", "/")
    line = f"{name}:x:{uid}:{gid}::{home}:/bin/sh\n"
    tree.write("etc/passwd", passwd + line.encode())
