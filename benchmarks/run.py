"""`make bench`: every benchmark in turn; tables, benchmarks/results/, and charts in docs/charts/.

    python benchmarks/run.py [PART…] [--quick]          make bench ONLY="vhost_user boot"

A part that this machine cannot run, or that takes longer than its limit, is skipped, and the reason
is printed. Results: benchmarks/results/latest.json and latest.md. Parts that were not chosen keep
what they had there; each tells what machine it is from, and when.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RESULTS = HERE / "results"


class Part(NamedTuple):
    """A benchmark of this folder. `lacks` says why it cannot run here, or ""."""

    name: str
    title: str
    limit: int  # seconds that it may take; several times of what it does on a quiet machine
    quick: tuple[str, ...]  # the arguments of --quick
    lacks: Callable[[], str]
    usual: tuple[str, ...] = ()  # the arguments otherwise


class Skipped(NamedTuple):
    """There are no figures, and why."""

    reason: str


class Failed(NamedTuple):
    """It ended with this exit code."""

    code: int


class Measured(NamedTuple):
    """Its JSON and its table."""

    figures: dict[str, Any]
    table: str


def lacks_kvm() -> str:
    """The reason why no guest can run on this machine's KVM, not even a small one; or ""."""
    from pyvmm.errors import PyvmmError
    from pyvmm.kvm.system import Kvm
    from pyvmm.machine.board.registry import board_of_host

    try:
        with Kvm.open() as kvm:
            kvm.check_required(board_of_host().requirements)
    except PyvmmError as error:
        return str(error)
    return ""


def lacks_kvm_or_compiler() -> str:
    """As `lacks_kvm`, and a C compiler must be there to compare with."""
    return lacks_kvm() or ("" if shutil.which("gcc") else "gcc is not installed")


def lacks_qemu() -> str:
    """The reason why there can be no emulated KVM host with guests in it; or "". The files that
    they boot from are made here, so that a part's limit is for measuring alone."""
    from pyvmm import images
    from pyvmm.errors import PyvmmError

    if not shutil.which("qemu-system-x86_64"):
        return "qemu-system-x86_64 is not installed"
    try:
        images.host_artifacts(make=True)
        for variant in ("minbase", "test"):
            images.artifacts(variant=variant, make=True)
    except PyvmmError as error:
        return str(error)
    return ""


def lacks_storage_daemon() -> str:
    """The reason why there is no qemu-storage-daemon to compare with; or ""."""
    from pyvmm import images
    from pyvmm.errors import PyvmmError

    try:
        images.storage_command("qemu-storage-daemon", make=True)
    except PyvmmError as error:
        return str(error)
    return ""


def lacks_virtiofsd() -> str:
    """As `lacks_qemu`, with the program that serves directories, and git."""
    from pyvmm import images
    from pyvmm.errors import PyvmmError

    if not shutil.which("git"):
        return "git is not installed"
    try:
        images.virtiofsd_command(make=True)
    except PyvmmError as error:
        return str(error)
    return lacks_qemu()


def lacks_vng() -> str:
    """As `lacks_virtiofsd`, with the program to compare with, and what that one needs."""
    import host_root

    return host_root.lacks(host_root.installed()) or lacks_virtiofsd()


def lacks_vsock_device() -> str:
    """As `lacks_qemu`, with a compiler for what runs in the guest, and what to compare with."""
    from pyvmm import images
    from pyvmm.errors import PyvmmError

    if not shutil.which("cc"):
        return "gcc is not installed"
    try:
        images.folders(["programs-vsock"], make=True)
    except PyvmmError as error:
        return str(error)
    return lacks_qemu()


PARTS = (
    Part(
        "native_kvm",
        "Exits to user space: pyvmm's loop against a plain C loop",
        90,
        ("--rounds", "5"),
        lacks_kvm_or_compiler,
    ),
    Part("start", "Start of `pyvmm run`", 90, ("--rounds", "5"), lacks_kvm),
    Part(
        "clones",
        "Clones: from a pool, by `run --restore`, a hundred at once",
        180,
        ("--rounds", "10", "--clones", "20"),
        lacks_kvm,
    ),
    Part(
        "blk_mock",
        "virtio-blk without a guest: 4 KiB reads a second",
        60,
        ("--seconds", "0.5"),
        lambda: "",
    ),
    Part(
        "queues",
        "Virtqueues by themselves: nanoseconds per chain",
        120,
        ("--rounds", "50"),
        lambda: "",
    ),
    Part(
        "run_command",
        "A command in a guest: where its time goes",
        300,
        ("--runs", "1"),
        lacks_qemu,
    ),
    Part(
        "vhost_user",
        "virtio-blk over vhost-user: pyvmm and qemu-storage-daemon",
        300,
        ("--rounds", "1", "--seconds", "0.3"),
        lacks_storage_daemon,
    ),
    Part(
        "guest_disk",
        "The disk of a Linux guest: fio on pyvmm and QEMU microvm",
        900,
        ("--rounds", "1", "--seconds", "0.3"),
        lacks_qemu,
    ),
    Part(
        "disk_latency",
        "The disk's latency while a vCPU spins and prints",
        600,
        ("--rounds", "1", "--guest-rounds", "1", "--seconds", "0.1"),
        lambda: lacks_kvm() and lacks_qemu(),
    ),
    Part(
        "net_mock",
        "virtio-net without a guest: nanoseconds per frame",
        90,
        ("--rounds", "50"),
        lambda: "",
    ),
    Part(
        "vsock_mock",
        "virtio-vsock without a guest: nanoseconds per packet",
        60,
        ("--rounds", "50"),
        lambda: "",
    ),
    Part(
        "vsock",
        "vsock: pyvmm, and QEMU microvm with vhost-device-vsock",
        480,
        ("--rounds", "1", "--seconds", "1"),
        lacks_vsock_device,
    ),
    Part("net", "Network: pyvmm and QEMU microvm", 900, ("--rounds", "1"), lacks_qemu),
    Part(
        "share",
        "A shared source tree: pyvmm and QEMU microvm on the same virtiofsd",
        1800,
        ("--files", "1000", "--rounds", "1"),
        lacks_virtiofsd,
        ("--files", "8000"),
    ),
    Part(
        "host_root",
        "A command on this machine's files: pyvmm, and vng on QEMU microvm",
        1800,
        ("--rounds", "1"),
        lacks_vng,
    ),
    Part(
        "boot",
        "Boot to init: pyvmm and QEMU microvm",
        240,
        ("--runs", "1"),
        lacks_qemu,
        ("--programs", "pyvmm,qemu"),
    ),
)


