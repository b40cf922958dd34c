"""VMClock's page, field by field as <linux/vmclock-abi.h> has them, and what a copy finds there."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from pyvmm.boot import x86 as boot
from pyvmm.boot.x86 import layout, vmclock
from pyvmm.memory import GuestMemory

# struct vmclock_abi, written down from the header.
FIELDS = (
    *("magic I", "size I", "version H", "counter_id B", "time_type B", "seq_count I"),
    *("disruption_marker Q", "flags Q", "pad H", "clock_status B", "leap_second_smearing_hint B"),
    *("tai_offset_sec h", "leap_indicator B", "counter_period_shift B", "counter_value Q"),
    *("counter_period_frac_sec Q", "counter_period_esterror_rate_frac_sec Q"),
    *("counter_period_maxerror_rate_frac_sec Q", "time_sec Q", "time_frac_sec Q"),
    *("time_esterror_nanosec Q", "time_maxerror_nanosec Q", "vm_generation_counter Q"),
)
FORM = struct.Struct("<" + "".join(field.split()[1] for field in FIELDS))


def page_of(memory: GuestMemory) -> dict[str, int]:
    page = bytes(memory.read(layout.VMCLOCK, layout.VMCLOCK_SIZE))
    assert not any(page[FORM.size :])
    values = FORM.unpack_from(page)
    return dict(zip((field.split()[0] for field in FIELDS), values, strict=True))


@contextmanager
def guest() -> Iterator[GuestMemory]:
    with closing(GuestMemory(boot.ram_ranges(32 << 20))) as memory:
        vmclock.begin(memory)
        yield memory


def test_the_page_of_a_guest_that_boots() -> None:
    assert FORM.size == 0x70
    with guest() as memory, guest() as other:
        page = page_of(memory)
        generation = page.pop("vm_generation_counter")
        assert generation != page_of(other)["vm_generation_counter"]
        set_fields = {name: value for name, value in page.items() if value}
        assert set_fields == {
            "magic": 0x4B4C4356,
            "size": 4096,
            "version": 1,
            "counter_id": 0xFF,
            "time_type": 1,
            "flags": 1 << 8 | 1 << 9,
        }


def test_a_copy_is_told_between_an_odd_and_an_even_number() -> None:
    with guest() as memory:
        seen: list[dict[str, int]] = [page_of(memory)]

        class Watched:
            def read(self, addr: int, size: int) -> Any:
                return memory.read(addr, size)

            def write(self, addr: int, data: Any) -> None:
                memory.write(addr, data)
                seen.append(page_of(memory))

        for number in (1, 2):
            before = page_of(memory)
            del seen[:]
            vmclock.disrupt(Watched())  # type: ignore[arg-type]
            *under_way, after = seen
            assert [page["seq_count"] & 1 for page in seen] == [1] * len(under_way) + [0]
            assert under_way[0] == {**before, "seq_count": 2 * number - 1}
            assert after == {
                **before,
                "seq_count": 2 * number,
                "disruption_marker": number,
                "vm_generation_counter": after["vm_generation_counter"],
            }
            assert after["vm_generation_counter"] != before["vm_generation_counter"]


def test_what_a_guest_has_written_there_does_no_harm() -> None:
    with guest() as memory:
        memory.write(layout.VMCLOCK + 0x0C, b"\xff" * 12)  # sequence and marker
        vmclock.disrupt(memory)
        page = page_of(memory)
        assert (page["seq_count"], page["disruption_marker"]) == (0, 0)
        # Not the page of one that knows it: it may be anything, and stays so.
        for offset in (0, 4, 8):
            vmclock.begin(memory)
            memory.write(layout.VMCLOCK + offset, b"?")
            before = bytes(memory.read(layout.VMCLOCK, layout.VMCLOCK_SIZE))
            boot.tell_of_copy(memory)
            assert bytes(memory.read(layout.VMCLOCK, layout.VMCLOCK_SIZE)) == before
