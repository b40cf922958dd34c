"""The cost that Python adds to KVM: exits per second, time to the first guest byte, memory.

Runs on this machine's /dev/kvm with bare-metal guests. pyvmm's real loop and a plain C loop
(native_kvm.c, compiled with gcc -O2 here and now) take turns with the same guest; medians. Their
time is the thread's CPU time: neither ever waits, so on an idle machine that is the time that
passes, and on a busy one what others do does not count.

    python benchmarks/native_kvm.py [--json FILE] [--rounds 25] [--exits 8000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pyvmm.boot.x86.layout import BOOT_GDT, MIB, ram_ranges
from pyvmm.bus import Action, Bus
from pyvmm.errors import PyvmmError
from pyvmm.kvm.loop import run_until_exit
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.x86 import cpuid, irqchip
from pyvmm.kvm.x86.boot_vcpu import setup_boot_vcpu, setup_vcpu
from pyvmm.machine.board.registry import board_of_host
from pyvmm.machine.board.x86 import layout
from pyvmm.memory import GuestMemory

HERE = Path(__file__).parent
CODE = 0x1000
RAM = 0x1_0000
TARGET = 0.85
RANGES, STRIDE, RANGE_SIZE = 8, 0x1000, 8

GUESTS = {
    # mov dx, 0x3f8; again: out dx, al; jmp again
    "port": bytes.fromhex("66baf803 ee ebfd"),
    # mov edi, 0xd0000000; again: mov [edi], eax; jmp again
    "mmio": bytes.fromhex("bf000000d0 8907 ebfc"),
}
# mov dx, 0x3f8; mov al, '!'; out dx, al; hlt
FIRST_BYTE = bytes.fromhex("66baf803 b021 ee f4")
STARTS = {"port": layout.SERIAL_PORT, "mmio": layout.VIRTIO_MMIO_BASE}


class Counting:
    """Does nothing for a number of writes, then ends the loop."""

    def arm(self, writes: int) -> None:
        self._answer = iter([None] * (writes - 1) + [Action.POWEROFF]).__next__

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> Action | None:
        return self._answer()


class PythonLoop:
    """pyvmm's loop, bus and handler call, measured in rounds."""

    def __init__(self, kvm: Kvm, kind: str, exits: int, closing: ExitStack) -> None:
        self._exits = exits
        self._buses = {name: Bus(name) for name in GUESTS}
        self._device = Counting()
        for place in range(RANGES):
            self._buses[kind].register(STARTS[kind] + place * STRIDE, RANGE_SIZE, self._device)
        memory = GuestMemory([(0, RAM)])
        memory.write(CODE, GUESTS[kind])
        vm = closing.enter_context(kvm.create_vm())
        irqchip.set_tss_addr(vm, layout.KVM_TSS)
        irqchip.create_irqchip(vm)
        vm.set_memory_region(0, 0, RAM, memory.regions[0].host_addr)
        self._vcpu = closing.enter_context(vm.create_vcpu(0))
        setup_vcpu(self._vcpu, cpuid.supported(kvm), 0, 1)
        setup_boot_vcpu(self._vcpu, mode="protected32", rip=CODE, gdt_base=BOOT_GDT)
        self._keep = memory

    def round(self) -> float:
        """Microseconds per exit."""
        self._device.arm(self._exits)
        start = time.thread_time()
        run_until_exit(self._vcpu, self._buses["port"], self._buses["mmio"])
        return (time.thread_time() - start) / self._exits * 1e6


