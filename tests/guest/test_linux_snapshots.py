"""A Linux guest, saved under load and restored twice: nothing is lost."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import vms
from disks import random_disk

from pyvmm import VM
from pyvmm.control import client
from pyvmm.monitor import snapshots

SAFETY_TIMEOUT = 600

# Files are written, read back past the page cache and compared, for ever; a tick each 100 ms.
LOAD = """
cat > /root/load <<'END'
n=0
while :; do
    n=$((n + 1))
    dd if=/dev/urandom of=/root/file bs=64k count=8 2>/dev/null
    sha256sum /root/file > /root/sum
    sync
    echo 1 > /proc/sys/vm/drop_caches
    sha256sum -c /root/sum >/dev/null 2>&1 || { echo "round $n differs" > /root/lost; exit 1; }
    echo $n > /root/counting && mv /root/counting /root/round
done
END
setsid sh /root/load >/dev/null 2>&1 &
cat > /root/clock <<'END'
while :; do cut -d" " -f1 /proc/uptime >> /run/ticks; sleep 0.1; done
END
setsid sh /root/clock >/dev/null 2>&1 &
until [ -s /root/round ] && [ -s /run/ticks ]; do sleep 0.1; done
dmesg -C
"""
# The disk that came last, once it is there.
FIND = """
until late=$(grep -lx late /sys/block/vd*/serial 2> /dev/null); do sleep 0.1; done
late=${late%/serial}
late=/dev/${late##*/}
until [ -b $late ]; do sleep 0.1; done
"""
WRITE = f"{FIND} dd if=/dev/zero of=$late bs=64k count=1 conv=fsync status=none"
READ = f"""{FIND}
echo "late=$(dd if=$late bs=64k iflag=direct status=none | sha256sum | cut -d' ' -f1)"
"""
LOOK = """
first=$(cat /root/round)
i=0
while [ "$(cat /root/round)" -lt $((first + 2)) ] && [ $i -lt 1000 ]; do
    sleep 0.25
    i=$((i + 1))
done
echo "rounds=$(($(cat /root/round) - first))"
echo "lost=$(cat /root/lost 2>/dev/null)"
awk 'NR > 1 && $1 < before { n++ } { before = $1 } END { print "backwards=" n + 0 }' /run/ticks
echo "warnings=$(dmesg -l emerg,alert,crit,err,warn | tr '\\n' '|')"
"""


def pyvmm(*args: str) -> str:
    argv = [sys.executable, "-m", "pyvmm", *args]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SAFETY_TIMEOUT)
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def saved(linux_guests: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_nothing_is_lost_by_the_original_or_by_its_copies(
    saved: None, transport: str, tmp_path: Path
) -> None:
    look, late = LOOK, ""
    with VM(**vms.debian(), cpus=2, transport=transport, vsock=True) as vm:
        vm.wait_ready()
        vms.script(vm, LOAD)
        if transport == "pci":  # for which the guest has the drivers
            data = random_disk(tmp_path / "late", 1 << 20, seed=7)
            vm.add_disk(f"{data},id=late,snapshot")
            vms.script(vm, WRITE)
            look += READ
            late = hashlib.sha256(bytes(1 << 16) + data.read_bytes()[1 << 16 :]).hexdigest()
        taken = snapshots.take(vm.name, "warm")
        assert taken.paused > 0
        # The one that was saved goes on.
        check(vms.script(vm, look), late)
    names = [f"copy-{os.getpid()}-{transport}-{number}" for number in (1, 2)]
    with ExitStack() as closing:
        for name in names:
            pyvmm("run", "--detach", "--restore", "warm", "--name", name)
            closing.callback(client.stop, name, patience=0.0)
            pyvmm("exec", "--wait", "300", name, "--", "true")
        for name in names:
            text = pyvmm("exec", name, "--", "sh", "-c", look)
            pairs = (line.partition("=") for line in text.splitlines())
            check({key: value for key, _, value in pairs}, late)


def check(seen: dict[str, str], late: str) -> None:
    assert seen.get("late", "") == late, seen
    assert int(seen["rounds"]) >= 2, seen
    assert not seen["lost"], seen
    assert seen["backwards"] == "0", seen
    warnings = [line for line in seen["warnings"].split("|") if line.strip()]
    assert not [line for line in warnings if "stuck" in line or "stall" in line], seen
