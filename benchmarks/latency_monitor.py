"""A monitor without Linux, for disk_latency.py: a real disk, and a vCPU that prints for ever.

Reads what to do as JSON from standard input and prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import Any

from blk_mock import DRIVER_OK, Bench, image_on_tmpfs

from pyvmm.boot.x86.layout import BOOT_GDT
from pyvmm.bus import Bus
from pyvmm.kvm import kick
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.x86 import cpuid, irqchip
from pyvmm.kvm.x86.boot_vcpu import setup_boot_vcpu, setup_vcpu
from pyvmm.kvm.x86.state_text import state_lines
from pyvmm.machine.board.x86 import layout
from pyvmm.machine.run_loop import make_run_loop
from pyvmm.machine.vcpu_runner import VcpuRunner
from pyvmm.memory import GuestMemory
from pyvmm.platform.console_output import ConsoleOutput
from pyvmm.platform.serial import Serial

CODE, RAM = 0x1000, 0x1_0000
# mov dx, 0x3f8; mov al, '.'; again: out dx, al; jmp again
OUTPUT_FOR_EVER = bytes.fromhex("66baf803 b02e ee ebfd")
PATIENCE = 5.0  # seconds for a vCPU to leave the guest


def read_for(bench: Bench, head: int, seconds: float) -> list[int]:
    """Nanoseconds of each of the reads that fit into `seconds`. `head` is in the ring already, and
    is again at the end."""
    queue = bench.queue
    waiter = select.poll()
    waiter.register(bench.interrupt.fd, select.POLLIN)
    clock = time.perf_counter_ns
    found = []
    until = clock() + int(seconds * 1e9)
    while clock() < until:
        position = (queue.used_idx + 1) & 0xFFFF
        queue.used_event = (position - 1) & 0xFFFF
        begin = clock()
        if queue.publish():
            bench.driver.kick()
        while queue.used_idx != position:
            waiter.poll()
            bench.interrupt.drain()
        found.append(clock() - begin)
        queue.offer(head)
    return found


class DriverProcess:
    """The disk's driver, in a process of its own: it reads whenever it is asked to."""

    def __init__(self, bench: Bench) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._orders)
            head = bench.chains(1)[0].head
            with open(orders) as lines, open(answers, "w") as out:
                for line in lines:
                    print(json.dumps(read_for(bench, head, float(line))), file=out, flush=True)
            os._exit(0)
        os.close(orders)
        os.close(answers)

    def measure(self, seconds: float) -> dict[str, float]:
        """Percentiles in µs."""
        os.write(self._orders, f"{seconds}\n".encode())
        data = b""
        while not data.endswith(b"\n"):
            data += os.read(self._answers, 1 << 20)
        times = sorted(json.loads(data))
        return {f"p{part}": times[len(times) * part // 100] / 1000 for part in (50, 99)}

    def close(self) -> None:
        os.close(self._orders)
        os.waitpid(self._pid, 0)


class Talker:
    """A VM whose guest does nothing but write to its serial port, while `talking`."""

    def __init__(self, kvm: Kvm) -> None:
        kick.install()
        self.memory = GuestMemory([(0, RAM)])
        self.memory.write(CODE, OUTPUT_FOR_EVER)
        self._vm = vm = kvm.create_vm()
        irqchip.set_tss_addr(vm, layout.KVM_TSS)
        irqchip.create_irqchip(vm)
        vm.set_memory_region(0, 0, RAM, self.memory.regions[0].host_addr)
        self._vcpu = vm.create_vcpu(0)
        setup_vcpu(self._vcpu, cpuid.supported(kvm), 0, 1)
        setup_boot_vcpu(self._vcpu, mode="protected32", rip=CODE, gdt_base=BOOT_GDT)
        self.written = 0
        self._console = ConsoleOutput(os.open(os.devnull, os.O_WRONLY), observer=self._count)
        self._console.start()
        ports = Bus("port")
        serial = Serial(lambda level: vm.irq_line(layout.SERIAL_GSI, level), self._console.write)
        ports.register(layout.SERIAL_PORT, layout.SERIAL_PORTS, serial)
        loop = make_run_loop(ports, Bus("MMIO"), None)
        self._runner = VcpuRunner(self._vcpu, loop, self.memory, self._ended, None, state_lines)
        self._runner.request_pause()
        self._runner.start()
        self._talking = False

    def _count(self, data: bytes) -> None:
        self.written += len(data)

    def _ended(self, outcome: object) -> None:
        print(f"the guest ended: {outcome}", file=sys.stderr)
        os._exit(1)

    def talk(self, on: bool) -> None:
        """Let the guest run, or park it."""
        if on:
            self._runner.resume()
        elif self._talking:
            self._runner.request_pause()
            if not self._runner.wait_parked(PATIENCE):
                raise RuntimeError("the vCPU does not leave the guest")
        self._talking = on

    def close(self) -> None:
        self._runner.stop()
        self._console.close()
        self._vcpu.close()
        self._vm.close()
        self.memory.close()


def measure(path: str, order: dict[str, Any]) -> dict[str, Any]:
    """Rounds of quiet and busy, after one of each that does not count."""
    bench = Bench(path)
    driver = DriverProcess(bench)  # forked before there is any thread
    bench.driver.add_status(DRIVER_OK)
    sys.setswitchinterval(order["interval"])
    found: dict[str, list[dict[str, float]]] = {"quiet": [], "busy": []}
    with Kvm.open() as kvm:
        talker = Talker(kvm)
        seconds, written = 0.0, 0
        for number in range(order["rounds"] + 1):
            for case in ("quiet", "busy"):
                talker.talk(case == "busy")
                before, begin = talker.written, time.perf_counter()
                figures = driver.measure(order["seconds"])
                if case == "busy":
                    seconds += time.perf_counter() - begin
                    written += talker.written - before
                if number:
                    found[case].append(figures)
        talker.close()
    driver.close()
    bench.close()
    return {"latencies": found, "bytes_per_second": round(written / seconds)}


if __name__ == "__main__":
    with image_on_tmpfs() as image:
        print(json.dumps(measure(image, json.load(sys.stdin))))
