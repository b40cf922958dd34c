"""Linux drives packed rings and four queues at a time, and every byte is where it belongs."""

from __future__ import annotations

import pytest
from disks import blank_disk, fsck, random_disk, root_disk, sha256
from guest import HANG_SECONDS
from vms import debian, messages, script

from pyvmm import Disk

pytestmark = pytest.mark.usefixtures("linux_guests")

MIB = 1 << 20
QUEUES = 4
SOURCE_BYTES = 8 * MIB
TARGET_BYTES = 160 * MIB
COPY_BYTES = 8 * MIB
JOB_MIB = 32  # for each CPU, behind the copy
INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED = 28, 29, 32, 34

SCRIPT = f"""\
set -e
for disk in vda vdb vdc; do
    # Each bit is a character, the first one bit 0.
    echo "features-$disk=$(cat /sys/block/$disk/device/features)"
    echo "queues-$disk=$(ls /sys/block/$disk/mq | xargs)"
    echo "cpus-$disk=$(cat /sys/block/$disk/mq/*/cpu_list | sort | xargs)"
done
echo "source=$(sha256sum < /dev/vdb | cut -d' ' -f1)"
echo "direct=$(dd if=/dev/vdb bs=512k iflag=direct status=none | sha256sum | cut -d' ' -f1)"

head -c {COPY_BYTES} /dev/urandom > /dev/shm/random
echo "random=$(sha256sum < /dev/shm/random | cut -d' ' -f1)"
dd if=/dev/shm/random of=/dev/vdc bs=1M oflag=direct status=none

# A job on each CPU, and so on each queue, all at once; each reads back what it wrote.
options="--filename=/dev/vdc --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite
    --bsrange=512-64k --size=8M --verify=crc32c --do_verify=1 --verify_fatal=1 --randseed=7
    --thread --eta=never"
jobs=
for cpu in 0 1 2 3; do
    jobs="$jobs --name=cpu$cpu --offset=$((16 + cpu * {JOB_MIB}))M --cpus_allowed=$cpu $options"
done
if fio $jobs > /run/fio 2>&1; then
    echo "fio=$(grep -o 'err= *[0-9]*' /run/fio | xargs)"
else
    echo fio=failed
    cat /run/fio
fi
"""


@pytest.mark.parametrize(("kernel", "packed"), [("6.1", True), ("6.12", True), ("6.1", False)])
def test_four_queues_carry_every_byte(kernel, packed, microvm_factory, tmp_path):
    source = random_disk(tmp_path / "source.img", SOURCE_BYTES, seed=5)
    target = blank_disk(tmp_path / "target.img", TARGET_BYTES)
    with root_disk(tmp_path, "test") as root:
        disks = [
            Disk(str(root), queues=QUEUES, packed=packed),
            Disk(str(source), read_only=True, queues=QUEUES, packed=packed),
            Disk(str(target), queues=QUEUES, packed=packed),
        ]
        options = debian(kernel, variant="test") | {"disks": disks, "cpus": QUEUES}
        vm = microvm_factory(**options)
        said = script(vm, SCRIPT)
        assert messages(vm) == []
        vm.stop(HANG_SECONDS)
        assert fsck(root) == ""
    for disk in ("vda", "vdb", "vdc"):
        bits = [bit == "1" for bit in said[f"features-{disk}"]]
        assert bits[VERSION_1] and bits[INDIRECT_DESC] and bits[EVENT_IDX]
        assert bits[RING_PACKED] == packed
        # A hardware queue for each CPU.
        assert said[f"queues-{disk}"] == said[f"cpus-{disk}"] == "0 1 2 3"
    assert said["source"] == said["direct"] == sha256(source)
    assert said["random"] == sha256(target, size=COPY_BYTES)
    assert said["fio"] == " ".join(["err= 0"] * QUEUES)
