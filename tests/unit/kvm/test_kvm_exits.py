"""Exit reasons decoded from a kvm_run page as KVM would fill it."""

from __future__ import annotations

import mmap
from typing import Any

import pytest

from pyvmm.kvm import exits, uapi
from pyvmm.kvm.exit_decoding import REASON_NAMES, decode
from pyvmm.kvm.uapi import ffi
from pyvmm.kvm.x86 import uapi as x86_uapi
from pyvmm.kvm.x86.debugging import debug_stop

PAGE_COUNT = 3


class Run:
    """A kvm_run page, and the structure in it to fill by the header's names."""

    def __init__(self, reason: int) -> None:
        self.page = memoryview(mmap.mmap(-1, PAGE_COUNT * 4096))
        self.run: Any = ffi.cast("struct kvm_run *", ffi.from_buffer(self.page))
        self.run.exit_reason = reason

    def decode(self) -> exits.Exit:
        return decode(self.page)


def test_every_reason_of_the_header_has_a_value_that_is_not_unknown() -> None:
    assert len(REASON_NAMES) == 42
    for reason, name in REASON_NAMES.items():
        event = Run(reason).decode()
        assert not isinstance(event, exits.Unknown), name
        assert str(event)


def test_a_reason_from_the_future_is_unknown_with_its_number() -> None:
    assert Run(4711).decode() == exits.Unknown(4711)


def test_reasons_of_other_architectures_keep_their_name() -> None:
    event = Run(uapi.KVM_EXIT_S390_SIEIC).decode()
    assert event == exits.OtherArchitecture(13, "KVM_EXIT_S390_SIEIC")


def test_string_output_carries_all_values() -> None:
    made = Run(uapi.KVM_EXIT_IO)
    io = made.run.io
    io.direction, io.size, io.port, io.count, io.data_offset = 1, 2, 0x3F8, 3, 4096
    made.page[4096:4102] = bytes.fromhex("010002000300")
    event = made.decode()
    assert event == exits.IoOut(0x3F8, 2, 3, bytes.fromhex("010002000300"))
    assert isinstance(event, exits.IoOut)
    assert event.values == (1, 2, 3)
    assert str(event) == "out port 0x3f8, 2 bytes x 3: 0x1 0x2 0x3"
    assert str(exits.IoOut(0x3F8, 1, 1, b"x")) == "out port 0x3f8, 1 byte: 0x78"


def test_values_are_copies_that_outlive_the_page() -> None:
    made = Run(uapi.KVM_EXIT_IO)
    io = made.run.io
    io.direction, io.size, io.port, io.count, io.data_offset = 1, 1, 1, 1, 4096
    made.page[4096] = 7
    event = made.decode()
    made.page[4096] = 8
    assert isinstance(event, exits.IoOut)
    assert event.data == b"\x07"


def test_mmio_writes_carry_as_many_bytes_as_the_access_had() -> None:
    made = Run(uapi.KVM_EXIT_MMIO)
    mmio = made.run.mmio
    mmio.phys_addr, mmio.len, mmio.is_write = 0xD000_0000, 2, 1
    mmio.data[0:4] = b"\x34\x12\xff\xff"
    assert made.decode() == exits.MmioWrite(0xD000_0000, 2, 0x1234)


def test_an_emulation_failure_shows_the_instruction() -> None:
    made = Run(uapi.KVM_EXIT_INTERNAL_ERROR)
    failure = made.run.emulation_failure
    failure.suberror, failure.ndata = uapi.KVM_INTERNAL_ERROR_EMULATION, 3
    failure.flags = uapi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    failure.insn_size = 4
    failure.insn_bytes[0:4] = [0x48, 0x0F, 0xC7, 0x0E]
    event = made.decode()
    assert isinstance(event, exits.InternalError)
    assert event.instruction == bytes.fromhex("480fc70e")
    expected = (
        "KVM_EXIT_INTERNAL_ERROR: KVM_INTERNAL_ERROR_EMULATION, instruction bytes 48 0f c7 0e"
    )
    assert str(event) == expected


def test_an_internal_error_of_an_old_kernel_has_no_instruction() -> None:
    made = Run(uapi.KVM_EXIT_INTERNAL_ERROR)
    made.run.internal.suberror = uapi.KVM_INTERNAL_ERROR_EMULATION
    assert made.decode() == exits.InternalError(1, (), b"")


def test_more_data_than_fits_is_cut_to_what_fits() -> None:
    made = Run(uapi.KVM_EXIT_INTERNAL_ERROR)
    made.run.internal.suberror, made.run.internal.ndata = 99, 0xFFFF_FFFF
    event = made.decode()
    assert isinstance(event, exits.InternalError)
    assert len(event.data) == 16
    assert event.name == "suberror 99"


