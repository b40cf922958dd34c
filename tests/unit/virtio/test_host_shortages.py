"""A host without a thread, a descriptor or a place in an epoll instance: one request, one stream or
one device fails for it, in a way that its driver sees. `make fuzz` found most of these."""

from __future__ import annotations

import errno
import socket
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NoReturn
from unittest import mock

import front_end_rig as rig
import pytest
from fuzz import vhost_target
from fuzz.targets import TARGETS
from net_rig import wait_for

from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
from pyvmm.host.named_listener import NamedListener
from pyvmm.host.poller import READABLE, Handler, Poller
from pyvmm.testing import mmio_driver
from pyvmm.testing.attached import attached
from pyvmm.virtio.console.ends import SocketEnd
from pyvmm.virtio.vhost_user.device import VhostUserDevice
from pyvmm.virtio.vhost_user.served import Served
from pyvmm.virtio.vsock.host_side import HostSide
from pyvmm.virtio.vsock.packet import Counters, Header
from pyvmm.virtio.vsock.switch import Switch
from pyvmm.virtio.vsock.uapi import (
    VIRTIO_VSOCK_OP_REQUEST,
    VIRTIO_VSOCK_OP_RST,
    VMADDR_CID_HOST,
)


def no_thread(*_: object) -> NoReturn:
    raise RuntimeError("can't start new thread")


def test_a_lost_tap_without_a_thread_for_it_costs_the_card() -> None:
    with vhost_target.make(Random(1)) as card, attached(card, irqfd=True) as driver:
        assert isinstance(card, vhost_target.Card)
        card.cable.gone = True
        with mock.patch.object(threading, "_start_new_thread", no_thread):
            card.changes[-1].signal()
            wait_for(lambda: driver.mmio.needs_reset)
        assert not card.link_up
        assert "thread for" in driver.log[-1]
        driver.mmio.reset()
        assert driver.mmio.status == 0


class FullPoller(Poller):
    """One whose epoll instance has no place for more while it is `full`."""

    full = False

    def add(self, fd: int, handler: Handler | None, events: int = READABLE) -> None:
        if self.full:
            raise HostError(errno.ENOSPC, "epoll_ctl")
        super().add(fd, handler, events)


@pytest.fixture
def poller() -> Iterator[FullPoller]:
    with FullPoller() as made:
        yield made


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[NamedListener]:
    with NamedListener(str(tmp_path / "v")) as made:
        yield made


def connected(path: Path) -> socket.socket:
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(60)
    end.connect(str(path))
    return end


def test_a_vsock_client_that_cannot_be_watched_is_turned_away(
    tmp_path: Path, listener: NamedListener, poller: FullPoller
) -> None:
    host = HostSide(listener.socket, str(tmp_path / "v"), poller, deque())
    with connected(tmp_path / "v") as client:
        poller.full = True
        with pytest.raises(HostError, match="epoll_ctl"):
            host.accept(1)
        poller.full = False
        assert (len(host), host.commands()) == (0, [])
        assert client.recv(1) == b"", "nobody else has its other end"
    host.close()


def test_a_call_that_cannot_be_watched_is_hung_up(poller: FullPoller) -> None:
    pairs = [unix_sockets.pair() for _ in range(2)]
    calls = deque((ours, 1000) for ours, _ in pairs)
    host = HostSide(None, None, poller, calls)
    poller.full = True
    assert host.calls(2) == [] and not calls
    assert [theirs.recv(1) for _, theirs in pairs] == [b"", b""]
    host.close()


