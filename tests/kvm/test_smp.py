"""More than one vCPU: start-up by INIT and SIPI, and each with an identity of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

from bare_guest import BareGuest, VcpuThread

from pyvmm.kvm.vcpu import EXIT_INTR
from pyvmm.kvm.x86 import uapi

MakeGuest = Callable[..., BareGuest]

AP_START = 0x3000

BOOT_CPU = bytes.fromhex(
    "c705f000e0feff010000"  # mov dword [0xfee000f0], 0x1ff: local APIC on
    "c7050003e0fe00450c00"  # mov dword [0xfee00300], 0xc4500: INIT to all others
    "c7050003e0fe03460c00"  # mov dword [0xfee00300], 0xc4603: SIPI, start at 0x3000
    "f4"  # wait: hlt
    "ebfd"  # jmp wait
)
# 16-bit code: says the initial APIC id of CPUID leaf 1
OTHER_CPU = bytes.fromhex(
    "66b801000000"  # mov eax, 1
    "0fa2"  # cpuid
    "66c1eb18"  # shr ebx, 24
    "88d8"  # mov al, bl
    "e630"  # out 0x30, al
    "f4"  # wait: hlt
    "ebfd"  # jmp wait
)


class RollCall:
    def __init__(self) -> None:
        self.present: list[int] = []
        self.arrived = threading.Semaphore(0)

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.present.append(value)
        self.arrived.release()


def test_the_others_wait_for_start_up_and_know_who_they_are(bare_guest: MakeGuest) -> None:
    guest = bare_guest(BOOT_CPU, vcpus=3)
    guest.memory.write(AP_START, OTHER_CPU)
    roll = RollCall()
    guest.ports.register(0x30, 1, roll)
    assert [vcpu.get_mp_state() for vcpu in guest.vcpus] == [
        uapi.KVM_MP_STATE_RUNNABLE,
        uapi.KVM_MP_STATE_UNINITIALIZED,
        uapi.KVM_MP_STATE_UNINITIALIZED,
    ]
    # The others first: they sleep in KVM_RUN until the boot CPU calls.
    threads = [VcpuThread(guest, vcpu) for vcpu in reversed(guest.vcpus)]
    for _ in range(2):
        assert roll.arrived.acquire(timeout=60)
    for vcpu in guest.vcpus:
        vcpu.kick()
    for thread in threads:
        thread.join()
        assert thread.exit_reason == EXIT_INTR
    assert sorted(roll.present) == [1, 2]


def test_a_vcpu_that_waits_for_start_up_can_be_stopped(bare_guest: MakeGuest) -> None:
    guest = bare_guest(BOOT_CPU, vcpus=2)
    thread = VcpuThread(guest, guest.vcpus[1])
    guest.vcpus[1].kick()
    thread.join()
    assert thread.exit_reason == EXIT_INTR
    assert guest.vcpus[1].get_mp_state() == uapi.KVM_MP_STATE_UNINITIALIZED


def test_mp_state_can_be_set(bare_guest: MakeGuest) -> None:
    guest = bare_guest(BOOT_CPU, vcpus=2)
    guest.vcpus[1].set_mp_state(uapi.KVM_MP_STATE_RUNNABLE)
    assert guest.vcpus[1].get_mp_state() == uapi.KVM_MP_STATE_RUNNABLE
    guest.vcpus[1].set_mp_state(uapi.KVM_MP_STATE_UNINITIALIZED)
    assert guest.vcpus[1].get_mp_state() == uapi.KVM_MP_STATE_UNINITIALIZED
