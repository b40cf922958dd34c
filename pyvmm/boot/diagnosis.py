"""The reasons why a guest does not come up, read off its console: known failures and their cures.

The texts looked for are those of Linux 5.10 to 6.12 (init/main.c, init/do_mounts.c,
init/initramfs.c, kernel/panic.c, fs/ext4/super.c), of initramfs-tools (scripts/local, init), of
dracut and systemd, and of guest-images/initramfs/init. What a guest prints is untrusted: lines are
cut, only printable characters are repeated, each kind of finding is made once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pyvmm.boot.partitions import Table

LINE_MAX = 2048  # bytes of a line that are looked at in one piece
_OVERLAP = 256  # of a longer one, so much is looked at again with what follows
_QUOTE_MAX = 160
_MINORS = 16  # device numbers of a virtio disk: itself and its partitions

PANIC = "panic"
OOPS = "oops"
LOCKUP = "lockup"
NO_ROOT = "no-root-device"
NO_DRIVER = "no-virtio-driver"
FILESYSTEM = "filesystem"
READ_ONLY = "read-only-root"
NO_INIT = "no-init"
INIT_DIED = "init-died"
NO_DEV_CONSOLE = "no-dev-console"
INITRAMFS = "initramfs"
MEMORY = "out-of-memory"
DECOMPRESSOR = "decompressor"
EMERGENCY = "emergency-shell"
SILENT = "silent"
EARLY = "earlyprintk=serial,ttyS0,115200"
"""The option that gives a PC's kernel an early console."""

# Consequences rather than causes: anything else that was found says more.
_GENERIC = (PANIC, EMERGENCY, NO_DEV_CONSOLE)


class Finding(NamedTuple):
    """One recognised failure: `message` says what happened, `cure` what to change."""

    kind: str
    message: str
    cure: str

    def __str__(self) -> str:
        return f"{self.message}; {self.cure}" if self.cure else self.message


class ConsoleWatcher:
    """Reads along with what the guest writes to its console; memory and work are bounded.

    `disk_ready` is asked, when the guest misses its root device, whether a driver in it has brought
    up any disk; without it, the console is searched for signs of one. `tables` tells what the
    disks hold, as far as it is known, by their names in the guest. `transport`, "mmio" or "pci", is
    how the guest reaches them.
    """

    def __init__(
        self,
        disk_ready: Callable[[], bool] | None = None,
        tables: Callable[[], Sequence[tuple[str, Table]]] = tuple,
        transport: str = "mmio",
    ) -> None:
        self.transport = transport
        self.findings: list[Finding] = []
        self.bytes_seen = 0
        self._disk_ready = disk_ready
        self.tables = tables
        self._disk_seen = False
        self._last_line = ""
        self._line = bytearray()

    def feed(self, data: bytes) -> None:
        """Look at the next bytes of output; any chunking will do, single bytes too."""
        self.bytes_seen += len(data)
        self._line += data
        if b"\n" in data:
            *lines, rest = self._line.split(b"\n")
            self._line = rest
            for line in lines:
                self._look(bytes(line))
        if len(self._line) > LINE_MAX:
            self._look(bytes(self._line))
            del self._line[:-_OVERLAP]

    @property
    def diagnosis(self) -> Finding | None:
        """The finding that says most, if there is any: a cause before its consequence."""
        for finding in self.findings:
            if finding.kind not in _GENERIC:
                return finding
        return self.findings[0] if self.findings else None

    def silence_hint(
        self,
        cmdline: str,
        elapsed: float,
        *,
        patience: float = 10.0,
        consoles: Collection[str] = ("ttyS0",),
        early: str = EARLY,
    ) -> Finding | None:
        """The line for a guest that has printed nothing in `elapsed` seconds on `consoles`, as
        its kernel calls them. `early` is the parameter that gives it an early console.

        None while it has printed something or less than `patience` seconds have gone by.
        """
        if self.bytes_seen or elapsed < patience:
            return None
        what = f"printed nothing in {elapsed:.0f} seconds"
        return _explain_silence(what, cmdline, consoles, early)

    def silent_reset(
        self, cmdline: str, *, consoles: Collection[str] = ("ttyS0",), early: str = EARLY
    ) -> Finding | None:
        """The line for a guest that has reset itself; None if it has printed something."""
        if self.bytes_seen:
            return None
        return _explain_silence("reset itself and printed nothing", cmdline, consoles, early)

    def _look(self, line: bytes) -> None:
        for marker, explain in _RULES:
            if marker in line:
                text = _printable(line)
                finding = explain(text, self)
                if finding:
                    self._add(finding)
        if b"virtio_blk virtio" in line or b" vda " in line:
            self._disk_seen = True
        if line.strip():
            self._last_line = _printable(line)

    def _add(self, finding: Finding) -> None:
        if all(known.kind != finding.kind for known in self.findings):
            self.findings.append(finding)

    def disk_came_up(self) -> bool:
        """True if a driver in the guest has found a disk of ours, as far as can be told."""
        return self._disk_ready() if self._disk_ready else self._disk_seen

    @property
    def last_line(self) -> str:
        """The last line that was not empty, printable and cut."""
        return self._last_line


