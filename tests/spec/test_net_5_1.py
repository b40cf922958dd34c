"""virtio 1.3, 5.1 Network Device: one test for each thing the device must or should do.

What binds a device only with features that pyvmm does not offer (RSS, HASH_REPORT, VLAN filtering,
tunnels, RSC, statistics, coalescing, flow filters, IPsec) is not listed.
"""

from __future__ import annotations

import struct
import threading

import pytest
from net_rig import (
    BROADCAST,
    ERR,
    F_CSUM,
    F_CTRL_MAC_ADDR,
    F_CTRL_RX,
    F_CTRL_RX_EXTRA,
    F_CTRL_VQ,
    F_GUEST_CSUM,
    F_GUEST_ECN,
    F_GUEST_OFFLOADS,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    F_GUEST_UFO,
    F_GUEST_USO4,
    F_GUEST_USO6,
    F_HOST_ECN,
    F_HOST_TSO4,
    F_HOST_TSO6,
    F_HOST_UFO,
    F_HOST_USO,
    F_MAC,
    F_MQ,
    F_MRG_RXBUF,
    F_MTU,
    F_STATUS,
    GROUP,
    GSO_TCPV4,
    GUEST_OFFLOADS,
    HEADER,
    MAC,
    NEEDS_CSUM,
    OK,
    OTHER,
    Cable,
    NetRig,
    frame,
    header,
    running,
    wait_for,
)

from pyvmm.virtio.net.filter import ReceiveFilter

RX, MAC_CLASS, MQ, GUEST_OFFLOADS_CLASS = 0, 1, 4, 5
PROMISC, ALLMULTI, ALLUNI, NOMULTI, NOUNI, NOBCAST = range(6)
F_VERSION_1 = 1 << 32


# --- 5.1.1 to 5.1.4: what the device is -----------------------------------------------------------


def test_5_1_1_device_id() -> None:
    with running() as rig:
        assert rig.driver.mmio.read(0x008) == 1


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_5_1_2_virtqueues(pairs: int) -> None:
    with running(Cable(pairs)) as rig:
        assert len(rig.driver.queues) == 2 * pairs + 1
        assert bool(rig.driver.features & F_MQ) is (pairs > 1)
        assert rig.command(RX, PROMISC, b"\1") == OK  # by the last queue
        rig.assert_alive()


def test_5_1_2_without_mq_the_control_queue_is_the_third() -> None:
    with running(Cable(4), without=F_MQ) as rig:
        assert rig.command(RX, PROMISC, b"\1", queue=2) == OK
        rig.assert_alive()


def test_5_1_3_1_features_come_with_those_they_require() -> None:
    with running() as rig:
        offered = rig.driver.mmio.offered_features()
    needs = (
        (F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_UFO | F_GUEST_USO4 | F_GUEST_USO6, F_GUEST_CSUM),
        (F_GUEST_ECN, F_GUEST_TSO4),
        (F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_UFO | F_HOST_USO, F_CSUM),
        (F_HOST_ECN, F_HOST_TSO4),
        (F_CTRL_RX | F_MQ | F_CTRL_MAC_ADDR | F_CTRL_RX_EXTRA | F_GUEST_OFFLOADS, F_CTRL_VQ),
    )
    for features, needed in needs:
        assert not offered & features or offered & needed


def test_5_1_3_2_no_legacy_features() -> None:
    with running() as rig:
        assert not rig.driver.mmio.offered_features() & (1 << 6 | 1 << 41 | 1 << 42)


@pytest.mark.parametrize("pairs", [2, 16])
def test_5_1_4_1_max_virtqueue_pairs_is_between_1_and_0x8000_with_mq(pairs: int) -> None:
    with running(Cable(pairs), queue_size=4) as rig:
        assert rig.driver.config(8, 2) == struct.pack("<H", pairs)


@pytest.mark.parametrize("mtu", [68, 1280, 1500, 65535])
def test_5_1_4_1_mtu_is_between_68_and_65535_and_does_not_change(mtu: int) -> None:
    with running(Cable(mtu=mtu)) as rig:
        assert rig.driver.features & F_MTU
        assert rig.driver.config(10, 2) == struct.pack("<H", mtu)
        rig.driver.mmio.registers.write(0x108, 4, 0xFFFF_FFFF)
        rig.driver.restart()
        assert rig.driver.config(10, 2) == struct.pack("<H", mtu)


def test_5_1_4_1_received_frames_do_not_exceed_the_mtu() -> None:
    with running(Cable(mtu=1000)) as rig:
        [chain] = rig.offer(4096)
        rig.inject(frame(1015, fill=1))
        rig.inject(frame(1014, fill=2))
        assert rig.received(chain)[1][HEADER:] == frame(1014, fill=2)


