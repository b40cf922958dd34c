"""Linux's own virtio-net driver on vhost-net, which is there by default, on either transport; and
the unit tests where the kernel has that."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from guest import HANG_SECONDS
from taps import boot_with_taps

from pyvmm.host import vhost
from pyvmm.machine.host_kvm import why_unusable

pytestmark = pytest.mark.usefixtures("linux_guests")

UNIT_TESTS = Path(__file__).parent.parent / "unit" / "virtio/net" / "test_net_vhost.py"
PEER = Path(__file__).parent / "net_peer.py"
SEED, BYTES = 7, 8_000_001
SCRIPT = """\
transfers() {
    busybox nc 10.77.0.1 7001 < /dev/null > /dev/shm/data
    echo "download$1=$(sha256sum < /dev/shm/data | cut -d' ' -f1)"
    echo "upload$1=$(busybox nc 10.77.0.1 7002 < /dev/shm/data)"
}
echo "kernel_threads=$(busybox nc 10.77.0.1 7003 < /dev/null)"
echo "queues=$(ethtool -l eth0 | sed -n 's/^Combined:[^0-9]*//p' | tr '\\n' ' ')"
for name in rx-checksumming tx-checksumming tcp-segmentation-offload; do
    echo "$name=$(ethtool -k eth0 | sed -n "s/^$name: //p")"
done
transfers 1
ethtool -L eth0 combined 2 && echo "two=yes"
transfers 2
ethtool -L eth0 combined 1 && echo "one=yes"
busybox ping -q -c 20 -i 0.1 -s 1400 10.77.0.1 > /run/ping && echo "ping=ok" || cat /run/ping
driver=/sys/bus/virtio/drivers/virtio_net
device=$(basename "$(readlink -f /sys/class/net/eth0/device)")
echo "$device" > $driver/unbind
echo "$device" > $driver/bind
busybox ip addr add 10.77.0.2/24 dev eth0
busybox ip link set eth0 up
transfers 3
# Of the pair in use.
echo "messages=$(busybox awk '/PCI-MSI.*-input/ && $2 > 0 { n++ } END { print n + 0 }' \\
    /proc/interrupts)"
echo "errors=$(cat /sys/class/net/eth0/statistics/rx_errors)"
"""


@pytest.mark.parametrize(("kernel", "transport"), [("6.1", "mmio"), ("6.12", "pci")])
def test_data_both_ways_queues_and_the_driver_bound_anew(
    kernel: str, transport: str, tmp_path: Path
) -> None:
    nets = ["tap=vmtap0,address=10.77.0.1/24,queues=2"]
    peer = [sys.executable, str(PEER), str(SEED), str(BYTES)]
    result = boot_with_taps(tmp_path, kernel, SCRIPT, nets, peer, transport=transport).check()
    digest = hashlib.sha256(random.Random(SEED).randbytes(BYTES)).hexdigest()
    values = {
        "kernel_threads": "2",
        "queues": "2 1",  # the most, and those in use: Linux takes one for each CPU
        "rx-checksumming": "on [fixed]",
        "tx-checksumming": "on",
        "tcp-segmentation-offload": "on",
        **{f"{way}{n}": digest for n in (1, 2, 3) for way in ("download", "upload")},
        "two": "yes",
        "one": "yes",
        "ping": "ok",
        "messages": "1" if transport == "pci" else "0",
        "errors": "0",
    }
    assert {key: result.value(key) for key in values} == values
    assert result.messages == []


def test_the_unit_tests_where_the_kernel_has_vhost() -> None:
    if os.access(vhost.DEVICE, os.R_OK | os.W_OK):
        pytest.skip(f"there is a {vhost.DEVICE} here: tests/unit has run them already")
    assert why_unusable() is not None, "a KVM host without vhost-net: `modprobe vhost_net`"
    argv = [sys.executable, "-m", "pyvmm.emulated_host", "--memory", "900", "--"]
    argv += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(UNIT_TESTS)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    assert "skipped" not in done.stdout