def _printable(line: bytes) -> str:
    """`line` without the kernel's timestamp, escape sequences and whatever is not printable."""
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]|[^ -~]", b"", line[:LINE_MAX]).decode("ascii")
    return re.sub(r"^(<\d+>)?\[ *\d+\.\d+\](\[ *[TC]\d+\])? ", "", text).strip()


def _quote(text: str) -> str:
    return text if len(text) <= _QUOTE_MAX else text[: _QUOTE_MAX - 1] + "…"


def _after(text: str, marker: str) -> str:
    return _quote(text.partition(marker)[2].strip(" -:!."))


def _root_missing(what: str, watcher: ConsoleWatcher) -> Finding:
    if watcher.disk_came_up():
        return Finding(
            NO_ROOT,
            f"the guest found disks, but not its root device{what}",
            f"check root= in --cmdline: the first --disk is /dev/vda, the second /dev/vdb"
            f"{_there(watcher, what.strip())}",
        )
    return Finding(
        NO_DRIVER,
        f"the guest did not find its root device{what}: no driver in it has brought up a disk",
        f"give it a --disk, and virtio_{watcher.transport} and virtio_blk "
        f"(CONFIG_VIRTIO_{watcher.transport.upper()}, CONFIG_VIRTIO_BLK) in the kernel or, as with "
        f"Debian's kernels, as modules in an --initrd; or try --transport "
        f"{'mmio' if watcher.transport == 'pci' else 'pci'}",
    )


def _there(watcher: ConsoleWatcher, wanted: str) -> str:
    tables = watcher.tables()
    if not tables:
        return ""
    from pyvmm.boot import partitions

    return f"; there are {partitions.listed(tables, wanted)}"


def _other_root(disk: str, number: int, watcher: ConsoleWatcher) -> str:
    """The line for a boot in which no root file system could be mounted from partition `number` of
    `disk`, or from the whole of it if that is 0; nothing if it is not a fault of the choice."""
    table = dict(watcher.tables()).get(disk)
    if table is None:
        return ""
    from pyvmm.boot import partitions

    return partitions.advice(disk, table, number)


def _panic(text: str, watcher: ConsoleWatcher) -> Finding | None:
    # At the end of its report the kernel repeats the line as "end Kernel panic".
    reason = _after(text, "Kernel panic - not syncing:") or "no reason given"
    return Finding(PANIC, f"the guest's kernel panicked: {reason}", "")


def _unable_to_mount(text: str, watcher: ConsoleWatcher) -> Finding:
    device = re.search(r"unknown-block\((\d+),(\d+)\)", text)
    if device and device[1] == "0":
        return _root_missing("", watcher)
    other = ""
    if device:
        index, number = divmod(int(device[2]), _MINORS)
        other = _other_root(f"/dev/vd{chr(ord('a') + index)}", number, watcher)
    return Finding(
        FILESYSTEM,
        "the guest's kernel found the root device but no file system on it that it knows",
        other
        or "see that the image holds a file system (file IMAGE), that the kernel has its driver "
        "built in, or give an --initrd with it",
    )


def _cannot_open_root(text: str, watcher: ConsoleWatcher) -> Finding | None:
    device = re.search(r'root device "([^"]*)" or unknown-block\((\d+)', text)
    if device and device[2] != "0":
        return None  # it exists; what is wrong with it is said by what follows
    name = f" {_quote(device[1])}" if device and device[1] not in ("", "(null)") else ""
    return _root_missing(name, watcher)


def _no_such_device(text: str, watcher: ConsoleWatcher) -> Finding | None:
    match = re.search(r"(?:ALERT!|Warning:) +((?:/dev/|\w+=)\S+) does not exist", text)
    match = match or re.search(r"pyvmm-initramfs: no root device (.+?) after", text)
    return _root_missing(f" {_quote(match[1])}", watcher) if match else None