def test_a_guests_stream_that_cannot_be_watched_is_refused(
    tmp_path: Path, listener: NamedListener, poller: FullPoller
) -> None:
    """As one to a port where nobody listens; the streams that there are go on."""
    lines: list[str] = []
    host = HostSide(None, str(tmp_path / "w"), poller, deque())
    switch = Switch(3, host, poller, counters=Counters(), warn=lines.append)
    with NamedListener(str(tmp_path / "w_52")) as program:
        poller.full = True
        wanted = Header(3, VMADDR_CID_HOST, 1000, 52, op=VIRTIO_VSOCK_OP_REQUEST)
        switch.take_packet(wanted, None)  # type: ignore[arg-type]  # there is no payload
        assert (len(switch), switch.has_packets, lines) == (0, True, [])
        assert [reply.op for reply in switch._replies] == [VIRTIO_VSOCK_OP_RST]
        taken = unix_sockets.accept(program.socket)
        assert taken is not None and taken.recv(1) == b"", "nobody else has its other end"
        taken.close()
        poller.full = False
        switch.take_packet(wanted, None)  # type: ignore[arg-type]
        assert len(switch) == 1
    switch.close()
    host.close()


def test_a_ports_client_that_cannot_be_watched_is_turned_away(
    tmp_path: Path, listener: NamedListener, poller: FullPoller
) -> None:
    end = SocketEnd(listener.socket, "port")
    end.begin(poller)
    with connected(tmp_path / "v") as client:
        poller.full = True
        end.attend(guest_is_open=True, pending=False)
        assert client.recv(1) == b""
    poller.full = False
    with connected(tmp_path / "v") as client:
        end._note_arrival(READABLE)
        end.attend(guest_is_open=True, pending=False)
        client.sendall(b"x")
        assert end.read_into([memoryview(bytearray(2))]) == 1
        end.finish()
        assert client.recv(1) == b""


def test_another_back_end_is_found_once_there_is_a_descriptor_again(tmp_path: Path) -> None:
    """For the socket of its own requests, which each connection has."""
    made, failed = socket.socketpair, threading.Event()

    def no_descriptor(*arguments: int) -> object:
        if failed.is_set():
            return made(*arguments)
        failed.set()
        raise OSError(errno.EMFILE, "too many open files")

    knows = rig.ALL | rig.P_BACKEND_REQ
    served = Served(42, 2, features=0xFF, config_size=16)
    with rig.fake(tmp_path / "s", protocol=knows) as back_end:
        with (
            mock.patch.object(socket, "socketpair", no_descriptor),
            pytest.raises(HostError, match="socketpair: Too many open files"),
        ):
            VhostUserDevice(str(tmp_path / "s"), served, name="front")
        with rig.front(tmp_path / "s", served) as front:
            failed.clear()
            with mock.patch.object(socket, "socketpair", no_descriptor):
                back_end.die()
                front.until(lambda: front.device.stats()["reconnections"] == 1)
            assert not front.driver.mmio.needs_reset


def test_a_back_end_stops_where_nobody_can_watch_it(tmp_path: Path) -> None:
    """Its rings are not to be touched once the device needs a reset."""
    served = Served(42, 2, features=0xFF, config_size=16)
    place = tmp_path / "s"
    with rig.fake(place) as back_end, rig.front(place, served, start=False) as front:
        with mock.patch.object(threading, "_start_new_thread", no_thread):
            front.driver.mmio.start()
        assert front.driver.mmio.needs_reset
        assert back_end.numbers().count(rig.GET_VRING_BASE) == 2
        front.driver.mmio.reset()
        front.driver.mmio.start()
        assert not front.driver.mmio.needs_reset


@pytest.mark.parametrize("target", ["balloon", "console", "rng", "vsock", "net", "blk"])
def test_a_device_without_a_thread_can_be_reset(target: str) -> None:
    made = TARGETS[target].make(Random(1))
    with made as device, attached(device, start=False) as driver:
        with mock.patch.object(threading, "_start_new_thread", no_thread):
            driver.mmio.start()
        assert driver.mmio.needs_reset
        driver.mmio.write(mmio_driver.STATUS, 0)
        assert driver.mmio.status == 0, driver.log
        driver.mmio.start()
        assert not driver.mmio.needs_reset
