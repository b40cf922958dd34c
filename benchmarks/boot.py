"""From exec to the first line of the guest's init: pyvmm and QEMU's microvm, in turn.

    python benchmarks/boot.py [--json FILE] [--runs 5] [--kernel 6.1] [--cpus 1] [--arch arm64]

Both run in one emulated KVM host, with the same kernel, initial RAM disk, root disk, command line
and size of machine. Everything in there is 10 to 20 times slower than on real KVM, so the ratio is
what counts, not the seconds. The first round fills the page cache; it is shown and not counted. On
arm64 it is QEMU's `virt`, which has PCI and virtio-mmio in one machine.

Beside the clock's seconds stands the processor time that the emulated host used: on a computer
that does other things as well, it is the steadier figure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import guest_lab
from guest_lab import DEFAULT_KERNEL

MARK = b"pyvmm: init reached"
MEMORY_MIB = 512
PROGRAMS = ["pyvmm mmio", "pyvmm pci", "qemu mmio", "qemu plain mmio", "qemu pci"]
ARM64_PROGRAMS = ["pyvmm mmio", "pyvmm pci", "qemu mmio", "qemu pci"]


class Setup(TypedDict):
    """The settings for the driver inside the emulated host, as JSON."""

    pyvmm: list[str]
    qemu: list[str]
    arch: str
    kernel: str
    initrd: str
    disk: str
    cpus: int
    runs: int
    programs: list[str]


def commands(setup: Setup, disk: str) -> dict[str, list[str]]:
    """The command line of each program, as a user would type it."""
    boot = ["--kernel", setup["kernel"], "--initrd", setup["initrd"]]
    pyvmm = [*setup["pyvmm"], "run", "--kvm=host", *boot, "--disk", disk]
    pyvmm += ["--memory", f"{MEMORY_MIB}M", "--cpus", str(setup["cpus"]), "--cmdline", "quiet"]
    size = ["-m", str(MEMORY_MIB), "-smp", str(setup["cpus"])]
    common = ["-enable-kvm", "-cpu", "host", *size, "-nodefaults", "-no-user-config", "-nographic"]
    common += ["-serial", "stdio", "-kernel", setup["kernel"], "-initrd", setup["initrd"]]
    common += ["-drive", f"id=root,file={disk},format=raw,if=none"]
    pci = ["-device", "virtio-blk-pci,drive=root", "-append"]
    mmio = ["-device", "virtio-blk-device,drive=root", "-append"]
    qemu = [*setup["qemu"], *common, "-M"]
    ours = {f"pyvmm {way}": [*pyvmm, "--transport", way] for way in ("mmio", "pci")}
    if setup["arch"] == guest_lab.ARM64:
        qemu.append(guest_lab.VIRT)
        parameters = guest_lab.VIRT_PARAMETERS
        return {
            **ours,
            "qemu mmio": [*qemu, *mmio, parameters],
            "qemu pci": [*qemu, *pci, parameters],
        }
    parameters = guest_lab.PARAMETERS
    return {
        **ours,
        "qemu mmio": [*qemu, guest_lab.MICROVM, *mmio, f"{parameters} pci=off"],
        "qemu plain mmio": [*qemu, "microvm", *mmio, f"{parameters} pci=off"],
        "qemu pci": [*qemu, f"{guest_lab.MICROVM},pcie=on", *pci, parameters],
    }


def seconds_to_mark(command: Sequence[str]) -> float:
    """Start `command`; seconds until it has printed MARK. It is killed then.

    Raises RuntimeError with its last output if it ends before that or stands still.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
    )
    assert process.stdout is not None
    try:
        guest_lab.read_until(process, MARK)
        return time.monotonic() - start
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def inside(setup: Setup) -> None:
    """Boot every program in turn, `runs` + 1 times, and print a line at each start and end."""
    guest_lab.mount_debugfs()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        disk = os.path.join(folder, "root.img")
        if shutil.which("cp"):
            subprocess.run(["cp", "--sparse=always", setup["disk"], disk], check=True)
        else:
            shutil.copyfile(setup["disk"], disk)
        chosen = {name: commands(setup, disk)[name] for name in setup["programs"]}
        for _ in range(setup["runs"] + 1):
            for name, command in chosen.items():
                print("start", name.replace(" ", "-"), flush=True)
                print("end", seconds_to_mark(command), flush=True)


class Boot(NamedTuple):
    """One boot: by the clock, and the processor time that the emulated host used."""

    seconds: float
    busy: float


