"""`pyvmm doctor` and `pyvmm run` agree on whether Linux guests can be run here, and how."""

from __future__ import annotations

import subprocess

from guest import HANG_SECONDS, PYVMM

from pyvmm.machine.host_kvm import why_unusable


def test_the_doctor_says_how_guests_run_here(linux_guests: None) -> None:
    done = subprocess.run([*PYVMM, "doctor"], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    how = "in the emulated KVM host" if why_unusable() else "on this machine's KVM"
    assert f"Linux guests run {how}" in done.stdout.splitlines()[-1]
    # What is wrong comes with what to do about it, on the next line.
    lines = done.stdout.splitlines()
    cures = [lines[n + 1] for n, line in enumerate(lines) if line.startswith("  ✗")]
    assert all(cure.startswith("      ") and cure.strip() for cure in cures)
