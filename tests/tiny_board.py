"""A second board, for tests: as little machine as can run, and nothing of x86 in how it is made.

Run as a program in a process where no module with x86 in its name can be imported:

    python tiny_board.py prepare|run KERNEL

It registers the board as this host's, and prints what a machine that is built from it is like; with
`run` also what its guest says and how it ends. The code that the guest runs is a host processor's,
as it must be on a KVM: a few bytes at the place where an x86 processor starts after a reset.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.abc import MetaPathFinder
from typing import Any

MIB, GIB = 1 << 20, 1 << 30
LOW, HIGH = 0x10_0000, 0xFFFF_0000  # RAM from 1 MiB on, and 64 KiB below 4 GiB
RESET_VECTOR = 0xFFFF_FFF0
POWER_PORT, UART_PORT = 0x40, 0x3F8
# mov dx, 0x3f8; mov al, '!'; out dx, al; out 0x40, al
CODE = bytes.fromhex("baf803 b021 ee e640")


class NoX86(MetaPathFinder):
    """Refuses the modules of another architecture than the board's."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name.startswith("pyvmm") and "x86" in name:
            raise ImportError(f"{name} is another architecture's")


@dataclass(frozen=True)
class TinyEntry:
    """Nothing but what every board's entry has."""

    cmdline: str
    discovery: str


def make_board() -> Any:
    from pyvmm.bus import Action, Bus
    from pyvmm.kvm import uapi
    from pyvmm.kvm.capabilities import Requirement
    from pyvmm.kvm.system import Kvm
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.kvm.vm import Vm
    from pyvmm.machine.board.board import Board, Core, VirtioSlot
    from pyvmm.memory import GuestMemory

    class Uart:
        def __init__(self, sink: Callable[[bytes], None]) -> None:
            self._sink = sink

        def read(self, offset: int, size: int) -> int:
            return 0

        def write(self, offset: int, size: int, value: int) -> None:
            self._sink(bytes([value]))

        def enqueue_input(self, data: bytes) -> int:
            return 0

        def watch_room(self, on_room: Callable[[], None] | None) -> None:
            pass

        def close(self) -> None:
            pass

    class Power:
        def read(self, offset: int, size: int) -> int:
            return 0

        def write(self, offset: int, size: int, value: int) -> Action:
            return Action.POWEROFF

    class TinyBoard(Board[TinyEntry]):
        console = "ttyTINY0"
        kernel_parameters = ("tiny=1",)

        def ram_ranges(self, size: int) -> list[tuple[int, int]]:
            return [(LOW, size - 0x1_0000), (HIGH, 0x1_0000)]

        def mapped_files(self, ram: int) -> range:
            return range(8 * GIB, 16 * GIB)

        def virtio_slots(self, count: int) -> tuple[VirtioSlot, ...]:
            return tuple(VirtioSlot(0xE000_0000 + n * 0x1000, 0x200, 16 + n) for n in range(count))

        def load(
            self,
            memory: GuestMemory,
            *,
            kernel: str,
            initrd: str | None,
            cmdline: str,
            cpus: int,
            slots: Sequence[VirtioSlot],
            discovery: str,
            memory_window: range = range(0),
        ) -> TinyEntry:
            with open(kernel, "rb") as file:
                memory.write(LOW, file.read())
            memory.write(RESET_VECTOR, CODE)
            return TinyEntry(cmdline, discovery)

        def kernel_release(self, path: str) -> str:
            raise NotImplementedError

        def kernel_config(self, path: str) -> str:
            raise NotImplementedError

        def unpack_kernel(self, path: str, target: str) -> None:
            raise NotImplementedError

        @property
        def requirements(self) -> Sequence[Requirement]:
            return ()

        def probe_guest(self, kvm: Kvm) -> Any:
            raise NotImplementedError

        def address_bits(self, kvm: Kvm) -> int:
            return 36

        def create_vm(self, kvm: Kvm, memory: GuestMemory) -> Vm:
            return kvm.create_vm()

        def build(
            self,
            kvm: Kvm,
            vm: Vm,
            *,
            entry: TinyEntry,
            cpus: int,
            ports: Bus,
            mmio: Bus,
            sink: Callable[[bytes], None],
            closing: ExitStack,
        ) -> Core:
            from pyvmm.host import syscalls

            syscalls.ioctl(vm.fd, uapi.KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")
            uart = Uart(sink)
            ports.register(UART_PORT, 1, uart)
            ports.register(POWER_PORT, 1, Power())
            vcpus = tuple(closing.enter_context(vm.create_vcpu(index)) for index in range(cpus))
            return Core(vcpus, uart, None)

        def state_lines(self, vcpu: Vcpu, read: Callable[[int, int], bytes]) -> Iterator[str]:
            yield "  tiny"

    return TinyBoard()


def main(how: str, kernel: str) -> None:
    sys.meta_path.insert(0, NoX86())
    from pyvmm.errors import ConfigError
    from pyvmm.machine.board import registry
    from pyvmm.machine.builder import assemble, check_boot, open_kvm, prepare
    from pyvmm.machine.machine import Machine
    from pyvmm.machine.mapped_files import MappedFiles
    from pyvmm.machine.outcome import Alarm
    from pyvmm.machine.trace import Trace
    from pyvmm.spec.vm import VmSpec
    from pyvmm.virtio.rng.device import EntropyDevice

    registry.BOARDS[os.uname().machine] = make_board
    spec = VmSpec(kernel=kernel, memory=64 * MIB, cmdline="quiet", name="tiny")
    check_boot(spec)
    try:
        check_boot(replace(spec, transport="pci"))
    except ConfigError as error:
        print(error)
    with ExitStack() as closing:
        prepared = prepare(spec, (EntropyDevice(),), Alarm(), closing)
        print(*(f"{r.guest_addr:#x}+{r.size:#x}" for r in prepared.memory.regions))
        print(prepared.memory.read(LOW, 6).decode(), prepared.entry)
        print(prepared.console, *prepared.slots)
        with open(kernel, "rb") as file, ExitStack() as unmapping:
            print(hex(MappedFiles(spec.memory, unmapping).map(file.fileno(), 4096, True)))
        if how == "run":
            said: list[bytes] = []
            trace = Trace(())
            kvm = open_kvm(prepared.board, 1, closing)
            parts = assemble(prepared, kvm, trace, said.append, closing)
            print(parts.transports[0].device.name, parts.power_button)
            outcome = Machine(parts, trace).run(lambda: None, lambda: None)
            print(b"".join(said), outcome.ending.name)
    assert not [name for name in sys.modules if name.startswith("pyvmm") and "x86" in name]


if __name__ == "__main__":
    main(*sys.argv[1:])
