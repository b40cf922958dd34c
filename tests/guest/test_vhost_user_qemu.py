"""A QEMU guest, in the emulated host, that boots from a disk which we serve over vhost-user, and
writes to another whose back end is killed twice meanwhile."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from disks import artifacts

pytestmark = pytest.mark.usefixtures("linux_guests")

HANG_SECONDS = 400
DATA_BYTES = 16 << 20

IN_THE_GUEST = """\
set -e
echo "root=$(sed -n 's:^\\(/dev/[^ ]*\\) / .*:\\1:p' /proc/mounts)"
echo "serial=$(cat /sys/block/vdb/serial)"
dd if=/dev/urandom of=/dev/vdb bs=1M count=8 oflag=direct status=none
dd if=/dev/urandom of=/dev/vdb bs=4k count=512 seek=2048 conv=fsync status=none
echo "written=$(sha256sum < /dev/vdb | cut -d' ' -f1)"
"""

# q35's firmware does not get through this emulated processor, so it is microvm with a PCI bus.
# Both disks are served by processes of their own; QEMU's memory is a memfd that it lends them.
IN_THE_HOST = """\
set -e
truncate -s {size} /run/data.img
serve() {{
    setsid {python} -m pyvmm vhost-user-blk --socket "$1" --disk "$2" &
    server=$!
}}
serve /run/root.sock {root},readonly
root=$server
serve /run/data.sock /run/data.img,id=data
echo $server > /run/data.pid
# Its back end, with the process of the connection, once the guest has written that many MiB.
kill_after() {{
    while [ $(stat -c %b /run/data.img) -lt $(($1 * 2048)) ]; do sleep 0.05; done
    kill -9 -$(cat /run/data.pid)
    echo "killed=$1"
    serve /run/data.sock /run/data.img,id=data
    echo $server > /run/data.pid
}}
(kill_after 2; kill_after 9) &
while ! [ -S /run/root.sock ] || ! [ -S /run/data.sock ]; do sleep 0.1; done
timeout {seconds} qemu-system-x86_64 -enable-kvm -cpu host -m 384M \\
    -M microvm,pcie=on,x-option-roms=off,rtc=on,memory-backend=ram \\
    -object memory-backend-memfd,id=ram,size=384M,share=on \\
    -nodefaults -no-user-config -nographic -serial stdio -no-reboot \\
    -chardev socket,id=root,path=/run/root.sock -device vhost-user-blk-pci,chardev=root \\
    -chardev socket,id=data,path=/run/data.sock,reconnect=1 \\
    -device vhost-user-blk-pci,chardev=data,num-queues=1 \\
    -kernel {kernel} -initrd {initrd} \\
    -append "console=ttyS0 quiet panic=-1 root=/dev/vda ro pyvmm.exec={script}" < /dev/null
echo "file=$(sha256sum < /run/data.img | cut -d' ' -f1)"
kill $root $(cat /run/data.pid)
wait
"""


@pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"
)
def test_a_qemu_guest_boots_from_our_disk_and_writes_to_another_that_is_killed(
    tmp_path: Path,
) -> None:
    made = artifacts()
    script = base64.b64encode(IN_THE_GUEST.encode()).decode()
    inside = tmp_path / "inside.sh"
    inside.write_text(
        IN_THE_HOST.format(
            size=DATA_BYTES,
            python=sys.executable,
            root=made.rootfs,
            kernel=made.bzimage,
            initrd=made.initramfs,
            script=script,
            seconds=HANG_SECONDS - 60,
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm.emulated_host", "--memory", "1536", "--", "sh", str(inside)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=HANG_SECONDS,
    )
    text = done.stdout.decode(errors="replace").replace("\r", "")
    assert done.returncode == 0, text[-4000:]
    found = dict(re.findall(r"^(root|serial|written|file)=(.*)$", text, re.MULTILINE))
    assert found["root"] == "/dev/vda"
    assert found["serial"] == "data"
    assert len(found["written"]) == 64
    assert found["written"] == found["file"], "the guest read what is not in the file"
    # In the middle of what the guest wrote; it has noticed nothing.
    assert re.findall("^killed=(.*)$", text, re.MULTILINE) == ["2", "9"]
    assert text.count("front end connected") >= 4
