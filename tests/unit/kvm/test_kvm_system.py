"""/dev/kvm refused or lacking: one line that says what to do."""

from __future__ import annotations

import errno
import grp
import os
import stat
from pathlib import Path

import pytest
from descriptors import open_descriptors

from pyvmm.errors import ConfigError, HostError
from pyvmm.kvm import capabilities, kick, system, uapi
from pyvmm.kvm.probe import ENOUGH_INSTRUCTIONS_PER_SECOND, verdict
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.vm import dirty_pages
from pyvmm.kvm.x86 import lapic, msrs
from pyvmm.kvm.x86.capabilities import REQUIRED as REQUIRED_X86

EMULATED = "--kvm=emulated"


def test_an_absent_device_names_the_modules_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no KVM on this machine") as raised:
        Kvm.open(str(tmp_path / "kvm"))
    assert "kvm_intel" in str(raised.value)
    assert EMULATED in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["/dev/null", "/"])
def test_something_else_than_kvm_is_told_apart(path: str) -> None:
    descriptors = open_descriptors()
    with pytest.raises(ConfigError, match=f"{path} is not a KVM device"):
        Kvm.open(path)
    assert open_descriptors() == descriptors


@pytest.mark.parametrize(
    ("mode", "group", "cure"),
    [
        (0o660, 1, f"group {grp.getgrgid(1).gr_name} "),
        (0o600, 1, "chmod 666 /dev/kvm"),
        (0o660, 0, "chmod 666 /dev/kvm"),
        (0o660, 4_000_000_000, "group kvm "),
    ],
    ids=["its group may", "nobody may", "root's group may", "a group without a name"],
)
def test_no_permission_says_what_would_give_it(
    mode: int, group: int, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: str, flags: int) -> int:
        raise HostError(errno.EACCES, f"open {path}")

    monkeypatch.setattr(system.syscalls, "open_file", refused)
    found = os.stat_result((stat.S_IFCHR | mode, 0, 0, 1, 0, group, 0, 0, 0, 0))
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match=cure) as raised:
        patched.setattr(system.os, "stat", lambda path: found)
        Kvm.open()
    assert EMULATED in str(raised.value)


def test_a_device_without_its_module_keeps_the_errno(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str, flags: int) -> int:
        raise HostError(errno.ENODEV, f"open {path}")

    monkeypatch.setattr(system.syscalls, "open_file", refused)
    with pytest.raises(HostError, match=EMULATED) as raised:
        Kvm.open()
    assert raised.value.errno == errno.ENODEV


def test_another_api_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.syscalls, "ioctl", lambda fd, request, arg, call: 11)
    with pytest.raises(ConfigError, match="API version 11, not 12"):
        Kvm.open("/dev/null")


def test_every_missing_capability_is_named_with_its_reason() -> None:
    lacking = {uapi.KVM_CAP_IRQFD, uapi.KVM_CAP_IOEVENTFD}
    with pytest.raises(ConfigError) as raised:
        capabilities.check(lambda cap: int(cap not in lacking), capabilities.REQUIRED)
    text = str(raised.value)
    assert "KVM_CAP_IRQFD (devices interrupt through eventfds)" in text
    assert "KVM_CAP_IOEVENTFD" in text
    assert "KVM_CAP_IRQCHIP" not in text
    assert "\n" not in text


def test_requirements_carry_the_headers_names_and_a_reason() -> None:
    for need in (*capabilities.REQUIRED, *REQUIRED_X86):
        assert getattr(uapi, need.name) == need.capability
        assert need.reason


def test_the_verdict_says_what_failed_and_whether_it_is_interpreted() -> None:
    bad = verdict(("int3: KVM_EXIT_INTERNAL_ERROR: …", "SSE: no"), 2e6)
    assert not bad.usable
    assert "it fails at int3, SSE (it interprets its guests, 2 million" in bad.reason
    assert "less than a million instructions" in verdict(("int3: no",), 0.4e6).reason
    slow = verdict((), ENOUGH_INSTRUCTIONS_PER_SECOND / 2)
    assert not slow.usable
    assert "too slow" in slow.reason
    good = verdict((), 3e9)
    assert good.usable
    assert "3,000 million" in good.reason
    assert all("\n" not in found.reason for found in (bad, slow, good))


def test_one_failure_is_enough_however_fast() -> None:
    assert not verdict(("int3: no",), 3e9).usable


def test_dirty_pages_are_counted_from_the_lowest_bit() -> None:
    assert dirty_pages(bytes([0b1000_0001, 0, 0b10, 0, 0, 0, 0, 0x80])) == [0, 7, 17, 63]
    assert dirty_pages(bytes(16)) == []


def test_local_pins_are_as_firmware_leaves_them_and_nothing_else_changes() -> None:
    page = bytearray(1024)
    for offset in (lapic.LVT0, lapic.LVT1):
        page[offset : offset + 4] = (0x1_0000).to_bytes(4, "little")  # masked, as after reset
    changed = lapic.with_local_pins(page)
    assert lapic.get_register(changed, lapic.LVT0) == 0x700
    assert lapic.get_register(changed, lapic.LVT1) == 0x400
    for offset in (lapic.LVT0, lapic.LVT1):
        changed[offset : offset + 4] = page[offset : offset + 4]
    assert changed == page


def test_msrs_have_names() -> None:
    assert msrs.name_of(0x277) == "MSR_IA32_CR_PAT"
    assert msrs.name_of(0xDEAD) == "MSR 0xdead"


def test_the_handler_can_be_installed_in_the_main_thread_only() -> None:
    import signal
    import threading

    before = signal.signal(kick.SIGNAL, signal.SIG_DFL)
    raised: list[BaseException] = []

    def elsewhere() -> None:
        try:
            kick.install()
        except ConfigError as error:
            raised.append(error)

    try:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert not kick.installed()
        assert "main thread" in str(raised[0])
    finally:
        signal.signal(kick.SIGNAL, before)
