"""The rate at which an emulated KVM host ruins guests: the same load, several ways, in turn.

    python benchmarks/emulated_host_soundness.py --log FILE [--until 12:20] [--ways pyvmm-2,...]

A guest of four vCPUs starts and ends processes on each of them, which is what emulated hosts ruin
guests with most (docs/decisions/0071), in several passes. A way is a monitor (pyvmm or QEMU's
microvm) in an emulated host of one or two CPUs, which may have options of its own. In each round
each way has one emulated host and some guests, one after the other. FILE gets a line for each boot,
pass and ruined guest, and for the last what KVM's trace says. The summary is a table.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VCPUS = 4
PASSES = 4  # of the load, in a guest
PROCESSES = 15  # that each vCPU starts
# Seconds without a word of the guest's, after which it counts as hung: while it boots, and later
STILL = (300.0, 180.0)
TRACING = Path("/sys/kernel/tracing")
TRACED = ("kvm_entry", "kvm_exit", "kvm_inj_virq", "kvm_page_fault", "kvm_inj_exception")
TRACE_LINES = 300
# As in guest_lab.py; pvh, as the kernel is an ELF file.
MICROVM = "microvm,x-option-roms=off,pit=off,pic=off,isa-serial=on,rtc=on"
PARAMETERS = (
    "console=ttyS0 panic=-1 reboot=k pci=off quiet nokaslr norandmaps mitigations=off "
    "cryptomgr.notests apparmor=0 ipv6.disable=1 "
    "initcall_blacklist=load_system_certificate_list,init_encrypted,init_kprobe_trace,seg6_init"
)
INIT = f"""\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
echo load-pass-0
work() {{
    n=0
    while [ $n -lt {PROCESSES} ]; do
        /bin/busybox ls -R /sys/class /proc/self | /bin/busybox wc -l > /dev/null
        /bin/busybox true
        n=$((n + 1))
        [ $((n % 5)) = 0 ] && echo "cpu$1 $n"
    done
}}
work=$(/bin/busybox sed -n '/^work()/,/^}}/p' /init)
for pass in $(/bin/busybox seq {PASSES}); do
for cpu in 0 1 2 3; do
    /bin/busybox taskset $((1 << cpu)) /bin/busybox sh -c "$work
