"""The PCI bus of a machine on real KVM, without a Linux in it."""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
from bare_guest import BareGuest
from boot_images import Elf, Load

from pyvmm import VM
from pyvmm.bus import Bus
from pyvmm.errors import HostError
from pyvmm.host.syscalls import EventFd
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.x86.irqchip import default_routes
from pyvmm.machine.board.registry import board_for
from pyvmm.machine.messages import Messages
from pyvmm.machine.pci_host import PciHost
from pyvmm.testing.pci_driver import COMMAND, MEMORY, PciDriver
from pyvmm.virtio.rng.device import EntropyDevice

CODE = bytes.fromhex(
    # mov eax,0x80000000; mov dx,0xcf8; out dx,eax; mov dx,0xcfc; in eax,dx: function 00.0's IDs
    "b800000080 66baf80c ef 66bafc0c ed"
    # cmp eax,0x0d578086; jne no; mov edi,0xe0000000; cmp eax,[rdi]: the same by the ECAM; jne no
    "3d8680570d 751f bf000000e0 3b07 7516"
    # mov edi,0xe0040000: device 8, which is not there; mov eax,[rdi]; inc eax; jnz no
    "bf000004e0 8b07 ffc0 7509"
    # mov al,'Y'; mov dx,0x3f8; out dx,al; jmp off
    "b059 66baf803 ee eb07"
    # no: mov al,'N'; mov dx,0x3f8; out dx,al
    "b04e 66baf803 ee"
    # off: mov dx,0x600; mov al,5 << 2 | 0x20; out dx,al; jmp off
    "66ba0006 b034 ee ebf7"
)


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_every_machine_has_a_bus_with_its_host_bridge(
    transport: str, kvm: Kvm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    kernel = tmp_path / "kernel"
    kernel.write_bytes(Elf(loads=[Load(data=CODE.ljust(256, b"\x90"))], note=None).build())
    with VM(kernel=str(kernel), kvm="host", vsock=False, rng=True, transport=transport) as vm:
        assert vm.console.expect(["Y", "N"], timeout=60) == 0, vm.console.text
        assert vm.wait(timeout=60).exit_code == 0


class Bench:
    """An entropy device on the bus of a real VM, and a driver in place of the guest."""

    def __init__(self, guest: BareGuest, closing: ExitStack) -> None:
        self.vm = guest.vm
        self.said: list[str] = []
        places = board_for("x86_64").pci_places
        assert places is not None
        self.messages = Messages(self.vm, default_routes(), lambda address: True)
        self.host = PciHost(
            places, self.vm, lambda: self.messages, ports=Bus("I/O port"), mmio=Bus("MMIO")
        )
        self.transport = self.host.attach(
            EntropyDevice(), memory=guest.memory, log=self.said.append, trace=None, closing=closing
        )
        bus = self.host.bus
        base = places.window
        self.driver = PciDriver(bus.ecam, bus.window, base, 1, guest.memory)
        self.driver.find()
        self.driver.place(base)

    def ask(self) -> None:
        written, data = self.driver.request(0, [], [64])
        assert written == 64 and any(data)


@pytest.fixture
def closing():
    with ExitStack() as stack:
        yield stack


MakeGuest = Callable[..., BareGuest]


def test_doorbells_that_kvm_refuses_cost_exits_and_no_more(
    bare_guest: MakeGuest, closing: ExitStack
) -> None:
    bench = Bench(bare_guest(b"\xf4"), closing)
    bench.driver.start()
    other = closing.enter_context(EventFd())
    first = bench.driver.address
    taken = first + 0x10_0000 + bench.transport.doorbells[0].offset
    bench.vm.ioeventfd(other.fd, taken, 0)
    bench.driver.place(first + 0x10_0000)
    assert any("cost an exit each" in line for line in bench.said)
    bench.ask()
    said = len(bench.said)
    bench.driver.place(first)  # nothing of ours is there to be taken away
    bench.ask()
    bench.vm.ioeventfd(other.fd, taken, 0, deassign=True)
    bench.driver.place(first + 0x10_0000)
    bench.driver.write_config(COMMAND, 2, MEMORY)
    assert len(bench.said) == said


@pytest.mark.parametrize("deassign", [False, True])
def test_what_kvm_refuses_of_interrupts_ends_no_vm(
    deassign: bool, bare_guest: MakeGuest, closing: ExitStack
) -> None:
    bench = Bench(bare_guest(b"\xf4"), closing)
    bench.driver.start()
    real = bench.vm.irqfd

    def irqfd(fd: int, gsi: int, **how: bool) -> None:
        if how.get("deassign", False) is deassign:
            raise HostError(12, "KVM_IRQFD")
        real(fd, gsi, **how)

    with patch.object(bench.vm, "irqfd", irqfd):
        for control in (1, 0, 1):
            bench.driver.program(1, 2, control)
    assert any("vector 1 " in line for line in bench.said)
    bench.driver.program(1, 1)
    bench.ask()


def test_a_line_without_a_descriptor_costs_no_gsi(
    bare_guest: MakeGuest, closing: ExitStack
) -> None:
    vm = bare_guest(b"\xf4").vm
    messages = Messages(vm, [default_routes()[0]] * 4095, lambda address: True)  # one GSI is left
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(HostError, match="Too many open files"):
            messages.line()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    closing.callback(messages.line().close)
    with pytest.raises(HostError, match="no more interrupts"):
        messages.line()
