"""Linux's own drivers on virtio-pci: every device, its interrupts, and functions that the guest
resets, takes away, finds again and moves. The newest Linux has every device on virtio-mmio too."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import blank_disk
from lspci import NAMES
from test_linux_net import DIGEST, Server
from vms import debian, messages, script

from pyvmm import VM, Disk
from pyvmm.host.programs import find_program

pytestmark = pytest.mark.usefixtures("linux_guests")

# Each kernel and each number of vCPUs is in one boot; these are what is left.
OTHER_PAIRS = [("6.1", 1), ("6.1", 2), ("6.12", 1), ("6.12", 4), ("7", 2), ("7", 4)]
long = pytest.mark.skipif("EVERY_PAIR" not in os.environ, reason="long; EVERY_PAIR=1 asks for them")

FIND = """\
of() { # DRIVER [N]: the function of the Nth virtio device that the driver has
    for one in /sys/bus/virtio/drivers/$1/virtio*; do readlink -f $one/..; done | sed -n "${2:-1}p"
}
"""
EVERY_DEVICE = """\
set -e
lspci -vv > /run/lspci 2> /run/complaints
echo "lspci=$(base64 -w 0 /run/lspci)"
echo "lspci_complains=$(grep -v 'libkmod resources' /run/complaints || true)" # no modules in there
for function in /sys/bus/pci/devices/*; do
    echo "vectors:${function##*/}=$(ls $function/msi_irqs 2> /dev/null | wc -l)"
done
for driver in blk net console rng balloon; do
    parent=$(of virtio_$driver)
    if [ -e $parent/vendor ]; then
        echo "$driver=$(cat $parent/vendor) $(cat $parent/device) $(cat $parent/revision)"
    else
        echo "$driver=$(basename $(readlink $parent/subsystem)) $(cat $parent/virtio*/device)"
    fi
done
echo "release=$(uname -r)"
echo "processors=$(nproc)"
echo "messages=$(grep -c PCI-MSI /proc/interrupts || true)"
echo "lines=$(grep -c 'IO-APIC.*virtio' /proc/interrupts || true)"
echo "shared=$(grep PCI-MSI /proc/interrupts | grep -c , || true)"
dmesg > /run/dmesg
echo "fatal=$(grep -c 'PCI: Fatal' /run/dmesg || true)"
echo "controls=$(sed -n 's/.*OS now controls \\[\\(.*\\)\\]/\\1/p' /run/dmesg)"
echo "complaints=$(grep -ciE \\
    '(pci|virtio).*(fail|error|invalid|no space|conflict|retains)' /run/dmesg || true)"
echo "ecam=$(grep -cE 'PCI (MMCONFIG|ECAM)' /proc/iomem)"
echo "read=$(sha256sum < /dev/vdb | cut -d' ' -f1)"
dd if=/dev/vdb of=/run/data bs=64k status=none
dd if=/run/data of=/dev/vdc bs=64k conv=fsync status=none
dd if=/dev/hwrng bs=64 count=16 iflag=fullblock status=none | od -An -v -tx1 -w1 | sort -u | wc -l |
    sed 's/^/random=/'