def _waiting_for_device(text: str, watcher: ConsoleWatcher) -> Finding:
    return _root_missing("", watcher)


def _no_root_given(text: str, watcher: ConsoleWatcher) -> Finding:
    return Finding(
        NO_ROOT,
        "the guest was given no root device",
        "add root=/dev/vda to --cmdline, and a --disk",
    )


def _filesystem(text: str, watcher: ConsoleWatcher) -> Finding:
    device = re.search(r"(/dev/vd[a-z]+|\(vd[a-z]+)(\d{0,4})\b", text)
    other = ""
    if device:
        disk = device[1].replace("(", "/dev/")
        other = _other_root(disk, int(device[2] or 0), watcher)
    return Finding(
        FILESYSTEM,
        f"the guest could not mount its root file system: {_quote(text)}",
        other
        or "see that the image holds a file system (file IMAGE), that the guest has its driver, "
        "and that it is clean (e2fsck -f IMAGE)",
    )


def _read_only(text: str, watcher: ConsoleWatcher) -> Finding:
    return Finding(
        READ_ONLY,
        f"the guest needs to write to a disk that is read-only: {_quote(text)}",
        "drop ,readonly from --disk, or clean the file system first (e2fsck -f IMAGE) and "
        "put ro into --cmdline",
    )


def _no_init(text: str, watcher: ConsoleWatcher) -> Finding:
    return Finding(
        NO_INIT,
        "the root file system has no init that the guest can run",
        "install one (apt install systemd-sysv or busybox in the image) or name a program: "
        "init=/bin/sh in --cmdline",
    )


_EXEC_ERRORS = {
    "2": "it or its interpreter or loader is missing",
    "8": "it is for another architecture or not a program",
    "13": "it is not executable",
}


def _init_failed(text: str, watcher: ConsoleWatcher) -> Finding:
    match = re.search(r"(?:Requested init|Failed to execute) (\S+).*error -(\d+)", text)
    if not match:
        return _no_init(text, watcher)
    reason = _EXEC_ERRORS.get(match[2], f"error {match[2]}")
    return Finding(
        NO_INIT,
        f"the guest could not run {_quote(match[1])} as init: {reason}",
        "check that file in the image or initrd, and init= or rdinit= in --cmdline",
    )


def _init_died(text: str, watcher: ConsoleWatcher) -> Finding:
    match = re.search(r"exitcode=0x([0-9a-f]{8})", text)
    code = int(match[1], 16) if match else 0
    if signal := code & 0x7F:
        how = f"was killed by signal {signal}"
    else:
        how = f"ended with status {code >> 8 & 0xFF}"
    return Finding(
        INIT_DIED,
        f"the guest's init {how}",
        "an init must never end: power off with poweroff -f; what it printed before may say why",
    )


def _initramfs(text: str, watcher: ConsoleWatcher) -> Finding:
    if "write error" in text:
        return Finding(
            MEMORY,
            "the guest ran out of memory while it unpacked the initrd",
            "give it more --memory, or a smaller --initrd",
        )
    reason = _after(text, "unpacking failed:") or _quote(text)
    return Finding(
        INITRAMFS,
        f"the guest could not unpack the initrd: {reason}",
        "--initrd takes a cpio archive (newc), plain or in a compression that the kernel knows; "
        "is it damaged?",
    )


def _memory(text: str, watcher: ConsoleWatcher) -> Finding:
    return Finding(MEMORY, "the guest ran out of memory while it started", "give it more --memory")


def _oops(text: str, watcher: ConsoleWatcher) -> Finding:
    return Finding(
        OOPS,
        f"the guest's kernel crashed: {_quote(text)}",
        "try another kernel version, or fewer features in --cmdline; the full report is above",
    )


def _lockup(text: str, watcher: ConsoleWatcher) -> Finding:
    return Finding(
        LOCKUP,
        f"a CPU of the guest got stuck: {_quote(text)}",
        "if the host is busy or KVM is emulated this may pass; else try fewer --cpus",
    )


def _halted(text: str, watcher: ConsoleWatcher) -> Finding:
    said = text.partition("-- System halted")[0].strip() or watcher.last_line
    return Finding(
        DECOMPRESSOR,
        f"the kernel could not unpack itself: {_quote(said)}",
        "give it more --memory; if that does not help, the kernel file is damaged",
    )


