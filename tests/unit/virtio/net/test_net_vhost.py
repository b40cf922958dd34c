"""The network card on the kernel's vhost-net: a mock driver, a real tap, this machine's own frames.

Where there is no /dev/vhost-net, tests/guest/test_linux_vhost.py runs these in an emulated host.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Event, Thread

import pytest
from net_rig import (
    F_CTRL_RX,
    F_CTRL_RX_EXTRA,
    F_MQ,
    F_MRG_RXBUF,
    HEADER,
    MAC,
    MTU,
    NetRig,
    header,
    wait_for,
)

from pyvmm.host import handed, interfaces, tap, vhost
from pyvmm.host.saved import Saved
from pyvmm.kinds import net as device_net
from pyvmm.kinds.interface import Context
from pyvmm.testing import illegal_chains
from pyvmm.testing.attached import attached
from pyvmm.testing.mmio_driver import (
    F_EVENT_IDX,
    F_VERSION_1,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    IrqFd,
)
from pyvmm.testing.ring import Buffer
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.net.tap import TapBackend
from pyvmm.virtio.net.vhost_device import VhostNetDevice
from pyvmm.virtio.offload import OffloadLock

PEER = bytes.fromhex("020000000001")
ETHERTYPE = 0x88B5  # for local experiments
USED_BUFFER, CONFIG_CHANGED = 1, 2
RAM = 8 << 20
GUARDED = RAM - 4096  # a page that no buffer is in


@pytest.fixture(autouse=True)
def needs_vhost() -> None:
    if not os.access(vhost.DEVICE, os.R_OK | os.W_OK):
        pytest.skip(f"no {vhost.DEVICE} here; run again in an emulated host by tests/guest")
    if not tap.device_usable():
        pytest.skip("no taps can be made here")


def frame(size: int = 200) -> bytes:
    """From the driver to this machine."""
    return PEER + MAC + ETHERTYPE.to_bytes(2, "big") + os.urandom(size)


def reply(size: int = 200) -> bytes:
    return MAC + PEER + ETHERTYPE.to_bytes(2, "big") + os.urandom(size)


class VhostRig(NetRig):
    """A card whose cable ends at an interface of this machine, `wire` being a socket on it."""

    wire: socket.socket
    interface: str

    def inject(self, data: bytes, head: bytes = b"", pair: int = 0) -> None:
        self.wire.send(data)

    def sent(self, pair: int = 0) -> tuple[bytes, bytes]:
        while (data := self.wire.recv(1 << 17))[12:14] != ETHERTYPE.to_bytes(2, "big"):
            pass
        return b"", data

    def arrives(self, data: bytes, pair: int = 0, *, into: object = None) -> None:
        """The driver finds `data` in the buffer `into`, which waits already, or in one that it
        offers now; the kernel says hello in IPv6 at times."""
        while True:
            if into is None:
                [into] = self.offer(2048, pair=pair)
            _, got = self.received(into, pair)
            if got[HEADER:] == data:
                return
            into = None

    def goes_out(self, data: bytes, pair: int = 0) -> None:
        """The driver sends `data`, and this machine gets it; others may be on their way still."""
        assert self.send(header() + data, pair=pair) == 0
        while self.sent()[1] != data:
            pass

    def exchange(self, times: int = 1, pair: int = 0) -> None:
        """Frames go both ways."""
        for _ in range(times):
            data = frame()
            self.goes_out(data, pair)
            data = reply()
            self.inject(data)
            self.arrives(data, pair)

    @property
    def locks(self) -> list[OffloadLock]:
        queues = self.driver.transport.negotiation.active_queues[:-1]
        return [queue.lock for queue in queues if isinstance(queue.lock, OffloadLock)]


def new_card(
    closing: ExitStack, pairs: int, *, told: bool = False
) -> tuple[VhostNetDevice, str, list[str], socket.socket]:
    """A device on a tap of its own, that one's name, what it logs, and a socket on it. What it is
    `told` of its interface has been opened before."""
    served = [closing.enter_context(vhost.open_net("--net")) for _ in range(pairs)]
    fds, name = tap.open_tap("pyvmmv%d", pairs, create=True)
    interfaces.set_up(name)
    backend = TapBackend(fds, MTU)
    closing.callback(backend.close)
    lines: list[str] = []
    interface = tap.Interface(name)
    if told:
        opened = tap.open_counts(), tap.interface_changes().detach()
        for fd in opened:
            closing.callback(os.close, fd)
        interface = tap.Interface(name, *opened)
    device = VhostNetDevice(backend, served, interface, name="net0", mac=MAC, log=lines.append)
    wire = closing.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
    wire.bind((name, ETHERTYPE))
    wire.settimeout(30)
    return device, name, lines, wire


@contextmanager
def running(
    pairs: int = 1, features: int | None = None, *, irqfd: bool = True, told: bool = False
) -> Iterator[VhostRig]:
    with ExitStack() as closing:
        device, name, lines, wire = new_card(closing, pairs, told=told)
        driver = closing.enter_context(attached(device, start=False, irqfd=irqfd, ram=RAM))
        driver.mmio.start(features=features)
        rig = VhostRig(driver, device, None)  # type: ignore[arg-type]
        rig.lines, rig.interface, rig.wire = lines, name, wire
        yield rig


def kernel_threads() -> int:
    done = subprocess.run(["ps", "-eo", "comm"], capture_output=True, text=True, check=True)
    return sum(line.startswith("vhost-") for line in done.stdout.splitlines())


def test_frames_go_both_ways_and_none_of_them_through_us() -> None:
    with running() as rig:
        rig.exchange(300)  # more often than the ring has entries
        assert len(rig.locks) == 2
        assert not any(stats.requests for stats in rig.driver.transport.negotiation.queue_stats)
        stats = rig.device.stats()
        assert stats["frames_from_guest"] >= 300 and stats["frames_to_guest"] >= 300
        assert stats["bytes_from_guest"] >= 300 * 214
        for _ in range(3):
            rig.driver.restart()
            rig.exchange(10)
        assert not rig.lines and not rig.driver.log


def test_the_driver_is_interrupted_and_always_told_of_used_buffers() -> None:
    with running() as rig:
        before = rig.driver.irq.count
        rig.exchange(1)
        wait_for(lambda: rig.driver.irq.count > before)
        status = rig.driver.mmio.read(INTERRUPT_STATUS)
        assert status == USED_BUFFER
        rig.driver.mmio.write(INTERRUPT_ACK, status)
        count = rig.driver.irq.count
        assert rig.driver.mmio.read(INTERRUPT_STATUS) == USED_BUFFER
        rig.device.set_link(False)
        wait_for(lambda: rig.driver.irq.count > count)
        assert rig.driver.mmio.read(INTERRUPT_STATUS) == USED_BUFFER | CONFIG_CHANGED
        rig.driver.mmio.reset()
        assert rig.driver.mmio.read(INTERRUPT_STATUS) == 0


def test_whoever_takes_the_locks_has_the_rings_for_himself() -> None:
    with running() as rig:
        rig.exchange(5)
        receive, transmit = rig.driver.transport.negotiation.active_queues[:2]
        data, answer = frame(), reply()
        with receive.lock, transmit.lock:
            assert transmit.state().next_avail == transmit.state().next_used == 5
            chain = rig.driver.queues[1].add([header() + data], [])
            rig.driver.queues[1].publish()
            rig.driver.kick(1)
            rig.inject(answer)
            [buffer] = rig.offer(2048)
            rig.wire.settimeout(0.3)
            with pytest.raises(TimeoutError):
                rig.sent()
            assert rig.driver.queues[0].pop_used() is None
            rig.wire.settimeout(30)
        assert rig.sent()[1] == data
        rig.driver.mmio.wait_used(1, chain)
        rig.arrives(answer, into=buffer)
        rig.exchange(5)


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_card_that_was_saved_goes_on_with_another_tap(pairs: int) -> None:
    with running(pairs) as rig, ExitStack() as closing:
        rig.exchange(20)
        if pairs > 1:
            assert rig.command(4, 0, b"\2\0") == 0
        rig.inject(reply())  # comes to nobody: no buffer is offered
        queues = rig.driver.transport.negotiation.active_queues
        for queue in queues:
            assert queue.claim(30)
        # Made available when the machine stood still: both are the new device's to serve.
        last = frame()
        chain = rig.driver.queues[1].add([header() + last], [])
        rig.driver.queues[1].publish()
        [buffer] = rig.offer(2048)
        [region] = rig.driver.memory.regions
        state = json.loads(json.dumps(rig.driver.transport.save()))
        memory = bytes(region.view)
        for queue in queues:
            queue.lock.release()
        rig.driver.transport.close()
        region.view[:] = memory
        device, _, lines, wire = new_card(closing, pairs)
        irqfd = closing.enter_context(IrqFd(rig.driver.irq))
        transport = MmioTransport(
            *(device, rig.driver.memory, rig.driver.irq),
            irq_eventfd=irqfd.eventfd,
            log=rig.driver.log.append,
        )
        closing.callback(transport.close)
        transport.restore(Saved(state, "the card"))
        rig.driver.transport, rig.driver.mmio.registers = transport, transport.registers
        rig.device, rig.wire, rig.lines = device, wire, lines
        assert rig.sent()[1] == last
        rig.driver.mmio.wait_used(1, chain)
        for pair in range(pairs):
            rig.goes_out(frame(), pair)
        if pairs > 1:  # what comes in may come by either
            assert rig.command(4, 0, b"\1\0") == 0
        first = reply()
        rig.inject(first)
        rig.arrives(first, into=buffer)
        rig.exchange(20)
        assert not any(stats.requests for stats in transport.negotiation.queue_stats[:2])
        assert not rig.lines and not rig.driver.log and not rig.driver.needs_reset


def test_a_link_that_is_down_loses_frames_and_comes_up_again() -> None:
    with running() as rig:
        for _ in range(3):
            rig.exchange(3)
            rig.device.set_link(False)
            assert rig.driver.config(6, 2) == b"\0\0"
            assert rig.send(header() + frame()) == 0
            rig.inject(reply())
            rig.device.set_link(True)
            rig.exchange(3)
        assert rig.device.stats()["dropped"] == {}


@pytest.mark.parametrize("told", [False, True], ids=["", "handed"])
def test_a_tap_that_is_deleted_is_a_link_lost(told: bool) -> None:
    with running(2, told=told) as rig:
        rig.exchange(3)
        assert int(rig.device.stats()["frames_from_guest"]) >= 3  # type: ignore[call-overload]
        subprocess.run(["ip", "link", "del", rig.interface], check=True)
        wait_for(lambda: not rig.device.link_up)
        assert rig.driver.config(6, 2) == b"\0\0"
        assert rig.lines == ["the link is down: the tap gives no more frames"]
        assert rig.send(header() + frame()) == 0, "what is sent goes nowhere, but comes back"
        assert int(rig.device.stats()["frames_from_guest"]) >= 3, "what was counted stays"  # type: ignore[call-overload]
        rig.driver.restart()
        assert rig.send(header() + frame()) == 0
        assert not rig.driver.needs_reset


def test_what_another_process_has_opened_serves_a_monitor_in_another_network() -> None:
    """As whoever adds a card to a confined monitor does."""
    libc = ctypes.CDLL(None, use_errno=True)
    found: list[bool] = []
    opens, changed = Event(), Event()

    def confined(spec: device_net.Spec, names: dict[str, int]) -> None:
        assert libc.unshare(0x40000000) == 0, ctypes.get_errno()  # CLONE_NEWNET of <linux/sched.h>
        with ExitStack() as closing, handed.Descriptors(names.values()) as owner:
            with handed.files(names, owner):
                device = device_net.open_device(spec, Context("vm", None, closing))
            assert isinstance(device, VhostNetDevice) and not owner.fds
            assert device.stats()["frames_from_guest"] == 0
            with device._interface.changes() as one, device._interface.changes() as other:
                opens.set()
                assert changed.wait(60)
                found.extend(tap.drain_changes(each) for each in (one, other))

    with ExitStack() as opened:
        spec, files = device_net.hand_over(device_net.parse("tap=pyvmmv%d,create,vhost"), opened)
        assert len(files) == 4, files
        given = {name: os.dup(fd) for name, fd in files.items()}
        thread = Thread(target=confined, args=(device_net.check(spec), given))
        thread.start()
        assert opens.wait(60)
        subprocess.run(["ip", "link", "set", "dev", spec.tap, "mtu", "1400"], check=True)
        changed.set()
        thread.join(60)
    assert found == [True, False], "told once, to whoever asks first"


def test_another_interface_that_goes_is_none_of_our_business() -> None:
    with running() as rig:
        for fd in tap.open_tap("pyvmmw%d", create=True)[0]:
            os.close(fd)
        rig.exchange(3)
        assert rig.device.link_up


def test_pairs_are_served_when_they_are_in_use() -> None:
    before = kernel_threads()
    with running(pairs=2) as rig:
        assert rig.driver.features & F_MQ
        rig.exchange(2)
        for _ in range(3):
            assert rig.command(4, 0, b"\2\0") == 0
            for pair in (1, 0, 1):  # what comes back may come by either
                rig.goes_out(frame(), pair)
            assert rig.command(4, 0, b"\1\0") == 0
            rig.exchange(2)
        rig.driver.restart()
        rig.exchange(2)
        assert rig.device.link_up and not rig.lines
        assert kernel_threads() == before + 2
    wait_for(lambda: kernel_threads() == before)


def test_a_command_while_the_data_queues_are_held_starts_no_server_before_the_release() -> None:
    """A pause holds the pairs' queues. A command that is just being served starts pair 1, which the
    kernel must not serve yet, and whose locks the pause must be able to release."""
    with running(pairs=2) as rig:
        held = rig.driver.transport.negotiation.active_queues[:4]
        locks = [queue.lock for queue in held]
        for lock in locks:
            lock.acquire()
        try:
            assert rig.command(4, 0, b"\2\0") == 0
            assert [queue.lock for queue in held] == locks
            data = frame()
            rig.driver.queues[3].add([header() + data], [])
            rig.driver.queues[3].publish()
            rig.driver.kick(3)
            rig.wire.settimeout(0.3)
            with pytest.raises(TimeoutError):
                rig.sent()
            rig.wire.settimeout(30)
        finally:
            for lock in locks:
                lock.release()
        assert rig.sent()[1] == data
        for pair in (1, 0, 1):
            rig.goes_out(frame(), pair)


def test_a_queue_that_is_reset_alone_is_served_again() -> None:
    with running() as rig:
        rig.exchange(3)
        for index in (1, 0, 1):
            rig.driver.mmio.reset_queue(index)
            rig.exchange(3)


@pytest.mark.parametrize("index", [0, 1])
def test_a_broken_ring_needs_a_reset_and_after_it_all_is_well(index: int) -> None:
    with running() as rig:
        rig.exchange(3)
        queue = rig.driver.queues[index]
        # 2.7.6: more than the queue has entries
        rig.driver.memory.write(queue.driver_addr + 2, (5000).to_bytes(2, "little"))
        rig.driver.kick(index)
        rig.inject(reply())
        wait_for(lambda: rig.driver.needs_reset)
        assert "vhost found a broken ring or descriptor" in rig.driver.log[0]
        other = rig.driver.queues[1 - index]
        other.add([header() + frame()], []) if not index else other.add([], [2048])
        other.publish()
        rig.driver.kick(1 - index)
        rig.inject(reply())
        time.sleep(0.1)
        assert other.pop_used() is None, "a device that needs a reset touches no ring"
        rig.driver.restart()
        rig.exchange(3)


def test_a_buffer_that_is_no_ram_costs_the_guest_its_card_only() -> None:
    with running() as rig:
        rig.exchange(1)
        rig.driver.queues[1].add([Buffer(1 << 40, 100)], [])
        rig.driver.queues[1].publish()
        rig.driver.kick(1)
        wait_for(lambda: rig.driver.needs_reset)
        rig.driver.restart()
        rig.exchange(3)


def test_features_are_those_that_the_kernel_has_and_no_filter() -> None:
    with running() as rig:
        assert not rig.driver.mmio.offered_features() & (F_CTRL_RX | F_CTRL_RX_EXTRA)
        assert rig.driver.mmio.offered_features() & F_MRG_RXBUF
    for features in (F_VERSION_1, F_VERSION_1 | F_MRG_RXBUF, F_VERSION_1 | F_EVENT_IDX):
        with running(features=features) as rig:
            rig.exchange(20)


def test_a_transport_without_an_eventfd_is_a_clear_failure() -> None:
    with (
        pytest.raises(AssertionError, match="the device needs a reset"),
        running(irqfd=False) as rig,
    ):
        rig.exchange()


def test_from_the_command_line() -> None:
    spec = device_net.check(device_net.parse("tap=pyvmmv9,create,vhost,queues=2"))
    with ExitStack() as closing:
        device = device_net.open_device(spec, Context("vm", None, closing))
        assert isinstance(device, VhostNetDevice) and device.name == "net-pyvmmv9"
    assert not tap.exists("pyvmmv9")


def test_stress_of_stopping_and_starting_from_all_sides() -> None:
    """The link, the pauses and the resets of others while frames flow."""
    with running() as rig:
        stop = Event()

        def disturb() -> None:
            while not stop.is_set():
                rig.device.set_link(False)
                rig.device.set_link(True)
                for queue in rig.driver.transport.negotiation.active_queues:
                    with queue.lock:
                        pass

        threads = [Thread(target=disturb) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(30):
                assert rig.send(header() + frame()) == 0
                rig.driver.restart()
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a deadlock"
        rig.exchange(5)


@pytest.mark.parametrize("queue", [0, 1])
def test_illegal_chains_cost_the_guest_its_card_at_most(queue: int) -> None:
    """The kernel judges them; whatever it says, memory that is not a buffer's stays as it is, and
    after a reset all is well. One card for all of them: each reset begins anew."""
    with running() as rig:
        for illegal in illegal_chains("split"):
            rig.driver.restart()
            before = rig.driver.memory.read(GUARDED, 4096)
            illegal.offer(rig.driver.queues[queue])
            rig.driver.kick(queue)
            rig.inject(reply())
            time.sleep(0.01)
            assert rig.driver.memory.read(GUARDED, 4096) == before, illegal.name
        rig.driver.restart()
        rig.exchange(3)
