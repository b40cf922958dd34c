"""GICv2m's registers; the test is Linux' driver (drivers/irqchip/irq-gic-v2m.c)."""

from __future__ import annotations

import pytest

from pyvmm.platform.arm64.gicv2m import DOORBELL, SIZE, Gicv2m

TYPER, IIDR = 0x008, 0xFCC


@pytest.fixture
def sent() -> list[int]:
    return []


@pytest.fixture
def frame(sent: list[int]) -> Gicv2m:
    return Gicv2m(range(96, 256), sent.append)


def test_the_driver_learns_which_interrupts_are_messages(frame: Gicv2m) -> None:
    typer = frame.read(TYPER, 4)
    assert (typer >> 16 & 0x3FF, typer & 0x3FF) == (96, 160)
    # What it knows flaws of: X-Gene 1, NS2, Graviton
    assert frame.read(IIDR, 4) not in (0, 0x0600_0170, 0x0000_013F, 0x0000_043B)


def test_a_write_to_the_doorbell_is_an_interrupt(frame: Gicv2m, sent: list[int]) -> None:
    for number in (96, 255, 100):
        frame.write(DOORBELL, 4, number)
    assert sent == [96, 255, 100]


def test_what_interrupts_nobody(frame: Gicv2m, sent: list[int]) -> None:
    for number in (0, 31, 95, 256, 1 << 31, (1 << 32) - 1):
        frame.write(DOORBELL, 4, number)
    for size in (1, 2, 8):
        frame.write(DOORBELL, size, 96)
    for offset in range(SIZE):
        if offset != DOORBELL:
            frame.write(offset, 4, 96)
    assert sent == []


def test_every_offset_is_answered(frame: Gicv2m) -> None:
    for offset in range(SIZE):
        for size in (1, 2, 4, 8):
            value = frame.read(offset, size)
            assert 0 <= value < 1 << 32
            assert not value or offset in (TYPER, IIDR)
