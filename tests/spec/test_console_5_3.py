"""virtio 1.3, 5.3 Console Device: one test for each thing the device must or should do."""

from __future__ import annotations

import struct
from pathlib import Path

from console_rig import (
    ADD,
    NAME,
    OPEN,
    PORT_READY,
    READY,
    RESIZE,
    RX0,
    TX0,
    running,
    rx,
)
from mmio_harness import wait_for

from pyvmm.testing.mmio_driver import CONFIG_CHANGED, DEVICE_ID, QUEUE_SEL, QUEUE_SIZE_MAX

F_SIZE, F_MULTIPORT, F_EMERG_WRITE = 1 << 0, 1 << 1, 1 << 2


def queues(driver: object) -> int:
    count = 0
    while True:
        driver.write(QUEUE_SEL, count)  # type: ignore[attr-defined]
        if not driver.read(QUEUE_SIZE_MAX):  # type: ignore[attr-defined]
            return count
        count += 1


def test_5_3_1_device_id(tmp_path: Path) -> None:
    with running(tmp_path, terminal=True) as rig:
        assert rig.driver.read(DEVICE_ID) == 3


def test_5_3_2_queues_of_port_0_always_and_others_with_multiport(tmp_path: Path) -> None:
    with running(tmp_path, terminal=True) as rig:
        assert queues(rig.driver) == 2
    with running(tmp_path, "one", "two") as rig:
        assert queues(rig.driver) == 8


def test_5_3_3_features_are_those_that_are_served(tmp_path: Path) -> None:
    own = F_SIZE | F_MULTIPORT | F_EMERG_WRITE
    with running(tmp_path, terminal=True) as rig:
        assert rig.driver.offered_features() & own == F_SIZE | F_EMERG_WRITE
    with running(tmp_path, "one") as rig:
        assert rig.driver.offered_features() & own == F_MULTIPORT


def test_5_3_4_configuration(tmp_path: Path) -> None:
    with running(tmp_path, "one", "two", terminal=True) as rig:
        rig.device.set_size(80, 25)
        assert struct.unpack("<HHLL", rig.driver.config(0, 12)) == (80, 25, 3, 0)


def test_5_3_5_1_emerg_wr_may_be_written_on_an_unconfigured_device(tmp_path: Path) -> None:
    with running(tmp_path, terminal=True, start=False) as rig:
        rig.driver.registers.write(0x108, 4, ord("x"))
        assert rig.screen == b"x"


def test_5_3_5_1_its_lower_byte_is_put_out(tmp_path: Path) -> None:
    with running(tmp_path, terminal=True) as rig:
        rig.driver.registers.write(0x108, 4, 0x4142_4300 | ord("y"))
        assert rig.screen == b"y"


def test_5_3_6_output_and_input(tmp_path: Path) -> None:
    with running(tmp_path, terminal=True) as rig:
        rig.offer(RX0)
        rig.driver.request(TX0, [b"output"])
        assert rig.screen == b"output"
        assert rig.terminal is not None
        rig.terminal.enqueue_input(b"input")
        assert rig.take(RX0) == b"input"


def test_5_3_6_a_new_size_is_a_configuration_change(tmp_path: Path) -> None:
    with running(tmp_path, terminal=True) as rig:
        rig.device.set_size(80, 25)
        wait_for(lambda: rig.irq.count > 0)
        assert rig.driver.acknowledge() & CONFIG_CHANGED


def test_5_3_6_2_ports_are_added_once_the_driver_is_ready(tmp_path: Path) -> None:
    with running(tmp_path, "one", "two") as rig:
        rig.tell(0, READY, 1)
        assert [rig.hear()[:2] for _ in range(2)] == [(1, ADD), (2, ADD)]


def test_5_3_6_2_no_port_is_added_that_exists_or_is_too_large(tmp_path: Path) -> None:
    with running(tmp_path, "one") as rig:
        for _ in range(3):
            rig.tell(0, READY, 1)
        assert rig.hear() == (1, ADD, 0, b"")
        rig.tell(1, PORT_READY, 1)
        id, event, _, name = rig.hear()
        assert (id, event, name) == (1, NAME, b"one")
        (max_nr_ports,) = struct.unpack("<L", rig.driver.config(4, 4))
        assert id < max_nr_ports


def test_5_3_6_2_open_is_told_both_ways(tmp_path: Path) -> None:
    with running(tmp_path, "one") as rig:
        rig.set_up(1)
        client = rig.connect("one")
        assert rig.hear() == (1, OPEN, 1, b"")
        client.close()
        assert rig.hear() == (1, OPEN, 0, b"")
        with rig.connect("one") as again:
            assert rig.hear() == (1, OPEN, 1, b"")
            rig.tell(1, OPEN, 0)
            assert again.recv(1) == b""


def test_5_3_6_2_names_have_no_nul_and_are_utf_8(tmp_path: Path) -> None:
    with running(tmp_path, "größe") as rig:
        rig.tell(0, READY, 1)
        rig.hear()
        rig.tell(1, PORT_READY, 1)
        assert rig.hear()[3].decode() == "größe"


def test_5_3_6_2_a_console_port_hears_of_a_new_size(tmp_path: Path) -> None:
    with running(tmp_path, "one", terminal=True) as rig:
        rig.tell(0, READY, 1)
        rig.tell(0, PORT_READY, 1)
        rig.device.set_size(100, 30)
        while (message := rig.hear())[1] != RESIZE:
            pass
        assert message == (0, RESIZE, 0, struct.pack("<HH", 100, 30))


def test_5_3_2_a_port_has_its_own_queues(tmp_path: Path) -> None:
    with running(tmp_path, "one", "two") as rig:
        rig.set_up(1, 2)
        with rig.connect("two") as client:
            rig.hear()
            client.sendall(b"for two")
            assert rig.take(rx(2)) == b"for two"
            rig.write(2, b"from two")
            assert client.recv(100) == b"from two"
