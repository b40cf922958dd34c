"""kill -9 of the monitor in the middle of writes loses nothing that the guest had fsynced.

And while that guest runs: nobody else gets its disk.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from disks import artifacts, blank_disk, fsck, read_file, root_disk
from guest import HANG_SECONDS, PYVMM, Guest, GuestResult, children, wait_until

from pyvmm.emulated_host.launch import find_program

pytestmark = pytest.mark.usefixtures("linux_guests")

MIB = 1 << 20
RECORDS = 4096
ENOUGH = 40
RECORD_BYTES = 512

# Each record goes to a file on the root file system and to a disk of its own, and is announced only
# when both have been fsynced. A second writer keeps the journal and the queue busy.
WRITER = f"""\
while :; do
    dd if=/dev/zero of=/root/noise bs=64k count=500 oflag=dsync conv=notrunc status=none
done &
exec python3 - <<'END'
import os, signal
log = os.open("/root/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
disk = os.open("/dev/vdb", os.O_WRONLY)
for n in range({RECORDS}):
    os.write(log, b"record %d\\n" % n)
    os.fsync(log)
    os.pwrite(disk, (b"record %d\\n" % n).ljust({RECORD_BYTES}, b"."), n * {RECORD_BYTES})
    os.fsync(disk)
    print(f"synced={{n}}", flush=True)
signal.pause() # however quick this was: it is killed while it runs
END
"""

READER = """\
set -e
echo "root=$(findmnt -n -o SOURCE,OPTIONS /)"
echo "records=$(wc -l < /root/log)"
echo "last=$(tail -n 1 /root/log)"
dmesg | grep -q 'recovery complete' && echo journal=recovered
"""


@dataclass(frozen=True)
class Crash:
    """A killed run, what others got who wanted its disk, and the run after it."""

    killed: GuestResult
    second_pyvmm: subprocess.CompletedProcess[str]
    qemu: subprocess.CompletedProcess[str] | None
    left_over: list[int]
    disk: bytes
    after: GuestResult
    log: bytes
    fsck: str

    @property
    def synced(self) -> int:
        """The number of records that the guest has said to be synced."""
        return 1 + max(map(int, re.findall(r"^synced=(\d+)$", self.killed.console, re.MULTILINE)))


def boot_crash(folder: Path) -> Crash:
    files = artifacts("6.1", "test")
    data = blank_disk(folder / "data.img", RECORDS * RECORD_BYTES)
    with root_disk(folder, "test") as disk:
        victim = Guest(files.bzimage, files.initramfs, [str(disk), str(data)])
        victim.start(WRITER, folder=folder)
        victim.wait_for("synced=0")
        second = _another_pyvmm(victim, disk)
        qemu = _a_qemu(disk)
        victim.wait_for(f"synced={ENOUGH + 1}")
        family = _descendants(victim.process.pid)
        killed = victim.kill()
        wait_until(lambda: not any(map(_is_alive, family)))
        left_over = [pid for pid in family if _is_alive(pid)]
        content = data.read_bytes()
        after = Guest(files.bzimage, files.initramfs, [str(disk)]).run(READER, folder=folder)
        log = read_file(disk, "/root/log")
        clean = fsck(disk)
    return Crash(killed, second, qemu, left_over, content, after, log, clean)


def _another_pyvmm(guest: Guest, disk: Path) -> subprocess.CompletedProcess[str]:
    argv = [*PYVMM, "run", "--kernel", guest.kernel, "--disk", str(disk)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=HANG_SECONDS)


def _qemu(disk: Path) -> list[str]:
    """The command of a QEMU that has `disk`, stopped, and a monitor on its standard input."""
    drive = f"driver=raw,node-name=disk,file.driver=file,file.filename={disk}"
    machine = "-machine microvm -accel tcg -nodefaults -display none -S -monitor stdio"
    device = "virtio-blk-device,drive=disk"
    return ["qemu-system-x86_64", *machine.split(), "-blockdev", drive, "-device", device]


def _a_qemu(disk: Path) -> subprocess.CompletedProcess[str] | None:
    if find_program("qemu-system-x86_64") is None:
        return None
    return subprocess.run(
        _qemu(disk), input="quit\n", capture_output=True, text=True, timeout=HANG_SECONDS
    )


def _descendants(pid: int) -> list[int]:
    found = children(pid)
    return found + [below for child in found for below in _descendants(child)]


def _is_alive(pid: int) -> bool:
    try:
        # After the name, which is in parentheses, comes the state; Z is a zombie.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


crash = pytest.mark.boot.with_args(boot_crash)


@crash
def test_kill_9_ends_all_processes_of_the_run(boot: Crash) -> None:
    assert boot.killed.code == -9
    assert boot.left_over == []


@crash
def test_what_was_synced_to_a_disk_is_in_its_file(boot: Crash) -> None:
    assert boot.synced > ENOUGH
    for n in range(boot.synced):
        record = boot.disk[n * RECORD_BYTES : (n + 1) * RECORD_BYTES]
        assert record == f"record {n}\n".encode().ljust(RECORD_BYTES, b"."), f"record {n} is lost"


@crash
def test_a_second_boot_recovers_the_journal_and_has_every_synced_record(boot: Crash) -> None:
    after = boot.after.check()
    assert after.value("journal") == "recovered"
    assert int(after.value("records")) >= boot.synced
    lines = boot.log.decode().splitlines()
    assert lines == [f"record {n}" for n in range(len(lines))]
    assert boot.fsck == ""


@crash
def test_a_second_pyvmm_on_the_same_disk_is_refused(boot: Crash) -> None:
    assert boot.second_pyvmm.returncode == 2
    *_, line = boot.second_pyvmm.stderr.splitlines()
    assert line.startswith("pyvmm: --disk: ")
    assert "root.img is in use by" in line
    assert "Traceback" not in boot.second_pyvmm.stderr


@crash
def test_qemu_is_refused_the_disk_too(boot: Crash) -> None:
    if boot.qemu is None:
        pytest.skip("needs qemu-system-x86_64")
    assert boot.qemu.returncode != 0
    assert "lock" in boot.qemu.stderr


def test_a_disk_that_qemu_has_is_refused(tmp_path: Path) -> None:
    if find_program("qemu-system-x86_64") is None:
        pytest.skip("needs qemu-system-x86_64")
    disk = blank_disk(tmp_path / "disk.img", MIB)
    with subprocess.Popen(
        _qemu(disk),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as qemu:
        assert qemu.stdin is not None and qemu.stdout is not None
        os.read(qemu.stdout.fileno(), 1)  # its monitor greets when the disk is open
        refused = subprocess.run(
            [*PYVMM, "run", "--kernel", artifacts().bzimage, "--disk", str(disk)],
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )
        qemu.stdin.write(b"quit\n")
        qemu.stdin.close()
    assert refused.returncode == 2
    assert "disk.img is in use by qemu-system-x86" in refused.stderr