work $cpu" &
done
wait
echo load-pass-$pass
done
/bin/busybox poweroff -f
"""


class Way(NamedTuple):
    """A monitor and its emulated host."""

    monitor: str  # "pyvmm" or "qemu"
    cpus: int
    qemu: tuple[str, ...] = ()  # more arguments for the emulator
    kvm_amd: str = ""  # parameters of its module


CPU = "max,+svm,+npt,-la57,-xsave,-avx,-avx2,-pku,-cx16"
WAYS = {
    "pyvmm-2": Way("pyvmm", 2),
    "pyvmm-1": Way("pyvmm", 1),
    "qemu-2": Way("qemu", 2),
    "qemu-1": Way("qemu", 1),
    "pyvmm-2-novgif": Way("pyvmm", 2, ("-cpu", f"{CPU},-vgif")),
    "qemu-2-novgif": Way("qemu", 2, ("-cpu", f"{CPU},-vgif")),
    "pyvmm-2-nonpt": Way("pyvmm", 2, kvm_amd="npt=0"),
    "pyvmm-2-insn": Way("pyvmm", 2, ("-accel", "tcg,thread=multi,one-insn-per-tb=on")),
}


class Outcome(NamedTuple):
    """ "boot" or "pass", or how a guest was ruined: "hung" or "died"; then the last words and
    the trace. `seconds` are those since the outcome before."""

    ended: str
    seconds: float
    words: str = ""
    trace: str = ""


# --- in the emulated host -------------------------------------------------------------------------


def command(monitor: str, kernel: str, initrd: str) -> list[str]:
    """The monitor's command line."""
    if monitor == "pyvmm":
        return [
            *(sys.executable, "-m", "pyvmm", "run", "--kvm=host", "--memory", "256M"),
            *("--cpus", str(VCPUS), "--kernel", kernel, "--initrd", initrd),
            *("--cmdline", PARAMETERS),
        ]
    return [
        *("qemu-system-x86_64", "-M", MICROVM, "-enable-kvm", "-cpu", "host", "-m", "256"),
        *("-smp", str(VCPUS), "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
        *("-serial", "stdio", "-kernel", kernel, "-initrd", initrd, "-append", PARAMETERS),
    ]


def start_trace() -> None:
    """KVM's events go to a ring in memory, until a vCPU triple-faults (SVM_EXIT_SHUTDOWN)."""
    with contextlib.suppress(OSError):
        (TRACING / "buffer_size_kb").write_text("4096")
        for event in TRACED:
            (TRACING / "events/kvm" / event / "enable").write_text("1")
        (TRACING / "events/kvm/kvm_exit/trigger").write_text("traceoff if exit_reason == 0x7f")


def take_trace() -> str:
    """The last lines of the trace, and how often each event was among the many before."""
    try:
        (TRACING / "tracing_on").write_text("0")
        lines = [line for line in (TRACING / "trace").read_text().splitlines() if line[0] != "#"]
        (TRACING / "trace").write_text("")
        (TRACING / "tracing_on").write_text("1")
    except OSError as error:
        return f"no trace: {error}"
    # Who, and what it did where; numbers after that differ each time.
    short = [re.sub(r"^ *(\S+) .*? (kvm_\w+: .{,70}).*", r"\1 \2", line) for line in lines[-20000:]]
    most = collections.Counter(short).most_common(30)
    return "\n".join([*(f"{count} times {what}" for what, count in most), *lines[-TRACE_LINES:]])


def run_guest(order: dict[str, Any]) -> Iterator[Outcome]:
    """One guest: its boot, each pass of the load, and how it was ruined if it was."""
    begin = time.monotonic()
    process = subprocess.Popen(
        command(order["monitor"], order["vmlinux"], order["initrd"]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    said, told, ruined = b"", 0, ""
    while told <= PASSES and not ruined:
        ready, _, _ = select.select([process.stdout], [], [], STILL[told > 0])
        data = os.read(process.stdout.fileno(), 65536) if ready else b""
        said += data
        while told < said.count(b"load-pass"):
            now = time.monotonic()
            yield Outcome("pass" if told else "boot", round(now - begin, 1))
            told, begin = told + 1, now
        if not data:
            ruined = "died" if ready else "hung"
    if ruined:
        traced = take_trace()
        words = said[-1500:].decode(errors="replace").replace("\r", "")
        yield Outcome(ruined, round(time.monotonic() - begin, 1), words, traced)
    process.kill()
    process.wait()


def inside(order: dict[str, Any]) -> None:
    """A line of JSON for each guest."""
    if order["kvm_amd"]:
        busybox = "/dev/.pyvmm/busybox"
        subprocess.run([busybox, "rmmod", "kvm_amd"], check=True)
        subprocess.run([busybox, "insmod", order["module"], *order["kvm_amd"].split()], check=True)
    subprocess.run(["mount", "-t", "tracefs", "tracefs", str(TRACING)], check=False)
    start_trace()
    for _ in range(order["guests"]):
        for outcome in run_guest(order):
            print(json.dumps(outcome), flush=True)


# --- outside --------------------------------------------------------------------------------------


def write_initrd(path: Path) -> None:
    """A file system with busybox and INIT."""
    from pyvmm.emulated_host.find import find_busybox
    from pyvmm.host import cpio

    entries = [cpio.directory(name) for name in ("bin", "dev", "proc", "sys")]
    entries.append(cpio.character_device("dev/console", 5, 1))
    entries.append(cpio.character_device("dev/null", 1, 3, 0o666))
    entries.append(cpio.regular("init", INIT.encode(), 0o755))
    entries.append(cpio.regular("bin/busybox", Path(find_busybox()).read_bytes(), 0o755))
    path.write_bytes(cpio.archive(entries))


def run_host(way: Way, order: dict[str, Any], timeout: float) -> Iterator[Outcome]:
    """The outcomes of the guests of one emulated host, as they come."""
    from pyvmm.emulated_host import EmulatedHost, EmulatedHostSpec
    from pyvmm.emulated_host.find import find_image
    from pyvmm.errors import PyvmmError

    image = find_image(make=True)
    # The last of two equal options counts, so more of them change what the emulator is asked for.
    wrapped = ("/bin/sh", "-c", 'more=$1; shift; exec "$@" $more', "sh", " ".join(way.qemu))
    image = replace(image, qemu=(*wrapped, *image.qemu))
    module = f"{image.modules_dir}/kernel/arch/x86/kvm/kvm-amd.ko"
    order = {**order, "monitor": way.monitor, "kvm_amd": way.kvm_amd, "module": module}
    reader, writer = os.pipe()
    argv = [sys.executable, os.path.abspath(__file__), "--inside", json.dumps(order)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    spec = EmulatedHostSpec(image, memory_mib=1536, cpus=way.cpus, env=environment)
    host = EmulatedHost(spec, argv, stdin=None, stdout=writer)
    host.start()

    def end() -> None:
        try:
            host.wait()
        except PyvmmError as error:
            print(error, file=sys.stderr, flush=True)
        os.close(writer)

    ending = threading.Thread(target=end)
    ending.start()
    seen, until = b"", time.monotonic() + timeout
    try:
        while True:
            left = until - time.monotonic()
            ready, _, _ = select.select([reader], [], [], max(0.0, left))
            if not ready:
                yield Outcome("hung", timeout, "the emulated host itself")
                return
            data = os.read(reader, 65536)
            *lines, seen = (seen + data).split(b"\n")
            for line in lines:
                yield Outcome(*json.loads(line))
            if not data:
                return
    finally:
        host.kill()
        ending.join()
        os.close(reader)


def tell(log: Any, name: str, outcome: Outcome) -> None:
    """Write `outcome` down."""
    log.write(f"{time.strftime('%H:%M:%S')} {name} {outcome.ended} {outcome.seconds} s\n")
    for text in (outcome.words, outcome.trace):
        log.writelines(f"    {line}\n" for line in text.splitlines())
    log.flush()


def summary(outcomes: dict[str, list[Outcome]]) -> str:
    """A row of Markdown for each way."""
    rows = [
        "| way | boots | passes | hung | died | median s of a pass |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in outcomes.items():
        ended = collections.Counter(outcome.ended for outcome in found)
        passes = sorted(outcome.seconds for outcome in found if outcome.ended == "pass")
        median = passes[len(passes) // 2] if passes else 0.0
        counts = [ended[key] for key in ("boot", "pass", "hung", "died")]
        rows.append(f"| {name} | {' | '.join(map(str, counts))} | {median} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log", metavar="FILE", help="a line for each guest")
    parser.add_argument("--ways", default="pyvmm-2,pyvmm-1,qemu-2,qemu-1", help=", ".join(WAYS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--guests", type=int, default=3, help="in one emulated host")
    parser.add_argument("--until", metavar="HH:MM", default="", help="begin no round after that")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(json.loads(options.inside))
        return 0
    from pyvmm import images

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    outcomes: dict[str, list[Outcome]] = {name: [] for name in options.ways.split(",")}
    with tempfile.TemporaryDirectory() as folder, open(options.log or os.devnull, "a") as log:
        initrd = Path(folder, "initrd")
        write_initrd(initrd)
        vmlinux = images.artifacts("6.1", make=True).vmlinux
        order = {"vmlinux": vmlinux, "initrd": str(initrd), "guests": options.guests}
        for _ in range(options.rounds):
            for name in outcomes:
                if options.until and time.strftime("%H:%M") >= options.until:
                    break
                limit = options.guests * 2400.0
                for outcome in run_host(WAYS[name], order, limit):
                    outcomes[name].append(outcome)
                    tell(log, name, outcome)
    print(summary(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
