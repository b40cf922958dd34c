"""What boot puts into the descriptor table is what the vCPU's segment registers are set to."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Literal

import pytest
from boot_images import Elf, boot

from pyvmm.kvm.x86 import boot_vcpu
from pyvmm.kvm.x86.uapi import ffi


def decoded(descriptor: int) -> dict[str, int]:
    """A segment descriptor taken apart (Intel SDM, volume 3, 3.4.5)."""
    g = descriptor >> 55 & 1
    limit = descriptor & 0xFFFF | (descriptor >> 48 & 0xF) << 16
    return {
        "base": descriptor >> 16 & 0xFF_FFFF | descriptor >> 56 << 24,
        "limit": limit << 12 | 0xFFF if g else limit,
        "type": descriptor >> 40 & 0xF,
        "s": descriptor >> 44 & 1,
        "dpl": descriptor >> 45 & 3,
        "present": descriptor >> 47 & 1,
        "l": descriptor >> 53 & 1,
        "db": descriptor >> 54 & 1,
        "g": g,
    }


def loaded(segment: Any) -> dict[str, int]:
    names = ("base", "limit", "type", "s", "dpl", "present", "l", "db", "g")
    return {name: int(getattr(segment, name)) for name in names}


@pytest.mark.parametrize(("mode", "note"), [("long64", None), ("protected32", 0x100_0000)])
def test_table_and_registers_agree(
    tmp_path: Path, mode: Literal["long64", "protected32"], note: int | None
) -> None:
    entry, memory = boot(tmp_path, Elf(note=note).build())
    assert entry.mode == mode
    table = struct.unpack("<5Q", memory.read(entry.gdt_base, 40))
    sregs = ffi.new("struct kvm_sregs *")
    boot_vcpu.set_flat_segments(sregs, mode)
    for segment in (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.tr):
        assert loaded(segment) == decoded(table[segment.selector // 8])
