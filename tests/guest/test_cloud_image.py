"""Debian's cloud image, whole: cloud-init with a seed as docs/kernels.md has it, a login, the end.

It takes minutes to make, and in an emulated KVM host minutes to boot, so `make cloud` runs these
and `make test` does not; $PYVMM_CLOUD_IMAGE is the path of the image. Where there is none at that
path, one is made of Debian's packages (cloud_image.py).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import cloud_image
import pytest
from documents import ROOT, commands, run_commands

PATIENCE = 1500.0  # seconds; not a measure of speed
IMAGE = os.environ.get("PYVMM_CLOUD_IMAGE", "")

pytestmark = [
    pytest.mark.usefixtures("linux_guests"),
    pytest.mark.skipif(not IMAGE, reason="takes minutes: make cloud"),
]


@pytest.fixture(scope="module")
def image() -> Path:
    path = Path(IMAGE).absolute()
    if not path.exists():
        cloud_image.make(path)
    return path


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    """The disk that the page has its reader make, of the page's own files."""
    page = (ROOT / "docs/kernels.md").read_text()
    [user_data] = re.findall(r"^```yaml\n(#cloud-config.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "user-data").write_text(user_data)
    [block] = [one for one in commands("docs/kernels.md") if "CIDATA" in one]
    making = [line for line in block.splitlines() if not line.startswith("pyvmm")]
    run_commands("\n".join(making), tmp_path, PATIENCE)
    return tmp_path / "seed.img"


def test_it_boots_its_own_kernel_and_one_logs_in(microvm_factory, image: Path, seed: Path) -> None:
    """As anybody would see it, with nothing of ours in the guest."""
    disks = [f"{image},snapshot", f"{seed},readonly"]
    vm = microvm_factory(ready=False, kernel="disk", disks=disks, net="user", memory="1G")
    vm.console.expect(r"Cloud-init v\. .* finished at .*DataSourceNoCloud", timeout=PATIENCE)
    vm.console.sendline()
    vm.console.expect("cloudy login: ", timeout=PATIENCE)
    vm.console.sendline("debian")
    vm.console.expect("Password: ", timeout=PATIENCE)
    vm.console.sendline("only for a test")
    vm.console.expect(r"debian@cloudy:~\$ ", timeout=PATIENCE)
    vm.console.sendline("cloud-init status; cat /run/made-by-the-seed; findmnt -no SOURCE /")
    vm.console.expect(r"status: done\s+yes\s+/dev/vda1\s", timeout=PATIENCE)
    vm.console.sendline("sudo poweroff")
    assert vm.wait(PATIENCE).exit_code == 0
    assert "emergency mode" not in vm.console.text


def test_it_boots_our_kernel_and_has_our_agent(microvm_factory, image: Path, seed: Path) -> None:
    disks = [f"{image},snapshot", f"{seed},readonly"]
    vm = microvm_factory(disks=disks, net="user", memory="1G", timeout=PATIENCE)
    done = vm.run(["cloud-init", "status", "--wait"], timeout=PATIENCE)
    assert b"status: done" in done.stdout, vm.console.tail(60)
    assert vm.run(["cat", "/run/made-by-the-seed"]).stdout == b"yes\n"
    assert vm.run(["hostname"]).stdout == b"cloudy\n"
    assert vm.run(["findmnt", "-no", "SOURCE", "/boot/efi"]).stdout == b"/dev/vda15\n"
    vm.run(["systemctl", "poweroff"])
    assert vm.wait(PATIENCE).exit_code == 0
