"""A Debian for another architecture: its packages are unpacked here and configured in an emulated
machine of that architecture, which QEMU starts for it.

No program of theirs runs on this machine, so it takes neither root nor binfmt_misc (decision 0550).
The machine boots from a work disk with the packages, and writes a tar archive of what has become of
them to a second one; from there on all is as with mmdebstrap's archive (pyvmm.images.rootfs).
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from pyvmm.errors import ConfigError, how_many
from pyvmm.images import apt, tools
from pyvmm.images.lock import Pin
from pyvmm.images.progress import Progress

SCRIPT = "configure-packages"  # in guest-images/rootfs; the emulated machine's init
QEMU = {"arm64": "aarch64"}  # by Debian's name of the architecture
_MACHINE = {"arm64": ("-machine", "virt", "-cpu", "cortex-a72")}
_CONSOLE = {"arm64": "ttyAMA0"}
_MEMORY_MIB = 1024
_SPARE_MIB = 1024  # on the work disk, for the packages themselves
_PATIENCE = 3 * 3600  # seconds; on an idle machine it takes three minutes
_MOST_SAID = 4 << 20  # bytes of the console that are kept
_PIECE = 1 << 16
_HEADER = 60  # bytes before a member of an ar archive
_PACKAGE, _MARK = "pyvmm-package: ", "pyvmm-mark: "  # the beginnings of lines on its console

# Everything in one process, so that one fakeroot sees both the owners and the reader.
# Debian's folders of programs are links into /usr before any package is unpacked.
_MAKE_WORK_DISK = """
umask 022
mkdir "$ROOM/work" && cd "$ROOM/work"
mkdir -p usr/bin usr/sbin usr/lib etc/apt/preferences.d dev proc sys run pyvmm/packages \
    var/lib/dpkg/info var/lib/dpkg/updates
for folder in bin sbin lib; do ln -s "usr/$folder" "$folder"; done
for package in "$ROOM"/packages/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -xp --keep-directory-symlink -f -
    mv "$package" pyvmm/packages
done
: > var/lib/dpkg/status
: > var/lib/dpkg/available
[ -e usr/bin/awk ] || ln -s mawk usr/bin/awk
install -m 755 "$SCRIPT" pyvmm/init
install -m 644 "$SOURCES" etc/apt/sources.list
if [ "$ADDITIONS" ]; then install -m 644 "$ADDITIONS" pyvmm/additions.tar; fi
if [ "$OWN_SCRIPT" ]; then install -m 755 "$OWN_SCRIPT" pyvmm/script; fi
mke2fs -q -t ext4 -O ^has_journal -m 0 -E lazy_itable_init=0 -d . "$DISK" "${SIZE}M"
cd / && chmod -R u+rwX "$ROOM/work"
"""


@dataclass(frozen=True)
class Machine:
    """The emulated machine: the beginning of QEMU's command line, and what it boots, which is an
    image's kernel and initramfs."""

    qemu: tuple[str, ...]
    kernel: str
    initrd: str


@dataclass(frozen=True)
class Wanted:
    """What goes into the root disk; see pyvmm.images.rootfs.Plan. `pins` are all its packages,
    `size` is in MiB; `additions` and `script` are paths, or ""."""

    name: str
    architecture: str
    pins: Sequence[Pin]
    size: int
    additions: str = ""
    script: str = ""


def build(
    wanted: Wanted, machine: Machine, client: apt.Apt, script: str, room: str, progress: Progress
) -> None:
    """Write `room`/root.tar, and `room`/packages with a line for each package. `script` is the path
    of the machine's init. Raises ConfigError."""
    disk, archive = os.path.join(room, "work.img"), os.path.join(room, "root.tar")
    packages = os.path.join(room, "packages")
    os.mkdir(packages)
    with progress.step(f"{wanted.name}: fetching {how_many(len(wanted.pins), 'package')}"):
        fetched = client.download_all(wanted.pins, packages)
    with progress.step(f"{wanted.name}: unpacking"):
        for package in fetched:
            _store(package)
        _make_work_disk(wanted, client, script, room, disk)
    shutil.rmtree(os.path.join(room, "work"), ignore_errors=True)
    os.rmdir(packages)
    with open(archive, "wb") as file:
        file.truncate((wanted.size + _SPARE_MIB) << 20)
    what = f"{wanted.name}: configuring in an emulated {wanted.architecture} machine (minutes)"
    with progress.step(what):
        lines = _run(wanted, machine, disk, archive)
    os.unlink(disk)
    with open(packages, "w", encoding="utf-8") as file:
        found = (line.removeprefix(_PACKAGE).split() for line in lines if line.startswith(_PACKAGE))
        # Its kernel, or a script, may say something on the console in between.
        file.writelines(f"{words[0]} {words[1]}\n" for words in found if len(words) > 1)


