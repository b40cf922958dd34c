"""A command on this machine's files: `pyvmm run --root / -- true`, and virtme-ng's `vng -- true`.

    .venv/bin/pip install virtme-ng
    python benchmarks/host_root.py [--vng DIR] [--udev DIR] [--json FILE] [--rounds 3]

Both boot the same Debian kernel in one emulated KVM host, in turn, with this machine's files as the
guest's root by the same virtiofsd, and one vCPU; vng has QEMU's microvm and its own init. What is
in there is 10 to 20 times slower than on real KVM, so the ratio is what counts. The first round
fills the page cache and does not count. DIR is a folder of `pip install --target DIR virtme-ng`,
unless it is in the virtual environment.

vng's init finds its ports by udev, and without it ends with 255 and no word. On a machine that has
no udev, --udev names a folder with what Debian's package has (apt-get download udev; dpkg-deb -x).
Its initramfs cannot load modules that are packed with xz, so the kernel is Debian's 6.1.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

import guest_lab

PATIENCE = 900.0  # seconds for one command
MEMORY = "512M"
MONITORS = ("pyvmm", "vng")
WANTED = 1.0  # our time divided by vng's, at most


class Setup(TypedDict):
    """The settings for the part inside the emulated host, as JSON."""

    tree: str
    release: str
    vng: str
    udev: str
    virtiofsd: list[str]
    rounds: int


def installed() -> str:
    """Where pip has put virtme-ng beside this Python; "" if it is not there."""
    return sys.prefix if (Path(sys.prefix) / "bin/vng").is_file() else ""


def lacks(vng: str, udev: str = "") -> str:
    """The reason why the program in the folder `vng` cannot run here; or ""."""
    if not vng or not (Path(vng) / "bin/vng").is_file():
        return "virtme-ng is not installed: .venv/bin/pip install virtme-ng"
    if not udev and not Path("/lib/systemd/systemd-udevd").exists():
        return "udev is not installed, which vng's init needs: name Debian's package by --udev"
    return ""


def command_of(name: str, setup: Setup) -> list[str]:
    """`true` on the files of this machine, by the monitor called `name`."""
    if name == "pyvmm":
        own = [sys.executable, "-m", "pyvmm", "run", "--kvm=host", "--root", "/"]
        return [*own, "--kernel", setup["tree"], "--memory", MEMORY, "--", "true"]
    program = f"{setup['vng']}/bin/vng"
    kernel = f"{setup['tree']}/boot/vmlinuz-{setup['release']}"
    options = ["--run", kernel, "--memory", MEMORY, "--cpus", "1"]
    return [sys.executable, program, *options, "--", "true"]


def install_udev(folder: str) -> None:
    """Put a package's files into the emulated host's file system, which goes with it."""
    pack = subprocess.Popen(["tar", "-C", folder, "-cf", "-", "."], stdout=subprocess.PIPE)
    unpack = ["tar", "-C", "/", "--keep-directory-symlink", "-xf", "-"]
    subprocess.run(unpack, stdin=pack.stdout, check=True)
    if pack.wait():
        raise RuntimeError(f"cannot read {folder}")


def surroundings(setup: Setup) -> dict[str, str]:
    """The environment, in which the first virtiofsd is pyvmm's, and vng's programs are run by this
    Python: the one that they name is where pip was run, and may be gone."""
    if setup["udev"]:
        install_udev(setup["udev"])
    folder = Path("/run/bin")
    folder.mkdir(exist_ok=True)
    programs = {"virtiofsd": setup["virtiofsd"]}
    for program in sorted(Path(setup["vng"], "bin").glob("virtme-*")):
        with program.open("rb") as file:
            if b"python" in file.readline(200):
                programs[program.name] = [sys.executable, str(program)]
    for name, command in programs.items():
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        program.chmod(0o755)
    path = f"{folder}:{setup['vng']}/bin:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return {**os.environ, "PATH": path, "PYTHONPATH": setup["vng"], "HOME": "/root"}


def inside(setup: Setup) -> dict[str, list[float]]:
    """Runs in the emulated host: both, in turn."""
    environment = surroundings(setup)
    found: dict[str, list[float]] = {name: [] for name in MONITORS}
    for number in range(setup["rounds"] + 1):
        for name in sorted(MONITORS, reverse=bool(number % 2)):
            seconds = one_run(command_of(name, setup), environment)
            print(f"{name} {seconds:.2f} s", file=sys.stderr, flush=True)
            if number:
                found[name].append(seconds)
    return found


def one_run(command: list[str], environment: dict[str, str]) -> float:
    """Seconds from start to end. Raises RuntimeError if it fails."""
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
            cwd="/",
        )
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"{command}: more than {PATIENCE:.0f} s: {late.stdout!r}") from None
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout[-3000:]!r}")
    return time.monotonic() - begin


def table(result: dict[str, Any]) -> str:
    """Medians, and our seconds divided by vng's, as a Markdown table."""
    ours, theirs = (result["seconds"][name] for name in MONITORS)
    each = " ".join(f"{one / other:.2f}" for one, other in zip(ours, theirs, strict=True))
    medians = statistics.median(ours), statistics.median(theirs)
    return "\n".join(
        [
            "| pyvmm, s | vng, s | ratio | each round | wanted |",
            "|---|---|---|---|---|",
            f"| {medians[0]:.2f} | {medians[1]:.2f} | {medians[0] / medians[1]:.2f} | {each} |"
            f" at most {WANTED:.1f} |",
        ]
    )


def outside(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare the kernel as a package has it, and start the emulated host."""
    from pyvmm import images
    from pyvmm.monitor.kernel_choice import specify

    kernel = Path(images.artifacts(options.kernel, "test", make=True).bzimage)
    modules = next((kernel.parent / "lib/modules").iterdir())
    with tempfile.TemporaryDirectory() as folder:
        boot = Path(folder) / "boot"
        boot.mkdir()
        (boot / f"vmlinuz-{modules.name}").symlink_to(kernel)
        (Path(folder) / "lib").symlink_to(kernel.parent / "lib")
        specify({"root": "/", "kernel": folder})  # makes what cannot be fetched in there
        setup = Setup(
            tree=folder,
            release=modules.name,
            vng=os.path.abspath(options.vng),
            udev=os.path.abspath(options.udev) if options.udev else "",
            virtiofsd=images.virtiofsd_command(make=True),
            rounds=options.rounds,
        )
        found = guest_lab.run_inside(
            __file__, dict(setup), memory_mib=3072, timeout=options.timeout
        )
    return {"kernel": options.kernel, "seconds": found}


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vng", default=installed(), metavar="DIR", help="where virtme-ng is")
    parser.add_argument("--udev", default="", metavar="DIR", help="Debian's package, unpacked")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments if arguments is None else list(arguments))
    if options.inside:
        print(json.dumps(inside(json.loads(options.inside))))
        return 0
    if reason := lacks(options.vng, options.udev):
        sys.exit(reason)
    result = outside(options)
    print(table(result))
    guest_lab.keep(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
