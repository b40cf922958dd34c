"""Linux's own virtiofs driver on shared directories, mounted by the initramfs and by hand."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from socket import AF_UNIX, socket

import pytest
from vms import debian, script

from pyvmm import VM
from pyvmm.control.protocol import ControlError

pytestmark = pytest.mark.usefixtures("linux_guests")

USE = """\
cd "/mnt/a b"
echo "mounted=$(sed -n 's|^share0 /mnt/a\\\\040b \\(virtiofs rw\\).*|\\1|p' /proc/mounts)"
echo "read=$(cat file) $(cat $(printf '\\377\\376'))"
echo "link=$(readlink out) $(cat out 2> /dev/null || echo nothing)"
echo from the guest > new
mkdir -p deep/er && mv new deep/er/
ln file twin && rm file
dd if=/dev/urandom of=large bs=64k count=32 status=none
sync large
echo "sum=$(sha256sum < large | cut -d' ' -f1)"
echo "again=$(dd if=large bs=64k iflag=direct status=none | sha256sum | cut -d' ' -f1)"
mknod null c 1 3 2> /dev/null && echo node=made || echo node=refused
mkdir /mnt/usr
mount -t virtiofs tools /mnt/usr
echo "tools=$(cat /mnt/usr/tool)"
touch /mnt/usr/new 2> /dev/null && echo readonly=no || echo readonly=yes
echo "error=$(touch /mnt/usr/new 2>&1 | grep -o 'Read-only file system')"
exec 9> lock && flock -xn 9 && ! flock -xn lock true && echo "locked=here"
exec 9>&-
exec 9< hostlock && flock -xn 9 && echo "hosts_lock=unseen"
exec 9>&-
[ -p fifo ] && [ -S socket ] && echo "kinds=fifo socket"
ln -s "$(printf '\\377')" odd && echo "odd=$(readlink odd | base64)"
cd /
umount "/mnt/a b"
mount -t virtiofs share0 /mnt && echo "remounted=$(cat /mnt/deep/er/new)"
echo "host=$(cat /mnt/later 2> /dev/null || echo missing)"
"""


@pytest.mark.parametrize(("kernel", "transport"), [("6.1", "mmio"), ("6.12", "pci")])
def test_a_guest_works_in_a_shared_directory(
    microvm_factory, tmp_path: Path, request, monkeypatch, kernel: str, transport: str
) -> None:
    folder, tools = tmp_path / "a,b", tmp_path / "tools"
    folder.mkdir()
    tools.mkdir()
    (folder / "file").write_text("hello")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe")).write_text("bytes")
    (folder / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("out of reach")
    (tools / "tool").write_text("a tool")
    os.mkfifo(folder / "fifo")
    closing = ExitStack()
    request.addfinalizer(closing.close)
    closing.enter_context(socket(AF_UNIX)).bind(str(folder / "socket"))
    lock = closing.enter_context((folder / "hostlock").open("w"))
    fcntl.flock(lock, fcntl.LOCK_EX)
    shares = [
        {"path": str(folder), "mountpoint": "/mnt/a b"},
        {"path": str(tools), "read_only": True, "tag": "tools"},
    ]
    vm: VM = microvm_factory(**debian(kernel), shares=shares, transport=transport)
    vm.wait_ready()
    found = script(vm, USE)
    expected = {
        "mounted": "virtiofs rw",
        "read": "hello bytes",
        "link": f"{tmp_path / 'secret'} nothing",
        "again": found["sum"],
        "node": "refused",
        "tools": "a tool",
        "readonly": "yes",
        "error": "Read-only file system",
        "remounted": "from the guest",
        "locked": "here",
        "hosts_lock": "unseen",
        "kinds": "fifo socket",
        "odd": "/wo=",
        "host": "missing",
    }
    assert {key: found.get(key) for key in expected} == expected, vm.console.tail()
    assert (folder / "deep/er/new").read_text() == "from the guest\n"
    assert (folder / "twin").read_text() == "hello" and not (folder / "file").exists()
    assert not (folder / "null").exists() and os.listdir(tools) == ["tool"]
    assert os.readlink(os.fsencode(folder / "odd")) == b"\xff"
    one_that_comes_and_goes(vm, tmp_path / "late")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with goes_on(vm, folder) if transport == "pci" else nullcontext(vm) as vm:
        shutil.rmtree(tools)
        # The guest may remember for a moment what was there.
        script(vm, "while cat /mnt/usr/tool 2> /dev/null; do sleep 0.1; done")
        found = script(
            vm, "echo left=$(ls /mnt/usr); cat /mnt/usr/tool 2> /dev/null || echo gone=yes"
        )
        assert found == {"left": "", "gone": "yes"}


HOLD = """\
cat > /run/holder <<'END'
cd /mnt/deep
exec 3>> er/log 4< ../gone
n=0
while :; do
    n=$((n + 1))
    echo $n >&3
    sleep 0.1
done
END
setsid sh /run/holder > /dev/null 2>&1 &
echo $! > /run/holder.pid
until [ -s /mnt/deep/er/log ]; do sleep 0.1; done
"""
LOOK = """\
log=/mnt/deep/er/log
first=$(wc -l < $log)
until [ $(wc -l < $log) -gt $((first + 2)) ]; do sleep 0.1; done
holder=/proc/$(cat /run/holder.pid)
echo "cwd=$(cat $holder/cwd/er/new)"
echo "gone=$(cat $holder/fd/4 2>&1 | grep -o 'error' || echo there)"
echo "new=$(cat /mnt/new)"
echo "count=$(awk 'NR > 1 && $1 != before + 1 { n++ } { before = $1 } END { print n + 0 }' $log)"
"""


@contextmanager
def goes_on(vm: VM, folder: Path) -> Iterator[VM]:
    """The VM, from a snapshot, with what it has open in its shared directory."""
    (folder / "gone").write_text("for a while")
    script(vm, HOLD)
    vm.snapshot("shared", stop=True)
    vm.wait()
    (folder / "gone").unlink()
    (folder / "new").write_text("from the host")
    with VM.restore("shared") as restored:
        restored.wait_ready()
        expected = {"cwd": "from the guest", "gone": "error", "new": "from the host", "count": "0"}
        assert script(restored, LOOK) == expected, restored.console.tail()
        script(restored, "kill $(cat /run/holder.pid)")
        with restored.clone() as copy:
            seen = script(copy, "echo seen=$(cat /mnt/new); echo by its copy > /mnt/made")
            assert seen == {"seen": "from the host"}
        assert (folder / "made").read_text() == "by its copy\n"
        yield restored


def one_that_comes_and_goes(vm: VM, folder: Path) -> None:
    """The guest's agent mounts it; while it is mounted it stays."""
    folder.mkdir()
    (folder / "file").write_text("came late")
    name = vm.share(f"{folder}:/mnt/a new place,readonly,tag=late")
    assert name == "share-late" and "share-late" in vm.status()["devices"]
    assert script(vm, "echo said=$(cat '/mnt/a new place/file')") == {"said": "came late"}
    with pytest.raises(ControlError, match="mounted at"):
        vm.unshare(name)
    script(vm, "umount '/mnt/a new place'")
    vm.unshare(name)
    assert "share-late" not in vm.status()["devices"]