def run_part(part: Part, *, quick: bool) -> Measured | Skipped | Failed:
    """Run `part`, and show what it says meanwhile on standard error."""
    reason = part.lacks()
    if reason:
        return Skipped(reason)
    with tempfile.NamedTemporaryFile(suffix=".json") as figures:
        command = [sys.executable, str(HERE / f"{part.name}.py"), "--json", figures.name]
        command += part.usual + (part.quick if quick else ())
        # A session of its own: at the limit all that it has started ends with it.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            said, _ = process.communicate(timeout=part.limit)
        except subprocess.TimeoutExpired:
            return Skipped(f"it took longer than its limit of {part.limit} s")
        finally:
            end_session(process)
        if process.returncode != 0:
            return Failed(process.returncode)
        return Measured(json.loads(Path(figures.name).read_text()), said.rstrip())


def end_session(process: subprocess.Popen[str]) -> None:
    """End `process`, if it runs, and whatever it has left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=5)


def machine() -> dict[str, Any]:
    """The machine that figures are from, and their time."""
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


def entry_of(outcome: Measured | Skipped | Failed, about: dict[str, Any]) -> dict[str, Any]:
    """The entry of a part in latest.json."""
    entry: dict[str, Any] = {"machine": about}
    if isinstance(outcome, Skipped):
        return {**entry, "skipped": outcome.reason}
    if isinstance(outcome, Failed):
        return {**entry, "failed": outcome.code}
    return {**entry, "figures": outcome.figures, "table": outcome.table}


def text_of(entry: dict[str, Any]) -> str:
    """The table of a part, or why there is none."""
    if "skipped" in entry:
        return f"skipped: {entry['skipped']}"
    if "failed" in entry:
        return f"FAILED: it ended with {entry['failed']}"
    return str(entry["table"])


def markdown(results: dict[str, Any]) -> str:
    """The whole result for a reader."""
    lines = ["# Benchmarks"]
    for part in PARTS:
        if part.name not in results:
            continue
        entry = results[part.name]
        about, text = entry["machine"], text_of(entry)
        lines += ["", f"## {part.title}", ""]
        lines += [
            f"`python benchmarks/{part.name}.py`, {about['time']}: Python {about['python']},"
            f" Linux {about['kernel']}, {about['processors']} x {about['processor']},"
            f" load average {about['load_average']}",
        ]
        lines += ["", text if text.startswith("|") else f"```\n{text}\n```"]
    return "\n".join(lines) + "\n"


def earlier() -> dict[str, Any]:
    """The results that there are, or none."""
    try:
        found = json.loads((RESULTS / "latest.json").read_text())
    except (OSError, ValueError):
        return {}
    return {name: entry for name, entry in found.items() if "machine" in entry}


def draw() -> str:
    """Draw the charts; a line that says which, or why that could not be done."""
    try:
        import charts
    except ImportError as error:
        return f"Charts skipped: {error}; pip install -e '.[bench]'"
    drawn = charts.draw_all(RESULTS / "latest.json", charts.FOLDER)
    return f"Drawn in docs/charts: {', '.join(drawn) or 'nothing, as none of their parts has run'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(p.name for p in PARTS))
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, and nothing is kept: does it run?"
    )
    options = parser.parse_args()
    chosen = {name for word in options.parts for name in word.split(",") if name}
    unknown = chosen - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    results, failed = earlier(), False
    for part in PARTS:
        if chosen and part.name not in chosen:
            continue
        print(f"\n{part.title} ({part.name})", flush=True)
        about = machine()
        outcome = run_part(part, quick=options.quick)
        results[part.name] = entry_of(outcome, about)
        failed |= isinstance(outcome, Failed)
        print(text_of(results[part.name]), flush=True)
    if not options.quick:
        keep(results)
        print(draw())
    return int(failed)


def keep(results: dict[str, Any]) -> None:
    """Write latest.json and latest.md."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "latest.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "latest.md").write_text(markdown(results))
    print(f"\nWritten: {RESULTS / 'latest.json'} and latest.md")


if __name__ == "__main__":
    sys.exit(main())
