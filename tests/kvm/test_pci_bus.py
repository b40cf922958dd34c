"""The PCI bus of a machine on real KVM, without a Linux in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from boot_images import Elf, Load

from pyvmm import VM
from pyvmm.kvm.system import Kvm

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
