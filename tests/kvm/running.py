"""A `pyvmm run` of a small guest on real KVM, and the command line that looks after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from boot_images import Elf, Load

SAFETY_TIMEOUT = 60


class Running:
    """A `pyvmm run`, and the command line that looks after it."""

    def __init__(
        self, folder: Path, name: str, code: bytes, *options: str, tmpdir: Path | None = None
    ) -> None:
        """`code` is what the guest does, in long mode; `options` are more of `pyvmm run`. With
        `tmpdir` temporary files are made there."""
        self.name = name
        (folder / "runtime").mkdir(mode=0o700, exist_ok=True)
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder / "runtime")}
        if tmpdir is not None:
            self.environment["TMPDIR"] = str(tmpdir)
        kernel = folder / "kernel"
        load = Load(data=code.ljust(256, b"\x90"))
        kernel.write_bytes(Elf(loads=[load], note=None).build())
        (folder / "disk").write_bytes(bytes(1024))
        self.argv = ("run", "--kvm=host", "--kernel", str(kernel), "--name", name, *options)
        self.process = self.start(*self.argv)
        while not self.ps():
            assert self.process.poll() is None, self.process.stderr.read()  # type: ignore[union-attr]
            time.sleep(0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "pyvmm", *args],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def __call__(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pyvmm", *args],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=SAFETY_TIMEOUT,
        )

    def start_command(self, *args: str) -> subprocess.Popen[str]:
        """One that takes its time."""
        return subprocess.Popen(
            [sys.executable, "-m", "pyvmm", *args],
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ps(self) -> list[dict[str, object]]:
        done = self("ps", "--json")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, object]] = json.loads(done.stdout)
        return found
