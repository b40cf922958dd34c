"""The probe tells a KVM that runs kernels from one that only looks like it."""

from __future__ import annotations

import os

from descriptors import open_descriptors

from pyvmm.kvm.probe import ENOUGH_INSTRUCTIONS_PER_SECOND, probe
from pyvmm.kvm.system import Kvm
from pyvmm.machine.board.registry import board_of_host


def test_the_probe_comes_to_a_verdict_that_fits_its_findings(kvm: Kvm) -> None:
    found = probe(board_of_host().probe_guest(kvm))
    assert found.instructions_per_second > 0
    fast = found.instructions_per_second >= ENOUGH_INSTRUCTIONS_PER_SECOND
    assert found.usable == (fast and not found.failures)
    assert "\n" not in found.reason


def test_the_verdict_agrees_with_what_the_host_is(kvm: Kvm) -> None:
    # Names are not a proof, which is why the probe runs code; here they check the probe.
    found = probe(board_of_host().probe_guest(kvm))
    interpreter = os.path.exists("/sys/module/kvm_pvm")
    hardware = any(os.path.exists(f"/sys/module/kvm_{name}") for name in ("intel", "amd"))
    if interpreter and not hardware:
        assert not found.usable
        assert {failure.partition(":")[0] for failure in found.failures} >= {"int3", "cmpxchg16b"}
    elif hardware and not interpreter:
        assert found.usable, found.reason


def test_the_probe_leaves_nothing_open(kvm: Kvm) -> None:
    probe(board_of_host().probe_guest(kvm))
    before = open_descriptors()
    probe(board_of_host().probe_guest(kvm))
    assert open_descriptors() == before
