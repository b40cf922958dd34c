"""Linux guests as `pyvmm.VM`s, for tests with the plugin's fixtures."""

from __future__ import annotations

from typing import Any

import pytest
from disks import artifacts
from guest import OF_THE_MACHINE, wait_until

from pyvmm import VM, Disk


def debian(kernel: str = "6.1", *more_disks: Any, variant: str = "minbase") -> dict[str, Any]:
    """Arguments of microvm_factory for a Debian guest whose root disk is thrown away."""
    files = artifacts(kernel, variant)
    disks = [Disk(files.rootfs, snapshot=True), *more_disks]
    return {
        "kernel": files.bzimage,
        "initrd": files.initramfs,
        "disks": disks,
        "memory": "256M",
    }


def script(vm: VM, text: str) -> dict[str, str]:
    """Run a shell script in the guest; the lines KEY=VALUE that it prints. Fails the test if the
    script fails."""
    done = vm.run(["sh", "-c", text])
    said = done.stdout.decode(errors="replace")
    if done.returncode:
        pytest.fail(f"the script exited with {done.returncode}\n{said}\n{done.stderr.decode()}")
    pairs = (line.partition("=") for line in said.splitlines())
    return {key: value.strip() for key, equals, value in pairs if equals}


def messages(vm: VM) -> list[str]:
    """The monitor's messages, without those that tell of the machine the test runs on."""
    return [line for line in vm.messages if not any(part in line for part in OF_THE_MACHINE)]


def until(what: str, look: Any, condition: Any) -> Any:
    """The first thing that `look` returns and that fulfils `condition`."""
    seen: list[Any] = []

    def found() -> bool:
        seen.append(look())
        return bool(condition(seen[-1]))

    if not wait_until(found):
        pytest.fail(f"never {what}: {seen[-1]}")
    return seen[-1]