@pytest.mark.parametrize(
    ("kind", "shutdown", "reset", "text"),
    [
        (uapi.KVM_SYSTEM_EVENT_SHUTDOWN, True, False, "system event: shutdown"),
        (uapi.KVM_SYSTEM_EVENT_RESET, False, True, "system event: reset"),
        (uapi.KVM_SYSTEM_EVENT_CRASH, False, False, "system event: crash"),
        (77, False, False, "system event: type 77"),
    ],
)
def test_system_events(kind: int, shutdown: bool, reset: bool, text: str) -> None:
    made = Run(uapi.KVM_EXIT_SYSTEM_EVENT)
    made.run.system_event.type = kind
    made.run.system_event.ndata = 2
    made.run.system_event.data[0:2] = [5, 6]
    event = made.decode()
    assert isinstance(event, exits.SystemEvent)
    assert (event.is_shutdown, event.is_reset, str(event)) == (shutdown, reset, text)
    assert event.data == (5, 6)


def test_hyperv_exits_name_their_fields() -> None:
    made = Run(uapi.KVM_EXIT_HYPERV)
    made.run.hyperv.type = uapi.KVM_EXIT_HYPERV_HCALL
    made.run.hyperv.u.hcall.input = 9
    made.run.hyperv.u.hcall.params = [1, 2]
    event = made.decode()
    fields = (("input", 9), ("result", 0), ("params[0]", 1), ("params[1]", 2))
    assert event == exits.Hyperv("hcall", fields)


def _set(run: Any, member: str, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(getattr(run, member), name, value)


@pytest.mark.parametrize(
    ("reason", "member", "fields", "expected"),
    [
        (
            uapi.KVM_EXIT_FAIL_ENTRY,
            "fail_entry",
            {"hardware_entry_failure_reason": 0x8000_0021, "cpu": 3},
            exits.FailEntry(0x8000_0021, 3),
        ),
        (
            uapi.KVM_EXIT_X86_RDMSR,
            "msr",
            {"index": 0x10A, "reason": uapi.KVM_MSR_EXIT_REASON_UNKNOWN},
            exits.Rdmsr(0x10A, 2),
        ),
        (
            uapi.KVM_EXIT_X86_WRMSR,
            "msr",
            {"index": 0x10, "reason": 4, "data": 1 << 63},
            exits.Wrmsr(0x10, 4, 1 << 63),
        ),
        (
            uapi.KVM_EXIT_MEMORY_FAULT,
            "memory_fault",
            {"flags": 8, "gpa": 0x1000, "size": 0x2000},
            exits.MemoryFault(8, 0x1000, 0x2000),
        ),
        (uapi.KVM_EXIT_NOTIFY, "notify", {"flags": 1}, exits.Notify(True)),
        (uapi.KVM_EXIT_IOAPIC_EOI, "eoi", {"vector": 0x31}, exits.IoapicEoi(0x31)),
        (
            uapi.KVM_EXIT_TPR_ACCESS,
            "tpr_access",
            {"rip": 0x1234, "is_write": 1},
            exits.TprAccess(0x1234, True),
        ),
        (
            uapi.KVM_EXIT_HYPERCALL,
            "hypercall",
            {"nr": 12, "args": [1, 2, 3, 4, 5, 6], "longmode": 1},
            exits.Hypercall(12, (1, 2, 3, 4, 5, 6), True),
        ),
        (
            uapi.KVM_EXIT_ARM_NISV,
            "arm_nisv",
            {"esr_iss": 1, "fault_ipa": 2},
            exits.ArmNisv(1, 2),
        ),
        (
            uapi.KVM_EXIT_UNKNOWN,
            "hw",
            {"hardware_exit_reason": 0x41},
            exits.UnknownHardware(0x41),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_members_of_the_union(
    reason: int, member: str, fields: dict[str, Any], expected: exits.Exit
) -> None:
    made = Run(reason)
    _set(made.run, member, **fields)
    assert made.decode() == expected


def test_debug_exits_tell_where() -> None:
    made = Run(uapi.KVM_EXIT_DEBUG)
    arch = x86_uapi.ffi.cast("struct kvm_debug_exit_arch *", made.run.debug.arch)
    arch.exception, arch.pc, arch.dr6, arch.dr7 = x86_uapi.BP_VECTOR, 0x1000, 1, 2
    event = made.decode()
    assert isinstance(event, exits.Debug)
    assert debug_stop(event) == (3, 0x1000, 1, 2)
