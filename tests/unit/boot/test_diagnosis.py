"""Known ways in which a guest does not come up, told from the console's text as guests print it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.boot.diagnosis import EARLY, LINE_MAX, ConsoleWatcher, Finding
from pyvmm.machine.board.registry import board_for

NO_ROOT_61 = b"""\
[    0.812345] /dev/root: Can't open blockdev
[    0.812400] VFS: Cannot open root device "vda" or unknown-block(0,0): error -6
[    0.812500] Please append a correct "root=" boot option; here are the available partitions:
[    0.812600] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)
[    0.812700] CPU: 0 PID: 1 Comm: swapper/0 Not tainted 6.1.0-53-cloud-amd64 #1  Debian 6.1.187-1
[    0.820000] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block\
(0,0) ]---
"""
INITRAMFS_TOOLS = b"""\
Begin: Waiting for root file system ... done.
Gave up waiting for root file system device.  Common problems:
 - Boot args (cat /proc/cmdline)
   - Check rootdelay= (did the system wait long enough?)
 - Missing modules (cat /proc/modules; ls /dev)
ALERT!  /dev/vdx does not exist.  Dropping to a shell!
(initramfs) """
VDA = (
    b"[    0.700000] virtio_blk virtio0: [vda] 2097152 512-byte logical blocks (1.07 GB/1.00 GiB)\n"
)


def read(text: bytes, *, step: int = 0, **options: object) -> ConsoleWatcher:
    watcher = ConsoleWatcher(**options)  # type: ignore[arg-type]
    text = text.replace(b"\n", b"\r\n")
    for start in range(0, len(text), step or len(text) or 1):
        watcher.feed(text[start : start + (step or len(text))])
    return watcher


def kinds(watcher: ConsoleWatcher) -> list[str]:
    return [finding.kind for finding in watcher.findings]


def diagnosis(text: bytes, **options: object) -> Finding:
    found = read(text, **options).diagnosis  # type: ignore[arg-type]
    assert found
    assert "\n" not in str(found)
    return found


@pytest.mark.parametrize(("transport", "other"), [("mmio", "pci"), ("pci", "mmio")])
def test_without_a_driver_the_other_transport_is_named(transport: str, other: str) -> None:
    cure = diagnosis(NO_ROOT_61, transport=transport).cure
    assert f"CONFIG_VIRTIO_{transport.upper()}, " in cure
    assert cure.endswith(f"; or try --transport {other}")


@pytest.mark.parametrize("step", [0, 1, 7, 64])
def test_no_driver_for_the_disk(step: int) -> None:
    watcher = read(NO_ROOT_61, step=step)
    assert kinds(watcher) == ["no-virtio-driver", "panic"]
    assert watcher.diagnosis and "vda" in watcher.diagnosis.message
    assert "CONFIG_VIRTIO_BLK" in watcher.diagnosis.cure
    panic = watcher.findings[1]
    assert "VFS: Unable to mount root fs on unknown-block(0,0)" in panic.message


def test_wrong_root_although_the_disk_is_there() -> None:
    found = diagnosis(VDA + NO_ROOT_61.replace(b'"vda"', b'"vdx"'))
    assert found.kind == "no-root-device"
    assert "vdx" in found.message and "root=" in found.cure


def test_the_machine_knows_better_than_a_quiet_console_whether_a_driver_came_up() -> None:
    panic = NO_ROOT_61.splitlines(True)[3]
    assert diagnosis(panic, disk_ready=lambda: True).kind == "no-root-device"
    assert diagnosis(VDA + panic, disk_ready=lambda: False).kind == "no-virtio-driver"


@pytest.mark.parametrize("step", [0, 1, 13])
def test_initramfs_tools_gives_up(step: int) -> None:
    watcher = read(INITRAMFS_TOOLS, step=step)
    assert kinds(watcher) == ["no-virtio-driver"]
    assert kinds(read(VDA + INITRAMFS_TOOLS)) == ["no-root-device"]
    assert "/dev/vdx" in diagnosis(VDA + INITRAMFS_TOOLS).message


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (
            b"[    1.5] Kernel panic - not syncing: VFS: Unable to mount root fs on "
            b"unknown-block(254,0)\n",
            "filesystem",
            ["file system"],
        ),
        (
            b"[   12.1] dracut-initqueue[301]: Warning: dracut-initqueue: timeout, still waiting "
            b"for following initqueue hooks:\n",
            "no-virtio-driver",
            ["root device"],
        ),
        (
            b"[ 130.1] dracut-initqueue[301]: Warning: /dev/disk/by-uuid/93dc-01 does not exist\n",
            "no-virtio-driver",
            ["/dev/disk/by-uuid/93dc-01"],
        ),
        (
            b"No root device specified. Boot arguments must include a root= parameter.\n",
            "no-root-device",
            ["root=/dev/vda"],
        ),
        (
            b"[    1.2] EXT4-fs (vda): VFS: Can't find ext4 filesystem\n",
            "filesystem",
            ["EXT4-fs (vda)", "e2fsck"],
        ),
        (b"Failed to mount /dev/vda as root file system.\n", "filesystem", ["/dev/vda"]),
        (
            b"The root filesystem on /dev/vda requires a manual fsck\n",
            "filesystem",
            ["e2fsck -f"],
        ),
        (
            b"[    1.4] EXT4-fs (vda): write access unavailable, cannot proceed (try mounting with "
            b"noload)\n",
            "read-only-root",
            ["readonly"],
        ),
        (
            b"[    1.9] Kernel panic - not syncing: No working init found.  Try passing init= "
            b"option to kernel. See Linux Documentation/admin-guide/init.rst for guidance.\n",
            "no-init",
            ["init=/bin/sh"],
        ),
        (b"No init found. Try passing init= bootarg.\n", "no-init", ["init="]),
        (
            b"[    1.9] Kernel panic - not syncing: Requested init /sbin/nope failed (error -2).\n",
            "no-init",
            ["/sbin/nope", "missing"],
        ),
        (b"[    1.9] Failed to execute /init (error -8)\n", "no-init", ["/init", "architecture"]),
        (b"[    1.9] Failed to execute /init (error -13)\n", "no-init", ["not executable"]),
        (
            b"[    2.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00007f00\n",
            "init-died",
            ["status 127"],
        ),
        (
            b"[    2.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b\n",
            "init-died",
            ["signal 11"],
        ),
        (
            b"[    0.9] Initramfs unpacking failed: invalid magic at start of compressed archive\n",
            "initramfs",
            ["invalid magic", "--initrd"],
        ),
        (
            b"[    0.9] Initramfs unpacking failed: write error\n",
            "out-of-memory",
            ["--memory"],
        ),
        (
            b"[    0.9] rootfs image is not initramfs (no cpio magic); looks like an initrd\n",
            "initramfs",
            ["no cpio magic"],
        ),
        (
            b"[    0.9] Kernel panic - not syncing: System is deadlocked on memory\n",
            "out-of-memory",
            ["--memory"],
        ),
        (
            b"\n\nOut of memory while allocating output buffer\n\n -- System halted\n",
            "decompressor",
            ["Out of memory while allocating output buffer", "--memory"],
        ),
        (
            b"[    0.5] BUG: unable to handle page fault for address: ffff88\n"
            b"[    0.5] Oops: 0000 [#1] PREEMPT SMP NOPTI\n"
            b"[    0.6] Kernel panic - not syncing: Fatal exception\n",
            "oops",
            ["page fault"],
        ),
        (
            b"[   26.0] watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [swapper/1:0]\n",
            "lockup",
            ["CPU#1"],
        ),
        (
            b'You are in emergency mode. After logging in, type "journalctl -xb"\n',
            "emergency-shell",
            ["emergency"],
        ),
        (
            b"[    1.0] Warning: unable to open an initial console.\n",
            "no-dev-console",
            ["/dev/console"],
        ),
        (b"[    1.0] Kernel panic - not syncing: whatever else\n", "panic", ["whatever else"]),
        (
            VDA + b"pyvmm-initramfs: no root device /dev/vdz after 3 s; block devices: /dev/vda\n",
            "no-root-device",
            ["/dev/vdz", "root="],
        ),
        (
            b"pyvmm-initramfs: cannot mount /dev/vda as ext4 on /\n",
            "filesystem",
            ["cannot mount /dev/vda"],
        ),
        (b"pyvmm-initramfs: no init: /sbin/x is not on /dev/vda\n", "no-init", ["init="]),
    ],
)
def test_known_failures(text: bytes, kind: str, words: list[str]) -> None:
    found = diagnosis(text)
    assert found.kind == kind
    for word in words:
        assert word in str(found)


def test_a_panic_is_always_among_the_findings() -> None:
    for reason in (b"No working init found.", b"Attempted to kill init! exitcode=0x00000100", b"x"):
        assert "panic" in kinds(read(b"[ 1.0] Kernel panic - not syncing: " + reason + b"\n"))


def test_an_ordinary_boot_has_no_findings() -> None:
    text = b"""\