def test_5_1_4_1_frames_up_to_the_mtu_are_forwarded_in_one_piece() -> None:
    with running(Cable(mtu=9000)) as rig:
        rig.send(header() + frame(9014))
        assert rig.sent()[1] == frame(9014)


def test_5_1_4_the_configuration_is_read_only() -> None:
    with running() as rig:
        before = rig.driver.config(0, 24)
        for offset in range(0, 24, 4):
            rig.driver.mmio.write(0x100 + offset, 0xFFFF_FFFF)
        assert rig.driver.config(0, 24) == before
        assert before[:8] == MAC + b"\1\0"


def test_5_1_4_fields_of_features_not_offered_are_zero() -> None:
    with running() as rig:
        assert rig.driver.config(8, 2) == b"\0\0"  # max_virtqueue_pairs, without MQ
        assert rig.driver.config(12, 12) == bytes(12)


# --- 5.1.6.2 Packet Transmission ------------------------------------------------------------------


@pytest.mark.parametrize("flag", [2, 4, 8, 16, 32, 64, 128])
def test_5_1_6_2_2_unknown_flags_are_ignored(flag: int) -> None:
    with running() as rig:
        rig.send(header(flag) + frame())
        assert rig.sent() == (header(), frame())


def test_5_1_6_2_2_csum_fields_are_not_used_without_needs_csum() -> None:
    with running() as rig:
        rig.send(header(0, 0, 0, 0, 0xFFFF, 0xFFFF) + frame())
        assert rig.sent() == (header(), frame())


@pytest.mark.parametrize("hdr_len", [0, 1, 54, 200, 65535])
def test_5_1_6_2_2_hdr_len_is_not_relied_on(hdr_len: int) -> None:
    with running() as rig:
        rig.send(header(NEEDS_CSUM, GSO_TCPV4, hdr_len, 1448, 34, 16) + frame(200))
        head, data = rig.sent()
        assert data == frame(200)
        assert struct.unpack("<BBHHHHH", head)[2] <= 200


def test_5_1_6_2_2_both_tunnel_bits_are_refused() -> None:
    with running() as rig:
        rig.send(header(NEEDS_CSUM, GSO_TCPV4 | 0x60, 54, 1448, 34, 16) + frame(200))
        assert rig.nothing_sent()
        rig.assert_alive()


# --- 5.1.6.3, 5.1.6.4 Receiving -------------------------------------------------------------------


def test_5_1_6_3_2_num_buffers_is_how_many_hold_the_packet() -> None:
    with running() as rig:
        chains = rig.offer(100, 100, 100)
        rig.inject(frame(250))
        assert rig.received(chains[0])[1][10:12] == b"\3\0"


def test_5_1_6_3_2_one_descriptor_chain_without_mrg_rxbuf() -> None:
    with running(without=F_MRG_RXBUF) as rig:
        chains = rig.offer([100, 100, 100], 500)
        rig.inject(frame(250))
        assert rig.received(chains[0])[0] == HEADER + 250
        assert not rig.driver.queues[0].has_used()


def test_5_1_6_4_1_num_buffers_is_1_without_mrg_rxbuf() -> None:
    with running(without=F_MRG_RXBUF) as rig:
        # The kernel leaves the field alone, so the device must not pass on what is there.
        assert rig.expect(frame(), header(num_buffers=77))[10:12] == b"\1\0"


def test_5_1_6_4_1_all_buffers_but_the_last_are_used_up_and_seen_together() -> None:
    with running() as rig:
        chains = rig.offer(64, 200, 33, 1000)
        rig.inject(frame(400))
        assert [rig.received(chain)[0] for chain in chains] == [64, 200, 33, HEADER + 400 - 297]


def test_5_1_6_4_1_buffers_of_one_frame_become_used_at_once() -> None:
    with running() as rig:
        queue = rig.driver.queues[0]
        seen: set[int] = set()
        stop = threading.Event()

        def look() -> None:
            while not stop.is_set():
                seen.add(queue.used_idx % 3)

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            for _ in range(50):
                chains = rig.offer(100, 100, 100)
                rig.inject(frame(280))
                for chain in chains:
                    rig.received(chain)
        finally:
            stop.set()
            watcher.join()
        assert seen == {0}


def test_5_1_6_4_1_flags_are_0_without_guest_csum() -> None:
    with running(without=GUEST_OFFLOADS) as rig:
        assert rig.expect(frame(), header(2))[0] == 0
        assert rig.cable.offloads_set[-1] == 0