def _store(package: str) -> None:
    """Write the package anew without compression (deb(5)), which takes most of the time to unpack
    it where processors are emulated. Raises ConfigError."""
    parts = {"control.tar": "--ctrl-tarfile", "data.tar": "--fsys-tarfile"}
    with open(f"{package}.new", "wb") as file:
        file.write(b"!<arch>\n" + _member("debian-binary", 4) + b"2.0\n")
        for name, option in parts.items():
            start = file.tell()
            file.write(_member(name, 0))
            file.flush()
            done = subprocess.run(
                ["dpkg-deb", option, package], stdout=file, stderr=subprocess.PIPE, text=True
            )
            if done.returncode:
                problem = tools.complaint(done.stderr, done.returncode)
                raise ConfigError(f"cannot unpack a package: {problem}")
            end = file.seek(0, os.SEEK_END)
            file.seek(start)
            size = end - start - _HEADER
            file.write(_member(name, size))
            file.seek(end)
            file.write(b"\n" * (size % 2))
    os.replace(f"{package}.new", package)


def _member(name: str, size: int) -> bytes:
    """The header of a member of an ar archive (ar(5))."""
    return f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{size:<10}`\n".encode()


def _make_work_disk(wanted: Wanted, client: apt.Apt, script: str, room: str, disk: str) -> None:
    for program in ("tar", "mke2fs", "dpkg-deb"):
        tools.require(program)
    fake = [] if os.geteuid() == 0 else ["fakeroot"]
    environment = {
        "ROOM": room,
        "SCRIPT": script,
        "SOURCES": client.sources,
        "ADDITIONS": wanted.additions,
        "OWN_SCRIPT": wanted.script,
        "DISK": disk,
        "SIZE": str(wanted.size + _SPARE_MIB),
    }
    tools.run([*fake, "sh", "-euc", _MAKE_WORK_DISK], "unpacking", env=environment)


def _run(wanted: Wanted, machine: Machine, disk: str, archive: str) -> list[str]:
    """The lines that the machine said. Raises ConfigError, with the one that tells why, unless it
    configured everything."""
    mark = secrets.token_hex(8)
    parameters = (
        f"console={_CONSOLE[wanted.architecture]} quiet panic=-1 nokaslr norandmaps",
        "mitigations=off apparmor=0 audit=0 cryptomgr.notests",
        f"root=/dev/vda rw init=/pyvmm/init pyvmm.mark={mark}",
    )
    command = [
        # QEMU ends with us, however that is.
        *("setpriv", "--pdeathsig", "KILL", "--", *machine.qemu),
        *(*_MACHINE[wanted.architecture], "-accel", "tcg,thread=multi"),
        *("-smp", "2", "-m", str(_MEMORY_MIB), "-nodefaults", "-nographic", "-no-reboot"),
        *("-serial", "stdio", "-kernel", machine.kernel, "-initrd", machine.initrd),
        *("-append", " ".join(parameters)),
    ]
    for name, path in (("work", disk), ("archive", archive)):
        file = path.replace(",", ",,")
        command += ["-drive", f"if=none,id={name},format=raw,cache=unsafe,file={file}"]
        command += ["-device", f"virtio-blk-pci,drive={name}"]
    tools.require("setpriv")
    said = _console_of(command)
    lines = [line.strip() for line in said.decode(errors="replace").splitlines()]
    if f"{_MARK}{mark}" not in lines:
        problem = tools.complaint("\n".join(_problems(lines) or lines), 1)
        raise ConfigError(f"{wanted.name}: its packages were not configured: {problem}")
    return lines


def _problems(lines: Sequence[str]) -> list[str]:
    """Of what the machine said, what it gives as the reason, the first of them first."""
    words = ("pyvmm-configure: ", "dpkg: error", "Kernel panic")
    found = [line for word in words for line in lines if word in line]
    return [f"E: {line}" for line in found]


def _console_of(command: Sequence[str]) -> bytes:
    """What the machine says until it ends. Raises ConfigError if it does not."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            return _end_of(process.stdout, time.monotonic() + _PATIENCE)
        finally:
            process.kill()


def _end_of(console: IO[bytes] | None, deadline: float) -> bytes:
    """The last of what comes until `deadline`. A script may print as much as it likes."""
    assert console is not None
    said = bytearray()
    while select.select([console], [], [], max(0.0, deadline - time.monotonic()))[0]:
        data = os.read(console.fileno(), _PIECE)
        if not data:
            return bytes(said)
        said += data
        del said[:-_MOST_SAID]
    raise ConfigError("the emulated machine did not end", cure="try again")
