"""Disks and network cards that come to a Linux guest and go, under load, and leave nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from footprint import footprint, has_no_more_than
from guest import HANG_SECONDS
from vms import debian, script, until

from pyvmm import VM
from pyvmm.control.protocol import ControlError
from pyvmm.errors import ConfigError
from pyvmm.host.files import open_image
from pyvmm.host.programs import find_program

pytestmark = pytest.mark.usefixtures("linux_guests")

MIB = 1 << 20
SIZE = 4 * MIB
ROUNDS = 2
MANY = int(os.environ.get("HOTPLUG_ROUNDS", "0"))
# A guest of one vCPU is late: it hears of what has been pulled out when that has gone.
CPUS = {"6.1": 1, "6.12": 2}
CONFINED = {"6.1": "auto", "6.12": "strict"}
PATIENCE = HANG_SECONDS  # how long the guest really takes is the machine's affair

# They warn of a machine that is slow.
NO_WATCHDOGS = "nowatchdog rcupdate.rcu_cpu_stall_suppress=1"

FIND = """\
set -e
find_disk() { # the disk called data, once it is there
    until disk=$(grep -lx data /sys/block/vd*/serial 2> /dev/null); do sleep 0.1; done
    disk=${disk%/serial}
    disk=/dev/${disk##*/}
    until [ -b $disk ]; do sleep 0.1; done
}
"""
READ = """\
find_disk
echo "sum=$(sha256sum < $disk | cut -d' ' -f1)"
"""
LOAD = """\
find_disk
fio --name=load --filename=$disk --rw=randread --bs=4k --direct=1 --ioengine=libaio --iodepth=16 \\
    --time_based --runtime=3600 --thread > /run/fio 2>&1 < /dev/null &
echo $! > /run/pid
until read -r reads rest < /sys/block/${disk##*/}/stat && [ $reads -gt 200 ]; do sleep 0.1; done
echo "busy=yes"
"""
# Where the disk was, fio reads nothing, and for ever; or a read has failed, and it has ended.
PULLED = """\
if kill -9 $(cat /run/pid) || grep -i error /run/fio; then echo "was_at_work=yes"; fi
! grep -qx data /sys/block/vd*/serial
"""
CARD = """\
until [ -d /sys/class/net/eth1 ]; do sleep 0.1; done
busybox ip link set eth1 up
busybox udhcpc -i eth1 -n -q -t 20 -T 3 -s /sbin/pyvmm-network > /run/lease 2>&1 ||
    cat /run/lease
echo "address=$(busybox ip -4 -o addr show eth1 | sed 's/.*inet \\([^ /]*\\).*/\\1/')"
"""
# The VM began without any of these, so that the guest had no driver for them.
FIRST = """\
echo "card=$(ls /sys/class/net | grep -v lo)"
until grep -q ^virtio_rng /sys/class/misc/hw_random/rng_current; do sleep 0.1; done
"""
SHARED = """\
echo "shared=$(grep -c ' /mnt virtiofs ' /proc/mounts) $(ls -d /mnt/bin)"
umount /mnt
"""
MARK = """\
find_disk
echo "before=$(dd if=$disk bs=512 skip=1 count=1 status=none | grep -ac layers || true)"
printf layers | dd of=$disk bs=512 seek=1 conv=fsync status=none
echo "after=$(dd if=$disk bs=512 skip=1 count=1 status=none | grep -ac layers || true)"
"""
# It must not be looked at: what is asked of it now is never answered.
LET_GO = "until [ $(ls -d /sys/block/vd* | wc -l) = 1 ]; do sleep 0.1; done"
MOUNT = """\
find_disk
mkfs.ext4 -q -F $disk
mkdir -p /run/mnt
mount $disk /run/mnt
"""
EJECT = """\
find_disk
umount /run/mnt
function=$(readlink -f /sys/block/${disk##*/}/device/..)
for slot in /sys/bus/pci/slots/*; do
    case ${function##*/} in "$(cat $slot/address)".*) echo 0 > $slot/power ;; esac
done
"""
END = """\
dmesg | grep -v 'stall warnings suppressed' > /run/dmesg # NO_WATCHDOGS does that
echo "warnings=$(grep -ciE 'warning|bug:|call trace|hung|fail' /run/dmesg || true)"
grep -iE 'warning|bug:|call trace|hung|fail' /run/dmesg >&2 || true
echo "cards=$(ls /sys/class/net | tr '\\n' ' ')"
"""


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
@pytest.mark.skipif(find_program("passt") is None, reason="needs passt (package passt)")
def test_disks_and_cards_come_and_go(
    kernel: str, microvm_factory: Callable[..., VM], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.write_bytes(random.Random(3).randbytes(SIZE))
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    vm = microvm_factory(
        **debian(kernel, variant="test"),
        **{"transport": "pci", "cpus": CPUS[kernel], "cmdline": NO_WATCHDOGS},
        confine=CONFINED[kernel],
    )
    pairs = devices_of_new_kinds_come_and_go(vm, with_share=CONFINED[kernel] != "strict")
    before = None
    for number in range(ROUNDS):
        assert vm.add_disk(f"{data},id=data") == "data"
        assert script(vm, FIND + READ)["sum"] == digest
        with pytest.raises(ConfigError):  # it is locked
            open_image(str(data), read_only=False)
        if number:
            assert script(vm, FIND + LOAD)["busy"] == "yes"
        vm.remove_disk("data", timeout=PATIENCE)
        if number:
            assert script(vm, PULLED)["was_at_work"] == "yes"
        open_image(str(data), read_only=False).close()
        card = vm.add_net("user")
        assert card == "net-user-2"
        assert script(vm, CARD)["address"] == "10.0.2.15"
        vm.remove_net(card, timeout=PATIENCE)
        if number == 0:
            before = footprint(vm.pid)  # the first time it loads what it needs
    assert before is not None
    has_no_more_than(vm.pid, before)
    assert sorted(vm.status()["devices"]) == ["disk0", "net-user", "vsock"]

    pairs += 2 * ROUNDS + disks_in_layers_come_and_go(vm, data)

    # Taken by force while its driver has it: Linux does not wait for that one's reset for ever, nor
    # for the requests that were under way.
    for work in (READ, LOAD):
        vm.add_disk(f"{data},id=data")
        assert script(vm, FIND + work)
        vm.remove_disk("data", timeout=0, force=True)
        script(vm, LET_GO)
    assert script(vm, PULLED)["was_at_work"] == "yes"
    vm.add_disk(f"{data},id=data")
    script(vm, FIND + MOUNT)
    with pytest.raises(ControlError, match=r"the guest uses data: vd. is mounted at /run/mnt"):
        vm.remove_disk("data", timeout=PATIENCE)
    script(vm, FIND + EJECT)
    pairs += 2
    told = []
    for event in vm.events():
        if event.kind == "device_removed":
            told.append(event)
            if event.details["by"] == "guest":
                break
    assert [event.details["by"] for event in told] == [*["host"] * pairs, "guest"], json.dumps(
        [dict(event.details) for event in told]
    )
    until("unlocked", lambda: _is_free(data), bool)
    assert has_ext4(data)
    end = script(vm, END)
    assert end["warnings"] == "0", vm.run(["cat", "/run/dmesg"]).stdout.decode()
    assert end["cards"].split() == ["eth0", "lo"]


def devices_of_new_kinds_come_and_go(vm: VM, *, with_share: bool) -> int:
    """One of each kind but a disk, of which the card stays; how many have gone."""
    ids = {"net": vm.add_net("user"), "rng": vm.add_rng()}
    for kind, id in ids.items():
        assert vm.wait_for_driver(kind, id, timeout=PATIENCE) is None
    if with_share:
        share = vm.share("/usr:/mnt,readonly")  # an emulated host sees the system's folders
        assert script(vm, FIRST + SHARED) == {"card": "eth0", "shared": "1 /mnt/bin"}
        vm.unshare(share, timeout=PATIENCE)
    else:
        with pytest.raises(ControlError, match="no directory comes to a strictly confined VM in"):
            vm.share("/usr,readonly")
        assert script(vm, FIRST) == {"card": "eth0"}
    vm.remove_rng(ids["rng"], timeout=PATIENCE)
    return 1 + with_share


def disks_in_layers_come_and_go(vm: VM, data: Path) -> int:
    """Disks whose changes go elsewhere than into `data`; how many they were."""
    content = data.read_bytes()
    folder = data.parent
    disks = [
        (f"{data},overlay={folder}/changes", False),
        (f"{data},overlay={folder}/changes", True),
        (f"{data},snapshot", False),
        (f"{data},snapshot", False),
    ]
    if find_program("qemu-img") is not None:
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", data, "-F", "raw"]
        subprocess.run([*create, folder / "top.qcow2"], check=True)
        disks += [(f"{folder}/top.qcow2,backing={data}", has) for has in (False, True)]
    for text, has in disks:
        vm.add_disk(f"{text},id=data")
        found = script(vm, FIND + MARK)
        assert found == {"before": str(int(has)), "after": "1"}, text
        vm.remove_disk("data", timeout=PATIENCE)
        assert data.read_bytes() == content
    return len(disks)


@pytest.mark.skipif(not MANY, reason="long; HOTPLUG_ROUNDS=100 asks for so many rounds")
@pytest.mark.timeout(60 + 120 * MANY)
@pytest.mark.parametrize("kernel", ["6.12"])
def test_a_disk_under_load_comes_and_goes_many_times(
    kernel: str, microvm_factory: Callable[..., VM], tmp_path: Path
) -> None:
    """With a question to the agent first, and with --force and time for the guest, in turns."""
    data = tmp_path / "data"
    data.write_bytes(random.Random(3).randbytes(SIZE))
    vm = microvm_factory(
        **debian(kernel, variant="test"),
        **{"transport": "pci", "cpus": CPUS[kernel], "cmdline": NO_WATCHDOGS},
    )
    before = None
    for number in range(MANY):
        vm.add_disk(f"{data},id=data")
        assert script(vm, FIND + LOAD)["busy"] == "yes"
        vm.remove_disk("data", timeout=PATIENCE, force=number % 2 == 1)
        assert script(vm, PULLED)["was_at_work"] == "yes"
        open_image(str(data), read_only=False).close()
        if number == 3:
            before = footprint(vm.pid)  # each way loads what it needs, once
        print(f"round {number + 1} of {MANY}: {footprint(vm.pid)}")
    if before is not None:
        has_no_more_than(vm.pid, before)
    assert vm.status()["devices"] == ["disk0", "vsock"]
    end = script(vm, END)
    assert end["warnings"] == "0", vm.run(["cat", "/run/dmesg"]).stdout.decode()


def _is_free(path: Path) -> bool:
    try:
        open_image(str(path), read_only=False).close()
    except ConfigError:
        return False
    return True


def has_ext4(path: Path) -> bool:
    """All that the guest had written before it ejected the disk is there."""
    return path.read_bytes()[0x438:0x43A] == b"\x53\xef"