class CLoop:
    """native_kvm.c, one round per line that it gets."""

    def __init__(self, program: Path, kind: str, rounds: int, exits: int) -> None:
        self._process = subprocess.Popen(
            [program, kind, str(rounds), str(exits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def round(self) -> float:
        """Microseconds per exit."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def compare(kvm: Kvm, program: Path, kind: str, rounds: int, exits: int) -> dict[str, float]:
    """Exits per second of both loops, in turn, and their ratio."""
    with ExitStack() as closing:
        python = PythonLoop(kvm, kind, exits, closing)
        c = CLoop(program, kind, rounds + 1, exits)
        closing.callback(c.close)
        turns = [(c.round(), python.round()) for _ in range(rounds + 1)][1:]  # the first warms up
    c_us = statistics.median(turn[0] for turn in turns)
    python_us = statistics.median(turn[1] for turn in turns)
    return {
        "c_us_per_exit": c_us,
        "python_us_per_exit": python_us,
        "c_exits_per_second": 1e6 / c_us,
        "python_exits_per_second": 1e6 / python_us,
        # Of neighbours in time, as other load on the machine comes and goes.
        "ratio": statistics.median(c_us / python_us for c_us, python_us in turns),
    }


# --- a process of its own, for what is measured from exec on -------------------------------------


def first_byte() -> None:
    """The child: a VM from nothing to its first byte on the serial port, then its memory use."""

    class Serial:
        def read(self, offset: int, size: int) -> int:
            return 0

        def write(self, offset: int, size: int, value: int) -> Action:
            print(time.clock_gettime(time.CLOCK_MONOTONIC), flush=True)
            return Action.POWEROFF

    memory = GuestMemory(ram_ranges(128 * MIB))
    memory.write(CODE, FIRST_BYTE)
    ports = Bus("port")
    ports.register(layout.SERIAL_PORT, layout.SERIAL_PORTS, Serial())
    with Kvm.open() as kvm:
        kvm.check_required(board_of_host().requirements)
        with kvm.create_vm() as vm:
            irqchip.set_tss_addr(vm, layout.KVM_TSS)
            irqchip.set_identity_map_addr(vm, layout.KVM_IDENTITY_MAP)
            irqchip.create_irqchip(vm)
            irqchip.create_pit2(vm)
            for slot, region in enumerate(memory.regions):
                vm.set_memory_region(slot, region.guest_addr, region.size, region.host_addr)
            with vm.create_vcpu(0) as vcpu:
                setup_vcpu(vcpu, cpuid.supported(kvm), 0, 1)
                setup_boot_vcpu(vcpu, mode="protected32", rip=CODE, gdt_base=BOOT_GDT)
                run_until_exit(vcpu, ports, Bus("MMIO"))
                print(private_dirty_kib("pyvmm-guest-ram"))


def private_dirty_kib(guest_ram: str) -> int:
    """Private dirty KiB of this process, without the mapping named `guest_ram`."""
    total, counted = 0, True
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            counted = guest_ram not in line  # a mapping's first line
        elif words[0] == "Private_Dirty:" and counted:
            total += int(words[1])
    return total


def measure_first_byte(rounds: int) -> dict[str, float]:
    """Milliseconds from exec to the guest's first byte, and memory at that moment."""
    command = [sys.executable, __file__, "--child"]
    bare = [sys.executable, "-c", "pass"]
    times, dirty, starts = [], [], []
    for _ in range(rounds):
        begin = time.clock_gettime(time.CLOCK_MONOTONIC)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        when, kib = done.stdout.split()
        times.append((float(when) - begin) * 1e3)
        dirty.append(int(kib))
        begin = time.perf_counter()
        subprocess.run(bare, check=True)
        starts.append((time.perf_counter() - begin) * 1e3)
    return {
        "first_byte_ms": statistics.median(times),
        "python_alone_ms": statistics.median(starts),
        "private_dirty_kib": statistics.median(dirty),
    }


# --- the whole -----------------------------------------------------------------------------------


@contextmanager
def compiled() -> Iterator[Path]:
    """native_kvm.c as a program."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "native_kvm"
        source = HERE / "native_kvm.c"
        subprocess.run(["gcc", "-O2", "-Wall", "-o", program, source], check=True)
        yield program


def report(results: dict[str, dict[str, float]], say: Callable[[str], object]) -> None:
    """The table."""
    titles = ("C, µs", "Python, µs", "C/s", "Python/s", "ratio")
    say(
        f"{'userspace exits':<18}{titles[0]:>9}{titles[1]:>12}"
        + "".join(f"{t:>10}" for t in titles[2:])
    )
    for kind in GUESTS:
        row = results[kind]
        grade = "ok" if row["ratio"] >= TARGET else "below"
        say(
            f"{kind:<18}{row['c_us_per_exit']:>9.2f}{row['python_us_per_exit']:>12.2f}"
            f"{row['c_exits_per_second']:>10,.0f}{row['python_exits_per_second']:>10,.0f}"
            f"{row['ratio']:>10.3f}  {grade} ({TARGET} wanted)"
        )
    start = results["start"]
    say(
        f"exec to first guest byte {start['first_byte_ms']:.0f} ms"
        f" (Python alone {start['python_alone_ms']:.0f} ms);"
        f" private dirty memory without guest RAM {start['private_dirty_kib'] / 1024:.1f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--rounds", type=int, default=25, help="rounds of each loop (default 25)")
    parser.add_argument("--exits", type=int, default=8000, help="exits a round (default 8000)")
    options = parser.parse_args()
    try:
        kvm = Kvm.open()
    except PyvmmError as error:
        sys.exit(f"native_kvm: {error}")
    with kvm, compiled() as program:
        results = {
            kind: compare(kvm, program, kind, options.rounds, options.exits) for kind in GUESTS
        }
    results["start"] = measure_first_byte(min(options.rounds, 9))
    report(results, print)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        first_byte()
    else:
        main()
