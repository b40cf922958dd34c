"""`make bench`: every benchmark in turn; tables, and JSON in benchmarks/results/.

    python benchmarks/run.py [PART…] [--quick]

A part that this machine cannot run is skipped, and the reason is printed. Results:
benchmarks/results/latest.json, with what machine they are from, and latest.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RESULTS = HERE / "results"


class Part(NamedTuple):
    """A benchmark of this folder. `lacks` says why it cannot run here, or ""."""

    name: str
    title: str
    quick: tuple[str, ...]  # the arguments of --quick
    lacks: Callable[[], str]


def lacks_kvm() -> str:
    """Why no guest can run on this machine's KVM, not even a small one; or ""."""
    from pyvmm.errors import PyvmmError
    from pyvmm.kvm.system import Kvm

    try:
        with Kvm.open() as kvm:
            kvm.check_required()
    except PyvmmError as error:
        return str(error)
    return ""


def lacks_kvm_or_compiler() -> str:
    """As `lacks_kvm`, and a C compiler must be there to compare with."""
    return lacks_kvm() or ("" if shutil.which("gcc") else "gcc is not installed")


def lacks_qemu() -> str:
    """Why there can be no emulated KVM host; or ""."""
    return "" if shutil.which("qemu-system-x86_64") else "qemu-system-x86_64 is not installed"


def lacks_storage_daemon() -> str:
    """Why there is no qemu-storage-daemon to compare with; or ""."""
    from pyvmm import images
    from pyvmm.errors import PyvmmError

    try:
        images.storage_command("qemu-storage-daemon", make=True)
    except PyvmmError as error:
        return str(error)
    return ""


PARTS = (
    Part(
        "native_kvm",
        "Exits to user space: pyvmm's loop against a plain C loop",
        ("--rounds", "5"),
        lacks_kvm_or_compiler,
    ),
    Part("start", "Start of `pyvmm run`", ("--rounds", "5"), lacks_kvm),
    Part(
        "blk_mock",
        "virtio-blk without a guest: 4 KiB reads a second",
        ("--seconds", "0.5"),
        lambda: "",
    ),
    Part(
        "queues", "Virtqueues by themselves: nanoseconds per chain", ("--rounds", "50"), lambda: ""
    ),
    Part("net", "Network: pyvmm and QEMU microvm", ("--rounds", "1"), lacks_qemu),
    Part("boot", "Boot to init: pyvmm and QEMU microvm", ("--runs", "1"), lacks_qemu),
    Part(
        "vhost_user",
        "virtio-blk over vhost-user: pyvmm and qemu-storage-daemon",
        ("--rounds", "1", "--seconds", "0.3"),
        lacks_storage_daemon,
    ),
)


def run_part(part: Part, *, quick: bool) -> tuple[dict[str, Any], str]:
    """Its JSON and its table. What it says meanwhile on standard error is shown."""
    with tempfile.NamedTemporaryFile(suffix=".json") as figures:
        command = [sys.executable, str(HERE / f"{part.name}.py"), "--json", figures.name]
        command += part.quick if quick else ()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            return {"failed": done.returncode}, f"FAILED: it ended with {done.returncode}"
        return json.loads(Path(figures.name).read_text()), done.stdout.rstrip()


def machine() -> dict[str, Any]:
    """What the figures are from."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "processor": model,
        "processors": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 1),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def markdown(about: dict[str, Any], tables: Iterable[tuple[Part, str]]) -> str:
    """The whole result for a reader."""
    lines = [
        "# Benchmarks",
        "",
        f"{about['time']}: Python {about['python']}, Linux {about['kernel']}, "
        f"{about['processors']} x {about['processor']}, load average {about['load_average']}",
    ]
    for part, table in tables:
        body = table if table.startswith("|") else f"```\n{table}\n```"
        lines += ["", f"## {part.title}", "", f"`python benchmarks/{part.name}.py`", "", body]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(p.name for p in PARTS))
    parser.add_argument("--quick", action="store_true", help="few rounds: does it still run?")
    options = parser.parse_args()
    unknown = set(options.parts) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    about = machine()
    results: dict[str, Any] = {"machine": about}
    tables: list[tuple[Part, str]] = []
    for part in PARTS:
        if options.parts and part.name not in options.parts:
            continue
        print(f"\n{part.title} ({part.name})", flush=True)
        reason = part.lacks()
        if reason:
            results[part.name], table = {"skipped": reason}, f"skipped: {reason}"
        else:
            results[part.name], table = run_part(part, quick=options.quick)
        print(table, flush=True)
        tables.append((part, table))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "latest.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "latest.md").write_text(markdown(about, tables))
    print(f"\nWritten: {RESULTS / 'latest.json'} and latest.md")
    return int(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
