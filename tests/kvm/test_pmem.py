"""A machine with --pmem on real KVM, without a Linux in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from echo_guest import echo_kernel

from pyvmm import VM, ConfigError
from pyvmm.kvm.system import Kvm

MIB = 1 << 20


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))


def test_files_are_a_guests_own_as_long_as_it_runs(kvm: Kvm, tmp_path: Path) -> None:
    kernel = echo_kernel(tmp_path)
    paths = [tmp_path / "first", tmp_path / "second"]
    for path in paths:
        path.write_bytes(bytes(2 * MIB))
    pmem = [str(paths[0]), f"{paths[1]},readonly"]
    with VM(kernel=kernel, kvm="host", pmem=pmem, vsock=False) as vm:
        vm.console.expect("ready")
        devices = vm.stats()["devices"]
        assert {name: device["type"] for name, device in devices.items()} == {
            "pmem0": 27,
            "pmem1": 27,
        }
        assert devices["pmem0"]["flushes"] == 0
        with pytest.raises(ConfigError, match=rf"--pmem: {paths[0]} is in use by .*PID {vm.pid}"):
            VM(kernel=kernel, kvm="host", pmem=pmem[0]).start()
        with VM(kernel=kernel, kvm="host", pmem=pmem[1], vsock=False) as reader:
            reader.console.expect("ready")
        vm.console.send("R")  # starts again, with the same files
        vm.console.expect("ready")
    with VM(kernel=kernel, kvm="host", pmem=pmem[0], vsock=False) as vm:
        vm.console.expect("ready")
