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
from pyvmm.machine.board.x86 import layout
from pyvmm.machine.messages import Messages
from pyvmm.machine.pci_host import PciHost
from pyvmm.pci.registers import PCI_EXP_DEVCTL_BCR_FLR
from pyvmm.testing.pci_driver import BUS_MASTER, CAP_EXPRESS, COMMAND, MEMORY, PciDriver
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


def assert_no_doorbell_at(bench: Bench, closing: ExitStack, *places: int) -> None:
    """KVM refuses a second one where one is."""
    other = closing.enter_context(EventFd())
    for at in places:
        where = at + bench.transport.doorbells[0].offset
        bench.vm.ioeventfd(other.fd, where, 0)
        bench.vm.ioeventfd(other.fd, where, 0, deassign=True)


ELSEWHERE = {
    "RAM": 0,
    "the ECAM": layout.PCI_ECAM,
    "virtio-mmio": layout.VIRTIO_MMIO_BASE,
    "the I/O APIC": layout.IOAPIC & ~0xFFFF,
    "the local APIC": layout.LOCAL_APIC,
    "half out of the window": layout.PCI_WINDOW + layout.PCI_WINDOW_SIZE,
    "below the window": layout.PCI_WINDOW - 0x1_0000,
    "above 4 GiB": 1 << 32,
    "above the address width": 1 << 52,
    "the end of all addresses": (1 << 64) - 0x1_0000,
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_row62_a_bar_over_what_is_no_window_is_nowhere(
    where: str, bare_guest: MakeGuest, closing: ExitStack
) -> None:
    guest = bare_guest(b"\xf4")
    bench = Bench(guest, closing)
    bench.driver.start()
    ram = guest.memory.read(0, 0x8000)
    first = bench.driver.address
    bench.driver.place(ELSEWHERE[where])
    assert bench.host.bus.window.where(bench.transport.bar) is None
    assert_no_doorbell_at(bench, closing, first, ELSEWHERE[where])
    assert guest.memory.read(0, 0x8000) == ram
    bench.driver.place(first)
    bench.ask()
    assert bench.said == []


@pytest.mark.parametrize("how", ["decoding off", "moved", "function reset", "unplugged"])
def test_row62_no_doorbell_stays_where_a_bar_was(
    how: str, bare_guest: MakeGuest, closing: ExitStack
) -> None:
    bench = Bench(bare_guest(b"\xf4"), closing)
    bench.driver.start()
    first = bench.driver.address
    with pytest.raises(HostError, match="File exists"):
        assert_no_doorbell_at(bench, closing, first)
    if how == "decoding off":
        bench.driver.write_config(COMMAND, 2, BUS_MASTER)
    elif how == "moved":
        bench.driver.place(first + 0x10_0000)
        bench.ask()
    elif how == "function reset":
        express = dict(bench.driver.capabilities())[CAP_EXPRESS]
        bench.driver.write_config(express + 8, 2, PCI_EXP_DEVCTL_BCR_FLR)
    else:
        bench.host.unplug(1, bench.transport)
    assert_no_doorbell_at(bench, closing, first)
    assert bench.said == []


def test_row63_without_bus_mastering_kvm_sends_no_message(
    bare_guest: MakeGuest, closing: ExitStack
) -> None:
    bench = Bench(bare_guest(b"\xf4"), closing)
    bench.driver.start()
    line = bench.transport.msix.lines[1]
    bench.driver.write_config(COMMAND, 2, MEMORY)
    bench.transport.used_buffer(0)
    assert line.pending
    bench.driver.write_config(COMMAND, 2, MEMORY | BUS_MASTER)
    assert not line.pending
    bench.transport.used_buffer(0)
    assert not line.pending


@pytest.mark.parametrize("apic", [1, 0x7F, 0xFE])
def test_row66_a_message_to_an_apic_that_is_not_there(
    apic: int, bare_guest: MakeGuest, closing: ExitStack
) -> None:
    """KVM drops it; the device goes on, and so does the next message to one that is there."""
    bench = Bench(bare_guest(b"\xf4"), closing)
    bench.driver.start()
    at = bench.driver.msix.offset + 16
    for address in (layout.LOCAL_APIC | apic << 12, layout.LOCAL_APIC):
        bench.host.bus.window.write(at, 4, address)
        for _ in range(3):
            bench.ask()
        assert not bench.transport.msix.lines[1].pending
    assert bench.said == []


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
