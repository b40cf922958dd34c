"""Linux's own virtio_pmem and nd_pmem drivers: a file system on a file of the host, without a page
cache between the two.

One kernel makes the file system, the other finds it: both drive the device in either direction, the
first by its configuration, the second by its shared memory region.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from disks import blank_disk, fsck, random_disk, read_file, replay_journal, sha256
from guest import HANG_SECONDS
from vms import debian, messages, script

from pyvmm import VM

pytestmark = pytest.mark.usefixtures("linux_guests")

MIB = 1 << 20
SIZE = 34 * MIB  # not a whole memory section of Linux's

MOUNT = """\
set -e
mkdir -p /run/memory
mount -o dax /dev/pmem0 /run/memory
echo "mounted=$(sed -n 's|^/dev/pmem0 /run/memory ext4 ||p' /proc/mounts)"
"""
MAKE = (
    "mke2fs -q -b 4096 -t ext4 /dev/pmem0\n"
    + MOUNT
    + """\
head -c 6M /dev/urandom > /run/memory/data
sync -f /run/memory
echo "data=$(sha256sum < /run/memory/data | cut -d' ' -f1)"
echo "source=$(sha256sum < /dev/pmem1 | cut -d' ' -f1)"
echo "size=$(blockdev --getsize64 /dev/pmem0) $(blockdev --getsize64 /dev/pmem1)"
# Linux cannot be told that it may only read. Each of these words is an exit.
dd if=/dev/zero of=/dev/pmem1 bs=4k count=1 oflag=direct status=none || true
echo "after=$(sha256sum < /dev/pmem1 | cut -d' ' -f1)"
umount /run/memory
"""
)
FIND = (
    MOUNT
    + """\
echo "data=$(sha256sum < /run/memory/data | cut -d' ' -f1)"
head -c 1M /dev/urandom > /run/memory/more
sync -f /run/memory
echo "more=$(sha256sum < /run/memory/more | cut -d' ' -f1)"
# A disk's buffers cannot be in there: direct I/O fails, other I/O goes through RAM.
head -c 1M /dev/urandom > /run/memory/buffer
direct="--name=direct --ioengine=psync --rw=write --bs=64k --size=1M --filename=/dev/vdb"
if fio $direct --direct=1 --iomem=mmapshared:/run/memory/buffer > /run/error 2>&1; then
    echo direct=done
else
    echo "direct=$(grep -o -m 1 'Input/output error' /run/error)"
fi
dd if=/run/memory/more of=/dev/vdb bs=64k conv=fsync status=none
dd if=/run/memory/more of=/dev/vdb bs=64k seek=16 oflag=direct conv=fsync status=none
"""
)


AGAIN = """\
cd /run/memory
for one in data more; do echo "$one=$(sha256sum < $one | cut -d' ' -f1)"; done
cat data > more
sync -f .
echo "copied=$(sha256sum < more | cut -d' ' -f1)"
"""


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_a_file_is_memory_with_a_file_system_in_it(
    microvm_factory, tmp_path, transport, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    memory = blank_disk(tmp_path / "memory", SIZE)
    source = random_disk(tmp_path / "source", 2 * MIB, seed=1)
    checksum = sha256(source)
    pmem = [str(memory), f"{source},readonly"]
    vm = microvm_factory(**debian("6.1"), pmem=pmem, transport=transport)
    said = script(vm, MAKE)
    assert "dax=always" in said["mounted"]
    assert said["size"] == f"{SIZE} {2 * MIB}"
    assert said["source"] == said["after"] == checksum == sha256(source)
    assert vm.stats()["devices"]["pmem0"]["flushes"] > 0
    assert len([line for line in messages(vm) if "read-only" in line]) == 1
    vm.stop(HANG_SECONDS)
    assert fsck(memory) == ""
    assert checksum_in(memory, "/data") == said["data"]
    find_it_again(microvm_factory, memory, said["data"], tmp_path, transport)


def find_it_again(
    microvm_factory: object, memory: Path, data: str, folder: Path, transport: str
) -> None:
    disk = blank_disk(folder / "disk", 4 * MIB)
    options = debian("6.12", str(disk), variant="test")
    vm: VM = microvm_factory(**options, pmem=str(memory), transport=transport)  # type: ignore[operator]
    said = script(vm, FIND)
    assert "dax=always" in said["mounted"]
    assert said["data"] == data
    assert said["direct"] == "Input/output error"
    # What has been synced is in the file, though the guest never ends; of its names and sizes the
    # file system has promised that they are in its journal.
    if transport == "pci":
        vm.snapshot("mounted", stop=True)
        vm.wait(HANG_SECONDS)
    else:
        vm.kill()
    replay_journal(memory)
    assert checksum_in(memory, "/more") == said["more"]
    if transport == "pci":
        goes_on(data, said["more"])
        assert checksum_in(memory, "/more") == said["more"]
    assert sha256(disk, size=MIB) == sha256(disk, start=MIB, size=MIB) == said["more"]


def goes_on(data: str, more: str) -> None:
    """The guest that was saved has all that it had in its memory, and changes its own alone."""
    with VM.restore("mounted") as vm:
        vm.wait_ready(HANG_SECONDS)
        said = script(vm, AGAIN)
        assert (said["data"], said["more"]) == (data, more)
        assert said["copied"] == data
        assert vm.stats()["devices"]["pmem0"]["flushes"] > 0


def checksum_in(image: Path, name: str) -> str:
    """Of a file in an ext4 image."""
    return hashlib.sha256(read_file(image, name)).hexdigest()