[    0.000000] Command line: console=ttyS0 root=/dev/vda rw panic=-1
[    0.300000] ACPI: Reserving FACP table memory at [mem 0xe0100-0xe0213]
[    0.900000] EXT4-fs (vda): mounted filesystem with ordered data mode. Quota mode: none.
[    1.000000] Run /sbin/init as init process
[    1.100000] reboot: System halted
ls: cannot access 'x': No such file or directory; it does not exist
Debian GNU/Linux 12 pyvmm ttyS0
"""
    watcher = read(text)
    assert watcher.findings == [] and watcher.diagnosis is None
    assert watcher.last_line == "Debian GNU/Linux 12 pyvmm ttyS0"


def test_each_kind_is_found_once() -> None:
    assert len(read(NO_ROOT_61 * 1000).findings) == 2


def test_escape_sequences_of_the_guest_do_not_reach_the_users_terminal() -> None:
    evil = b"Kernel panic - not syncing: \x1b]0;owned\x07\x1b[2J\x9b31mboo\n"
    text = str(diagnosis(evil))
    assert text.isprintable() and "boo" in text and "\x1b" not in text


def test_memory_is_bounded_and_a_marker_in_an_endless_line_is_found() -> None:
    watcher = ConsoleWatcher()
    for _ in range(100):
        watcher.feed(b"x" * 1000)
    for byte in b"Kernel panic - not syncing: late":
        watcher.feed(bytes([byte]))
    assert len(watcher._line) <= LINE_MAX
    for _ in range(100):
        watcher.feed(b"y" * 1000)
    assert kinds(watcher) == ["panic"]
    assert all(len(str(finding)) < 400 for finding in watcher.findings)


@given(st.lists(st.binary(max_size=200), max_size=30))
def test_noise_is_harmless(chunks: list[bytes]) -> None:
    watcher = ConsoleWatcher()
    for chunk in chunks:
        watcher.feed(chunk)
    assert watcher.bytes_seen == sum(map(len, chunks))


@given(st.data())
def test_findings_do_not_depend_on_chunks(data: st.DataObject) -> None:
    text = (VDA + INITRAMFS_TOOLS + NO_ROOT_61).replace(b"\n", b"\r\n")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    watcher = ConsoleWatcher()
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        watcher.feed(text[start:end])
    whole = ConsoleWatcher()
    whole.feed(text)
    assert watcher.findings == whole.findings


@pytest.mark.parametrize(
    ("cmdline", "word"),
    [
        ("root=/dev/vda", "add console=ttyS0"),
        ("console=hvc0", "console=hvc0 is another device"),
        ("console=hvc0", "or give it that device: --console virtio"),
        ("console=ttyS0", "--console virtio gives it the other one, hvc0"),
        ("console=ttyS0,115200", "earlyprintk=serial,ttyS0,115200"),
        ("console=ttyS0 quiet", "leave out quiet"),
        ("console=ttyS0 earlyprintk=serial", "not even on its early console"),
    ],
)
def test_silence(cmdline: str, word: str) -> None:
    watcher = ConsoleWatcher()
    assert watcher.silence_hint(cmdline, 3.0) is None
    hint = watcher.silence_hint(cmdline, 12.0)
    assert hint and hint.kind == "silent" and word in str(hint)
    assert watcher.silence_hint(cmdline, 12.0, patience=60.0) is None
    watcher.feed(b"x")
    assert watcher.silence_hint(cmdline, 1000.0) is None


@pytest.mark.parametrize(
    ("cmdline", "consoles", "word"),
    [
        ("console=ttyS0 panic=-1", ("ttyS0",), "--console virtio gives it the other one"),
        ("console=hvc0", ("ttyS0", "hvc0"), "without --console virtio it gets the other one"),
        ("console=tty0 console=ttyS0", ("ttyS0",), "CONFIG_SERIAL_8250_CONSOLE"),
        ("console=ttyS0 console=hvc0", ("ttyS0", "hvc0"), "CONFIG_VIRTIO_CONSOLE"),
        ("console=ttyS0 earlyprintk=serial,ttyS0", ("ttyS0",), "hvc0"),
        ("console=hvc0", ("ttyS0",), "--console virtio"),
    ],
)
def test_a_reset_without_a_word_names_the_other_console(
    cmdline: str, consoles: tuple[str, ...], word: str
) -> None:
    watcher = ConsoleWatcher()
    found = watcher.silent_reset(cmdline, consoles=consoles)
    assert found is not None
    assert "reset itself and printed nothing" in found.message and word in found.cure
    watcher.feed(b"x")
    assert watcher.silent_reset(cmdline, consoles=consoles) is None


def test_the_early_console_is_the_machines() -> None:
    early = "earlycon=uart8250,mmio,0x9000000"
    assert [board_for(one).early_console for one in ("x86_64", "aarch64")] == [EARLY, early]
    watcher = ConsoleWatcher()
    hint = watcher.silence_hint("console=ttyS0", 12.0, early=early)
    assert hint and early in hint.cure and "earlyprintk" not in hint.cure
    hint = watcher.silence_hint(f"console=ttyS0 {early}", 12.0, early=early)
    assert hint and "not even on its early console" in str(hint)


def test_silence_of_a_guest_with_a_virtio_console() -> None:
    both = ("ttyS0", "hvc0")
    for cmdline in ("console=hvc0", "console=ttyS0"):
        hint = ConsoleWatcher().silence_hint(cmdline, 12.0, consoles=both)
        assert hint and "another device" not in str(hint)