def test_5_1_6_4_1_what_was_not_negotiated_is_not_asked_of_the_host() -> None:
    for without in (F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_UFO, F_GUEST_USO4 | F_GUEST_USO6):
        with running(without=without) as rig:
            assert rig.cable.offloads_set[-1] == GUEST_OFFLOADS & ~without


def test_5_1_6_4_1_no_segmentation_for_a_driver_without_guest_csum() -> None:
    with running(without=F_GUEST_CSUM) as rig:
        assert rig.cable.offloads_set[-1] == 0


def test_5_1_6_4_1_gso_type_comes_with_needs_csum_and_gso_size() -> None:
    head = header(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16)
    with running() as rig:
        assert rig.expect(frame(1900), head)[:10] == head[:10]


# --- 5.1.6.5 Control Virtqueue --------------------------------------------------------------------


def reaches(rig: NetRig, to: bytes) -> bool:
    """True if a frame to that address is received."""
    [chain] = rig.offer(2048)
    rig.inject(frame(to=to, fill=1))
    counters = rig.device.received[0]
    wait_for(lambda: rig.driver.queues[0].has_used() or bool(counters.dropped))
    if not counters.dropped:
        return rig.received(chain)[1][HEADER:] == frame(to=to, fill=1)
    assert counters.dropped == {"not addressed to the guest": 1}
    counters.dropped.clear()
    # The buffer is still there: the next frame fills it.
    rig.device.set_filter(ReceiveFilter(MAC, promisc=True))
    rig.inject(frame(fill=2))
    rig.received(chain)
    rig.device.set_filter(rig.device._control._filter)
    return False


def test_5_1_6_5_1_promiscuous_mode() -> None:
    with running() as rig:
        assert not reaches(rig, OTHER)
        assert rig.command(RX, PROMISC, b"\1") == OK
        for mode in (NOMULTI, NOUNI, NOBCAST):  # takes effect even then
            assert rig.command(RX, mode, b"\1") == OK
        assert reaches(rig, OTHER) and reaches(rig, GROUP) and reaches(rig, BROADCAST)
        assert rig.command(RX, PROMISC, b"\0") == OK
        assert not reaches(rig, OTHER)


def test_5_1_6_5_1_all_multicast() -> None:
    with running() as rig:
        assert not reaches(rig, GROUP)
        assert rig.command(RX, ALLMULTI, b"\1") == OK
        assert reaches(rig, GROUP) and not reaches(rig, OTHER)
        assert rig.command(RX, ALLMULTI, b"\0") == OK
        assert not reaches(rig, GROUP)


def test_5_1_6_5_1_all_unicast() -> None:
    with running() as rig:
        assert rig.command(RX, ALLUNI, b"\1") == OK
        assert reaches(rig, OTHER) and not reaches(rig, GROUP)


def test_5_1_6_5_1_no_multicast_even_with_allmulti_but_broadcast() -> None:
    with running() as rig:
        assert rig.command(RX, ALLMULTI, b"\1") == OK
        assert rig.command(RX, NOMULTI, b"\1") == OK
        assert not reaches(rig, GROUP) and reaches(rig, BROADCAST)


def test_5_1_6_5_1_no_unicast_even_with_alluni() -> None:
    with running() as rig:
        assert rig.command(RX, ALLUNI, b"\1") == OK
        assert rig.command(RX, NOUNI, b"\1") == OK
        assert not reaches(rig, MAC) and not reaches(rig, OTHER)


def test_5_1_6_5_1_no_broadcast_even_with_allmulti() -> None:
    with running() as rig:
        assert rig.command(RX, ALLMULTI, b"\1") == OK
        assert rig.command(RX, NOBCAST, b"\1") == OK
        assert not reaches(rig, BROADCAST) and reaches(rig, GROUP)


def test_5_1_6_5_1_commands_of_features_not_negotiated_are_errors() -> None:
    with running(without=F_CTRL_RX_EXTRA) as rig:
        assert rig.command(RX, ALLUNI, b"\1") == ERR
        assert rig.command(RX, PROMISC, b"\1") == OK
    with running(without=F_CTRL_RX | F_CTRL_RX_EXTRA | F_CTRL_MAC_ADDR) as rig:
        assert rig.command(RX, PROMISC, b"\0") == ERR
        assert rig.command(MAC_CLASS, 0, bytes(8)) == ERR
        assert rig.command(MAC_CLASS, 1, OTHER) == ERR
        rig.expect(frame(to=OTHER))  # who cannot choose gets everything


