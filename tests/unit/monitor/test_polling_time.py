"""For how long the devices of a VM may poll: by the machine's processors, and by its KVM."""

from __future__ import annotations

import pytest

from pyvmm.host import processors
from pyvmm.monitor import polling
from pyvmm.monitor.polling import poll_ns


@pytest.fixture
def machine(monkeypatch):
    """A machine of two processors and what its KVM says."""
    files = {"/sys/module/kvm/parameters/halt_poll_ns": "150000\n"}
    monkeypatch.setattr(polling, "read_or_empty", lambda path: files.get(path, ""))
    monkeypatch.setattr(processors, "usable", lambda: 2.0)
    monkeypatch.delenv(processors.INSIDE_VARIABLE, raising=False)
    return files


def says(machine, text: str) -> None:
    machine.update(dict.fromkeys(machine, text))


def test_as_long_as_kvm_polls(machine):
    assert poll_ns(1) == 150_000


@pytest.mark.parametrize(("usable", "time"), [(2.0, 150_000), (1.9, 0), (1.0, 0), (0.5, 0)])
def test_only_with_a_processor_that_no_vcpu_needs(machine, monkeypatch, usable, time):
    monkeypatch.setattr(processors, "usable", lambda: usable)
    assert poll_ns(1) == time


def test_two_vcpus_need_both(machine):
    assert poll_ns(2) == 0


def test_whoever_switches_it_off_in_kvm_switches_it_off_here(machine):
    says(machine, "0\n")
    assert poll_ns(1) == 0


@pytest.mark.parametrize(
    ("text", "time"), [("4000000000\n", 1_000_000), ("", 200_000), ("-1\n", 200_000)]
)
def test_what_kvm_says_is_not_believed_blindly(machine, text, time):
    says(machine, text)
    assert poll_ns(1) == time


def test_an_emulated_host_is_slower_so_all_takes_longer(machine, monkeypatch):
    monkeypatch.setenv(processors.INSIDE_VARIABLE, "1")
    assert poll_ns(1) == 1_500_000
