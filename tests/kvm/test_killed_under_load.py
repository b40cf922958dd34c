"""kill -9 of a monitor, its keeper or its helper, at random moments while the guest writes.

Each write is stable before the guest is told (it has no FLUSH), so all that it has said to be
written must be there, and nothing else of the VM. PYVMM_KILL_ROUNDS says how often, PYVMM_KILL_SEED
which moments.
"""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from c_guest import c_guest

from pyvmm.host.programs import find_program
from pyvmm.kvm.system import Kvm

ROUNDS = int(os.environ.get("PYVMM_KILL_ROUNDS", "8"))
SEED = int(os.environ.get("PYVMM_KILL_SEED", "0")) or random.randrange(1 << 32)
SAFETY_TIMEOUT = 120
SECTORS = 7  # of virtio_guest.c: those that it writes in turn, from sector 1 on

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (gcc)"),
    pytest.mark.timeout(max(400, 20 * ROUNDS)),
]


class Kind(NamedTuple):
    confine: str
    qcow2: bool


KINDS = [Kind("auto", False), Kind("strict", False), Kind("auto", True), Kind("strict", True)]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> str:
    return c_guest("virtio_guest.c", tmp_path_factory.mktemp("guest"), "DISK", "RNG")


def family(pid: int) -> dict[int, str]:
    """A process and all below it: when each began, which tells it from a later one."""
    found: dict[int, str] = {}
    left = [pid]
    while left:
        one = left.pop()
        with suppress(OSError):
            found[one] = began(one)
            for task in Path(f"/proc/{one}/task").iterdir():
                left += map(int, (task / "children").read_text().split())
    return found