def _dev_console(text: str, watcher: ConsoleWatcher) -> Finding:
    return Finding(
        NO_DEV_CONSOLE,
        "the guest's init has no console, so nothing it prints is seen",
        "put a /dev/console node into the initrd, or use a kernel with CONFIG_DEVTMPFS_MOUNT",
    )


def _emergency(text: str, watcher: ConsoleWatcher) -> Finding:
    return Finding(
        EMERGENCY,
        f"the guest gave up starting and opened an emergency shell: {_quote(text)}",
        "what it printed before says why; often a device in /etc/fstab that is not there",
    )


_Explain = Callable[[str, ConsoleWatcher], "Finding | None"]

# What a line must contain, and what it means then. The specific ones stand before the general.
_RULES: tuple[tuple[bytes, _Explain], ...] = (
    (b"VFS: Cannot open root device", _cannot_open_root),
    (b"VFS: Unable to mount root fs", _unable_to_mount),
    (b"does not exist", _no_such_device),
    (b"pyvmm-initramfs: no root device", _no_such_device),
    (b"dracut-initqueue: timeout", _waiting_for_device),
    (b"dracut-initqueue timeout", _waiting_for_device),
    (b"No root device specified.", _no_root_given),
    (b"dracut: FATAL: No or empty root= argument", _no_root_given),
    (b"VFS: Can't find ext4 filesystem", _filesystem),
    (b"as root file system.", _filesystem),
    (b"requires a manual fsck", _filesystem),
    (b"Failed to mount sysroot.mount", _filesystem),
    (b"pyvmm-initramfs: cannot mount", _filesystem),
    (b"write access unavailable, cannot proceed", _read_only),
    (b"cannot remount / read-write, is write-protected", _read_only),
    (b"is write-protected but explicit read-write", _read_only),
    (b"No working init found", _no_init),
    (b"No init found. Try passing init=", _no_init),
    (b"pyvmm-initramfs: no init:", _no_init),
    (b"Requested init ", _init_failed),
    (b"Failed to execute /", _init_failed),
    (b"Attempted to kill init!", _init_died),
    (b"unable to open an initial console", _dev_console),
    (b"Initramfs unpacking failed:", _initramfs),
    (b"rootfs image is not initramfs", _initramfs),
    (b"System is deadlocked on memory", _memory),
    (b"Out of memory and no killable processes", _memory),
    (b"-- System halted", _halted),
    (b"BUG: unable to handle", _oops),
    (b"BUG: kernel NULL pointer", _oops),
    (b"kernel BUG at ", _oops),
    (b"general protection fault, ", _oops),
    (b"Oops: ", _oops),
    (b"soft lockup - CPU#", _lockup),
    (b"Entering emergency mode", _emergency),
    (b"You are in emergency mode", _emergency),
    (b"Kernel panic - not syncing:", _panic),
)


_DRIVERS = {"ttyS0": "CONFIG_SERIAL_8250_CONSOLE", "hvc0": "CONFIG_VIRTIO_CONSOLE"}
_OTHER = {
    "ttyS0": "--console virtio gives it the other one, hvc0",
    "hvc0": "without --console virtio it gets the other one, ttyS0",
}


def _explain_silence(what: str, cmdline: str, heard: Collection[str], early: str) -> Finding:
    words = cmdline.split()
    consoles = [word.partition("=")[2] for word in words if word.startswith("console=")]
    named = [console.partition(",")[0] for console in consoles]
    message = f"the guest has {what}"
    if not consoles:
        return Finding(
            SILENT, f"{message} and was given no console=", "add console=ttyS0 to --cmdline"
        )
    console = next((console for console in reversed(named) if console in heard), "")
    if not console:
        also = ", or give it that device: --console virtio" if named[-1] == "hvc0" else ""
        return Finding(
            SILENT,
            f"{message} on the serial port; its console={_quote(consoles[-1])} is another device",
            f"put console=ttyS0 into --cmdline{also}",
        )
    no_driver = f"a kernel without {_DRIVERS[console]} has no console on {console}"
    if any(word.startswith(early.partition("=")[0] + "=") for word in words):
        return Finding(
            SILENT,
            f"{message}, not even on its early console",
            f"see that the kernel is for this architecture and has enough --memory; {no_driver}, "
            f"{_OTHER[console]}",
        )
    quiet = ", and leave out quiet," if "quiet" in words else ""
    return Finding(
        SILENT,
        message,
        f"{no_driver}: {_OTHER[console]}; {early} in --cmdline{quiet} shows how far it gets",
    )
