"""A second board on a real KVM, with no module of x86: built, run and ended by the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tiny_board

from pyvmm.kvm.system import Kvm


def test_another_boards_machine_runs(kvm: Kvm, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"kernel" + bytes(4090))
    program = [sys.executable, tiny_board.__file__, "run", str(kernel)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["rng None", "b'!' POWEROFF"]