def measure(
    arch: str, kernel: str, cpus: int, runs: int, programs: list[str], folder: str
) -> dict[str, Any]:
    """Start the emulated host and run `inside` in it. Raises PyvmmError or RuntimeError."""
    import compileall

    import pyvmm
    from pyvmm.emulated_host import EmulatedHost, EmulatedHostSpec, foreign
    from pyvmm.emulated_host.find import find_image

    # As after a first run. Inside, what Python compiles is not kept.
    compileall.compile_dir(os.path.dirname(pyvmm.__file__), quiet=1)
    files = guest_lab.files_for(arch, kernel, "minbase", folder)
    on_x86 = arch == guest_lab.X86
    # -P: not what lies here, as in pyvmm's own runs.
    setup = Setup(
        pyvmm=guest_lab.pyvmm_program() if on_x86 else [*files.python, "-P", "-m", "pyvmm"],
        qemu=files.qemu,
        arch=arch,
        kernel=files.kernel,
        initrd=files.initrd,
        disk=files.root,
        cpus=cpus,
        runs=runs,
        programs=programs,
    )
    image = find_image(make=True, architecture="aarch64" if arch == guest_lab.ARM64 else "")
    env = foreign.environment(os.environ, image)
    spec = EmulatedHostSpec(image, memory_mib=3072, env=env)
    argv = [*files.python, os.path.abspath(__file__), "--inside", json.dumps(setup)]
    reader, writer = os.pipe()
    host = EmulatedHost(spec, argv, stdin=None, stdout=writer)
    host.start()
    assert host.pid is not None

    def close_when_over() -> None:
        host.wait()
        os.close(writer)

    waiter = threading.Thread(target=close_when_over, daemon=True)
    waiter.start()
    with open(reader) as lines:
        boots = watch(lines, host.pid)
    waiter.join()
    if any(len(values) != runs + 1 for values in boots.values()) or len(boots) != len(programs):
        raise RuntimeError("the measurement in the emulated host ended early")
    return {"arch": arch, **summary(boots, kernel=kernel or DEFAULT_KERNEL, cpus=cpus)}


def watch(lines: Iterable[str], qemu: int) -> dict[str, list[Boot]]:
    """The boots that the lines of `inside` tell of; `qemu` is the emulated host's process."""
    boots: dict[str, list[Boot]] = {}
    name, before = "", 0.0
    for line in lines:
        what, value = line.split()
        if what == "start":
            name, before = value.replace("-", " "), processor_seconds(qemu)
            continue
        boot = Boot(float(value), processor_seconds(qemu) - before)
        print(f"{name:12} {boot.seconds:6.2f} s, busy {boot.busy:6.2f} s", file=sys.stderr)
        boots.setdefault(name, []).append(boot)
    return boots


def processor_seconds(qemu: int) -> float:
    """The processor time that the process `qemu` has used, to a hundredth of a second."""
    fields = Path(f"/proc/{qemu}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime


def summary(boots: dict[str, list[Boot]], *, kernel: str, cpus: int) -> dict[str, Any]:
    """Medians, extremes, and for each transport the ratio to the faster QEMU that has it; the
    warm-up round does not count."""
    rows: dict[str, dict[str, Any]] = {}
    for name, values in boots.items():
        seconds = [round(boot.seconds, 3) for boot in values]
        rows[name] = {
            "median": statistics.median(seconds[1:]),
            "min": min(seconds[1:]),
            "max": max(seconds[1:]),
            "warm_up": seconds[0],
            "busy_median": round(statistics.median(boot.busy for boot in values[1:]), 3),
            "seconds": seconds[1:],
        }
    result: dict[str, Any] = {"kernel": kernel, "cpus": cpus, "memory_mib": MEMORY_MIB}
    result["programs"] = rows
    result["ratios"] = {}
    for way in ("mmio", "pci"):
        others = [name for name in rows if name.startswith("qemu") and name.endswith(way)]
        if others and f"pyvmm {way}" in rows:
            best = min(others, key=lambda name: rows[name]["median"])
            ours, theirs = rows[f"pyvmm {way}"], rows[best]
            result["ratios"][way] = {
                "best_qemu": best,
                "median": round(ours["median"] / theirs["median"], 3),
                "busy": round(ours["busy_median"] / theirs["busy_median"], 3),
                "each": [
                    round(a / b, 3) for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)
                ],
            }
    return result


def table(result: dict[str, Any]) -> str:
    """`result` as a Markdown table."""
    lines = [
        "| exec → init, seconds | median | min | max | warm-up | processor time |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["programs"].items():
        figures = (row[key] for key in ("median", "min", "max", "warm_up", "busy_median"))
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in figures) + " |")
    for way, ratio in result["ratios"].items():
        lines.append(
            f"\npyvmm / {ratio['best_qemu']}, {way}: {ratio['median']:.2f} by the clock, "
            f"{ratio['busy']:.2f} in processor time"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--arch", choices=guest_lab.ARCHITECTURES, default=guest_lab.X86)
    parser.add_argument("--kernel", default="", help="the kernel image's name (6.12; default: 6.1)")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--programs", default="", help="those to run, with commas between")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        inside(json.loads(options.inside))
        return 0
    usual = ARM64_PROGRAMS if options.arch == guest_lab.ARM64 else PROGRAMS
    programs = options.programs.split(",") if options.programs else usual
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            *(options.arch, options.kernel, options.cpus, options.runs, programs, folder)
        )
    print(table(result))
    guest_lab.keep(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
