"""A guest with taps made where the monitor runs, and a program that runs beside it there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from disks import artifacts, root_disk
from guest import HANG_SECONDS, GuestResult, text

from pyvmm.emulated_host.spec import cpus_for
from pyvmm.machine.host_kvm import why_unusable


def boot_with_taps(
    folder: Path,
    kernel: str,
    script: str,
    nets: Sequence[str],
    beside: Sequence[str],
    *,
    cpus: int = 1,
    transport: str = "mmio",
) -> GuestResult:
    """Run `script` in a guest with network cards as in ``--net``, the first of which is
    10.77.0.2/24. `beside` is a command that runs meanwhile, on the same machine, and prints to the
    same place; it is killed at the end."""
    files = artifacts(kernel, "test")
    script_disk = folder / "script.img"
    content = script.encode()
    script_disk.write_bytes(content + bytes(-len(content) % 512))
    with root_disk(folder, "test") as disk:
        run = [
            *(sys.executable, "-m", "pyvmm", "run", "--kvm", "host"),
            *("--kernel", files.bzimage, "--initrd", files.initramfs, "--cpus", str(cpus)),
            *(
                "--transport",
                transport,
                "--memory",
                "256M",
                "--disk",
                str(disk),
                "--disk",
                f"{script_disk},readonly",
            ),
            *(part for net in nets for part in ("--net", net)),
            *("--cmdline", "pyvmm.exec=/dev/vdb pyvmm.ip=10.77.0.2/24"),
        ]
        count = len(beside)
        # The first words are the command that runs beside, the others the monitor.
        words = " ".join(f'"${{{place}}}"' for place in range(1, count + 1))
        shell = f'{words} & peer=$!; shift {count}; "$@"; code=$?; kill $peer; exit $code'
        argv = ["sh", "-c", shell, "sh", *beside, *run]
        if why_unusable() is not None:
            options = ["--cpus", str(cpus_for(cpus)), "--memory", "900", "--disk", str(disk)]
            argv = [sys.executable, "-m", "pyvmm.emulated_host", *options, "--", *argv]
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=HANG_SECONDS
            )
        except subprocess.TimeoutExpired as late:
            so_far = GuestResult(argv, -1, text(late.stdout or b""), text(late.stderr or b""))
            pytest.fail(f"the guest hangs\n{so_far.ending()}")
    return GuestResult(argv, done.returncode, text(done.stdout), text(done.stderr))