def began(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def is_there(pid: int, start: str) -> bool:
    """A process whose first thread has ended is there as long as others have not: they hold what
    it had open."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        others = len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False
    return stat[19] == start and (others or stat[0] not in "ZX")


class Vm:
    def __init__(self, folder: Path, kernel: str, kind: Kind) -> None:
        disk = folder / ("disk.qcow2" if kind.qcow2 else "disk.raw")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pyvmm", "run", "--kvm=host", "--kernel", kernel),
                *("--name", "killed", "--disk", str(disk), "--rng", "--confine", kind.confine),
                *("--control-socket", str(folder / "watch")),
            ],
            env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.said = b""

    def hear(self, until: float) -> bool:
        """Take what the guest says until that moment, or its end, which is False."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while (left := until - time.monotonic()) > 0:
            if select.select([fd], [], [], left)[0]:
                data = os.read(fd, 1 << 16)
                self.said += data
                if not data:
                    return False
        return True

    def wait_for(self, has_come: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SAFETY_TIMEOUT
        while not has_come():
            if not self.hear(time.monotonic() + 0.01) or time.monotonic() > deadline:
                self.process.kill()
                assert self.process.stderr is not None
                pytest.fail(f"seed {SEED}: {self.said!r} {self.process.stderr.read()!r}")

    @property
    def acknowledged(self) -> int:
        lines = self.said.replace(b"\r", b"").split(b"\n")[:-1]
        counts = [int(line[1:], 16) for line in lines if line.startswith(b"k")]
        assert counts == list(range(1, len(counts) + 1)), f"seed {SEED}"
        return len(counts)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Path]:
    tmp_path.chmod(0o700)
    yield tmp_path


def fresh_disk(folder: Path, kind: Kind) -> None:
    (folder / "disk.raw").write_bytes(bytes(64 << 10))
    if kind.qcow2:
        target = folder / "disk.qcow2"
        target.unlink(missing_ok=True)
        make = ("qemu-img", "create", "-q", "-f", "qcow2", str(target), "64K")
        subprocess.run(make, check=True)


def contents(folder: Path, kind: Kind) -> bytes:
    if kind.qcow2:
        source = folder / "disk.qcow2"
        check = ("qemu-img", "check", "-q", str(source))
        deadline = time.monotonic() + SAFETY_TIMEOUT
        while True:
            checked = subprocess.run(check, capture_output=True)
            # The kernel may finish requests of a process that has gone, and its lock goes then.
            if b"lock" not in checked.stderr or time.monotonic() > deadline:
                break
            time.sleep(0.005)
        assert checked.returncode in (0, 3), (SEED, checked)  # 3: clusters are lost, none is wrong
        convert = ("qemu-img", "convert", "-O", "raw", str(source), str(folder / "disk.raw"))
        subprocess.run(convert, check=True)
    return (folder / "disk.raw").read_bytes()


def check_disk(data: bytes, acknowledged: int) -> None:
    """The guest writes one sector at a time, so the disk is as it was after one of them, which may
    be one that it had no more time to tell of; that one alone may be written in part."""
    found = [
        {int.from_bytes(data[at : at + 8], "little") for at in range(start, start + 512, 8)}
        for start in range(512, 512 * (SECTORS + 1), 512)
    ]
    newest = max(max(words) for words in found)
    assert newest >= acknowledged, (SEED, found, acknowledged)
    for sector, words in enumerate(found):
        if newest and (newest - 1) % SECTORS == sector:
            assert words == {newest} or acknowledged < newest, (SEED, found, acknowledged)
            assert words <= {newest, max(0, newest - SECTORS)}, (SEED, found, acknowledged)
        else:
            last = [n for n in range(1, newest + 1) if (n - 1) % SECTORS == sector]
            assert words == {last[-1] if last else 0}, (SEED, found, acknowledged)


def test_what_was_acknowledged_is_there_and_nothing_else_is_left(
    kvm: Kvm, disks: Path, kernel: str
) -> None:
    chance = random.Random(SEED)
    kinds = KINDS
    if find_program("qemu-img") is None or find_program("qemu-storage-daemon") is None:
        kinds = [kind for kind in KINDS if not kind.qcow2]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(disks)}
    total = 0
    for number in range(ROUNDS):
        kind = kinds[number % len(kinds)]
        fresh_disk(disks, kind)
        vm = Vm(disks, kernel, kind)
        try:
            vm.wait_for(lambda vm=vm: b"ready" in vm.said)  # type: ignore[misc]
            everybody = family(vm.process.pid)
            assert vm.process.stdin is not None
            vm.process.stdin.write(b"k")
            vm.process.stdin.flush()
            if number % 8 >= 4:  # or else a slow machine may not come to its first write
                vm.wait_for(lambda vm=vm: vm.acknowledged > 0)  # type: ignore[misc]
            vm.hear(time.monotonic() + chance.uniform(0, 0.15))
            others = sorted(set(everybody) - {vm.process.pid})
            victims = [vm.process.pid]
            if others and chance.random() < 0.5:
                victims.insert(0, chance.choice(others))
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
                if len(victims) > 1:
                    vm.hear(time.monotonic() + chance.uniform(0, 0.05))
            vm.process.wait(SAFETY_TIMEOUT)
            vm.hear(time.monotonic() + SAFETY_TIMEOUT)
            deadline = time.monotonic() + SAFETY_TIMEOUT
            while left := [pid for pid, start in everybody.items() if is_there(pid, start)]:
                assert time.monotonic() < deadline, (SEED, kind, left)
                time.sleep(0.005)
            # A helper that was killed first makes errors, which are not an acknowledgement.
            said, _, _ = vm.said.partition(b"IOERR")
            vm.said = said[: said.rfind(b"\n") + 1]
            check_disk(contents(disks, kind), vm.acknowledged)
            total += vm.acknowledged
        finally:
            vm.close()
    assert total, f"seed {SEED}: no write was ever acknowledged"
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "ps"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done
    left_files = {path.name for path in disks.rglob("*") if not path.is_dir()}
    assert left_files <= {
        "disk.raw",
        "disk.qcow2",
        ".lock",
        "killed.log",
        "killed.old",
        "killed.end",
    }
    print(f"{ROUNDS} rounds, {total} acknowledged writes, seed {SEED}")
