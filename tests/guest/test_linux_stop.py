"""Linux acts on the power button, and a reboot starts it again; what it has written is kept."""

from __future__ import annotations

import pytest
from disks import fsck, root_disk
from guest import HANG_SECONDS
from vms import debian, messages

from pyvmm import Disk

pytestmark = pytest.mark.usefixtures("linux_guests")

PRESSED = "asked the guest to power off, by its power button"


def test_a_reboot_and_the_power_button_without_an_agent(microvm_factory, tmp_path) -> None:
    with root_disk(tmp_path) as root:
        options = debian() | {"disks": Disk(str(root)), "vsock": False, "ready": False}
        vm = microvm_factory(**options)
        vm.console.expect_exact("root@pyvmm:", HANG_SECONDS)
        vm.console.sendline("echo kept > /root/kept; sync; busybox reboot -f")
        vm.console.expect_exact("pyvmm: init reached", HANG_SECONDS)
        vm.console.expect_exact("root@pyvmm:", HANG_SECONDS)
        vm.console.sendline("cat /root/kept; echo more > /root/more")
        vm.console.expect_exact("kept\r\n", HANG_SECONDS)
        vm.console.expect_exact("root@pyvmm:", HANG_SECONDS)
        assert vm.status()["restarts"] == 1
        assert vm.stop(HANG_SECONDS).exit_code == 0
        assert messages(vm)[1:] == [f"{vm.name}: {PRESSED}"]
        assert fsck(root) == ""


def test_systemd_acts_on_the_power_button(microvm_factory, tmp_path) -> None:
    with root_disk(tmp_path, "systemd") as root:
        options = debian("6.12", variant="systemd") | {"disks": Disk(str(root)), "ready": False}
        vm = microvm_factory(**options, vsock=False)
        vm.console.expect_exact("login:", HANG_SECONDS)
        assert vm.stop(HANG_SECONDS).exit_code == 0
        assert messages(vm) == [f"{vm.name}: {PRESSED}"]
        assert fsck(root) == ""