busybox wget -q -O /run/page http://10.0.2.2:PORT/data
echo "download=$(sha256sum < /run/page | cut -d' ' -f1)"
"""


@pytest.mark.parametrize(
    ("kernel", "transport", "cpus"),
    [
        *(("6.1", "pci", 4), ("6.12", "pci", 2), ("7", "pci", 1), ("7", "mmio", 2)),
        *(pytest.param(kernel, "pci", cpus, marks=long) for kernel, cpus in OTHER_PAIRS),
    ],
)
@pytest.mark.skipif(find_program("passt") is None, reason="needs passt (package passt)")
def test_every_device(
    kernel: str, transport: str, cpus: int, microvm_factory: Callable[..., VM], tmp_path: Path
) -> None:
    data = random.Random(7).randbytes(4 << 20)
    (tmp_path / "in").write_bytes(data)
    blank_disk(tmp_path / "out", len(data))
    disks = [Disk(str(tmp_path / "in"), read_only=True), Disk(str(tmp_path / "out"), queues=cpus)]
    vm = microvm_factory(
        **debian(kernel, *disks, variant="test"),
        transport=transport,
        cpus=cpus,
        net="user,host",
        console="virtio",
        rng=True,
        balloon=True,
    )
    port = Server("127.0.0.1").web.getsockname()[1]
    found = script(vm, FIND + EVERY_DEVICE.replace("PORT", str(port)))
    vectors = {
        name.removeprefix("vectors:0000:"): int(found.pop(name))
        for name in list(found)
        if name.startswith("vectors:")
    }
    text = base64.b64decode(found.pop("lspci")).decode()
    lspci_reads_well(text, vectors, len(vm.status()["devices"]) if transport == "pci" else 0)
    digest = hashlib.sha256(data).hexdigest()
    ids = {"blk": 2, "net": 1, "console": 3, "rng": 4, "balloon": 5}
    is_pci = transport == "pci"
    for driver, kind in ids.items():
        place = f"0x1af4 {0x1040 + kind:#06x} 0x01" if is_pci else f"platform {kind:#06x}"
        assert found.pop(driver) == place
    assert found.pop("release").startswith(f"{kernel}.")
    # One for the configuration and one for each queue; on MMIO one for each device: three disks,
    # four others, and the vsock device by which the script came.
    interrupts = int(found.pop("messages")), int(found.pop("lines"))
    assert interrupts[0] >= 2 * len(ids) if is_pci else interrupts == (0, 8), interrupts
    assert not (is_pci and interrupts[1])
    assert int(found.pop("random")) > 100
    assert found == {
        **{
            "lspci_complains": "",
            "controls": "PCIeCapability",
            "shared": "0",
            "fatal": "0",
            "complaints": "0",
            "ecam": "1",
            "processors": str(cpus),
        },
        **{"read": digest, "download": DIGEST},
    }
    assert (tmp_path / "out").read_bytes() == data
    assert messages(vm) == []


def lspci_reads_well(text: str, vectors: dict[str, int], devices: int) -> None:
    """`lspci -vv` in the guest, as root and with its drivers at work, says what each function is.
    `vectors` are how many interrupts Linux has for it, by address."""
    texts = {one.partition(" ")[0]: one for one in text.split("\n\n") if one.strip()}
    bridge = texts.pop("00:00.0")
    assert re.match(r"00:00\.0 Host bridge: Intel Corporation", bridge), bridge
    assert len(texts) == devices
    firsts = [text.partition("\n")[0] for text in texts.values()]
    for name in NAMES.values() if devices else ():
        assert any(re.match(rf"00:\S+ {name}", first) for first in firsts), firsts
    for address, text in texts.items():
        assert re.match(r"00:\S+ .*Red Hat.*\(rev 01\)\n", text), text
        assert "\n\tSubsystem: Red Hat" in text and "Mem+ BusMaster+" in text, text
        assert "\n\tKernel driver in use: virtio-pci" in text, text
        assert "Express (v2) Root Complex Integrated Endpoint" in text, text
        assert "Region 0: Memory at c" in text and "Interrupt: pin" not in text, text
        table = re.search(r"MSI-X: Enable\+ Count=(\d+) Masked-\n", text)
        assert table and 2 <= vectors[address] <= int(table[1]), (vectors, text)
        # pciutils has no names for PCI_CFG and shared memory, and says <unknown> of any device's.
        known = re.findall(r"VirtIO: (\w+)\n\t\t(BAR=0) offset=\w+ size=\w+", text)
        assert dict(known) == dict.fromkeys(("CommonCfg", "Notify", "ISR", "DeviceCfg"), "BAR=0")
        for wrong in ("disabled", "unassigned", "ignored", "denied", "!!!", "rror+", "Abort+"):
            assert wrong not in text, text


FUNCTIONS = """\
set -e
function=$(of virtio_blk 2)
name=${function##*/}
sum() { sha256sum < /dev/vdb | cut -d' ' -f1; }
echo "first=$(sum)"
echo 1 > $function/remove
echo "gone=$(ls /dev/vdb 2>/dev/null)"
echo 1 > /sys/bus/pci/rescan
until [ -b /dev/vdb ]; do sleep 0.1; done
echo "again=$(sum)"
device=$(basename $function/virtio*)
echo $name > /sys/bus/pci/drivers/virtio-pci/unbind
echo "methods=$(cat $function/reset_method)"
echo 1 > $function/reset
echo $name > /sys/bus/pci/drivers/virtio-pci/bind
until [ -b /dev/vdb ]; do sleep 0.1; done
echo "after_reset=$(sum)"
echo $name > /sys/bus/pci/drivers/virtio-pci/unbind
echo 0 > $function/enable 2>/dev/null || true
echo $name > /sys/bus/pci/drivers/virtio-pci/bind
until [ -b /dev/vdb ]; do sleep 0.1; done
echo "after_disable=$(sum)"
dd if=/dev/hwrng bs=64 count=500 iflag=fullblock status=none | wc -c > /run/count &
irq=$(sed -n "s/^ *\\([0-9]*\\):.*virtio.*-input.*/\\1/p" /proc/interrupts | tail -1)
for n in 1 2 3 4 5 6 7 8 9 10; do # a disk's interrupts are bound to their CPU
    for mask in 1 2; do echo $mask > /proc/irq/$irq/smp_affinity; sleep 0.05; done
done
wait
echo "moved=$(cat /run/count)"
"""


def test_functions_that_the_guest_resets_takes_away_and_finds_again(
    microvm_factory: Callable[..., VM], tmp_path: Path
) -> None:
    data = random.Random(8).randbytes(16 << 20)
    (tmp_path / "disk").write_bytes(data)
    disk = Disk(str(tmp_path / "disk"), read_only=True)
    vm = microvm_factory(**debian("6.1", disk), transport="pci", cpus=2, rng=True)
    found = script(vm, FIND + FUNCTIONS)
    digest = hashlib.sha256(data).hexdigest()
    assert "flr" in found.pop("methods")
    assert found == {
        **dict.fromkeys(("first", "again", "after_reset", "after_disable"), digest),
        "gone": "",
        "moved": str(64 * 500),
    }
    assert messages(vm) == []