def table(*addresses: bytes) -> bytes:
    return struct.pack("<L", len(addresses)) + b"".join(addresses)


def test_5_1_6_5_2_the_table_is_empty_after_reset() -> None:
    with running() as rig:
        assert rig.command(MAC_CLASS, 0, table(OTHER) + table(GROUP)) == OK
        assert reaches(rig, OTHER)
        rig.driver.restart()
        assert not reaches(rig, OTHER) and not reaches(rig, GROUP) and reaches(rig, MAC)


def test_5_1_6_5_2_the_table_is_in_force_when_the_command_is_used() -> None:
    with running() as rig:
        for _ in range(20):
            assert rig.command(MAC_CLASS, 0, table(OTHER) + table(GROUP)) == OK
            assert reaches(rig, OTHER) and reaches(rig, GROUP)
            assert rig.command(MAC_CLASS, 0, table() + table()) == OK
            assert not reaches(rig, OTHER) and not reaches(rig, GROUP)


def test_5_1_6_5_2_mac_is_updated_before_the_command_is_used() -> None:
    with running() as rig:
        assert rig.command(MAC_CLASS, 1, OTHER) == OK
        assert rig.driver.config(0, 6) == OTHER
        assert reaches(rig, OTHER) and not reaches(rig, MAC)
        rig.driver.restart()
        assert rig.driver.config(0, 6) == MAC


def test_5_1_6_5_2_frames_to_neither_mac_nor_table_are_dropped() -> None:
    with running() as rig:
        assert reaches(rig, MAC) and reaches(rig, BROADCAST)
        assert not reaches(rig, OTHER) and not reaches(rig, GROUP)


def test_5_1_6_5_6_after_reset_only_the_first_queue_receives() -> None:
    with running(Cable(2)) as rig:
        assert rig.command(MQ, 0, b"\2\0") == OK
        rig.driver.restart()
        assert rig.cable.active[-1] == 1
        rig.offer(2048, pair=1)
        rig.inject(frame(), pair=1)
        wait_for(lambda: bool(rig.device.received[1].dropped))
        assert not rig.driver.queues[2].has_used()


def test_5_1_6_5_6_no_frames_on_queues_above_virtqueue_pairs() -> None:
    with running(Cable(2)) as rig:
        assert rig.command(MQ, 0, b"\2\0") == OK
        [chain] = rig.offer(2048, pair=1)
        rig.inject(frame(fill=7), pair=1)
        assert rig.received(chain, pair=1)[1][HEADER:] == frame(fill=7)
        rig.offer(2048, pair=1)
        assert rig.command(MQ, 0, b"\1\0") == OK
        assert rig.cable.active[-1] == 1
        rig.inject(frame(), pair=1)
        wait_for(lambda: bool(rig.device.received[1].dropped))
        assert not rig.driver.queues[2].has_used()


@pytest.mark.parametrize("pairs", [0, 3, 0x8000, 0xFFFF])
def test_5_1_6_5_6_a_wrong_number_of_pairs_is_an_error(pairs: int) -> None:
    with running(Cable(2)) as rig:
        assert rig.command(MQ, 0, struct.pack("<H", pairs)) == ERR
        rig.assert_alive()


def test_5_1_6_5_8_offloads_can_be_switched_off_and_on() -> None:
    with running() as rig:
        for offloads in (0, F_GUEST_CSUM, F_GUEST_CSUM | F_GUEST_TSO4, GUEST_OFFLOADS):
            assert rig.command(GUEST_OFFLOADS_CLASS, 0, struct.pack("<Q", offloads)) == OK
            assert rig.cable.offloads_set[-1] == offloads
        for wrong in (F_GUEST_TSO4, F_GUEST_CSUM | F_GUEST_ECN, F_CSUM, F_VERSION_1):
            assert rig.command(GUEST_OFFLOADS_CLASS, 0, struct.pack("<Q", wrong)) == ERR
        assert rig.cable.offloads_set[-1] == GUEST_OFFLOADS


def test_5_1_3_the_features_are_those_that_are_served() -> None:
    with running() as rig:
        assert rig.driver.mmio.offered_features() & 0x1C0_0000_00FF_FFFF == (
            GUEST_OFFLOADS | F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN | F_HOST_UFO
            | F_HOST_USO | F_GUEST_OFFLOADS | F_MTU | F_MAC | F_MRG_RXBUF | F_STATUS | F_CTRL_VQ
            | F_CTRL_RX | F_CTRL_RX_EXTRA | F_CTRL_MAC_ADDR
        )  # fmt: skip
