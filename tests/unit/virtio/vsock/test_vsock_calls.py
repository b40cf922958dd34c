"""Connections to a guest that the monitor hands over: VsockDevice.call, and the control socket's
vsock.connect in front of it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vsock_rig import Rig, read_all, read_exactly, read_line, running

from pyvmm.control import client as control_client
from pyvmm.control.protocol import NOT_READY, ControlError, Method, Upgrade
from pyvmm.control.server import ControlServer
from pyvmm.errors import ConfigError, HostError
from pyvmm.host import unix_sockets
from pyvmm.kinds import registry
from pyvmm.kinds.interface import Running
from pyvmm.kinds.vsock import Spec as Vsock
from pyvmm.spec.vm import VmSpec
from pyvmm.testing.vsock_driver import REQUEST, RESPONSE, RST, RW, Packet
from pyvmm.virtio.vsock import switch
from pyvmm.virtio.vsock.device import VsockDevice

HANG = 60.0  # seconds; no measure of speed


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with running(tmp_path) as made:
        yield made
        made.assert_alive()


def call(device: VsockDevice, port: int = 1023) -> socket.socket:
    """The host's end of a connection that was handed over."""
    ours, theirs = unix_sockets.pair()
    device.call(theirs, port)
    found = socket.socket(fileno=ours.detach())
    found.settimeout(HANG)
    return found


def test_a_connection_that_is_handed_over_becomes_a_stream(rig: Rig) -> None:
    with call(rig.device) as client:
        request = rig.guest.receive()
        assert (request.op, request.dst_port) == (REQUEST, 1023)
        rig.guest.answer(request, RESPONSE)
        assert read_line(client) == f"OK {request.src_port}\n".encode()
        client.sendall(b"from the host")
        assert rig.guest.receive().data == b"from the host"
        rig.guest.answer(request, RW, data=b"from the guest")
        assert read_exactly(client, 14) == b"from the guest"


def test_one_that_the_guest_refuses_is_closed(rig: Rig) -> None:
    with call(rig.device) as client:
        rig.guest.answer(rig.guest.receive(), RST)
        assert read_all(client) == b""


def test_what_is_sent_before_ok_is_not_lost(rig: Rig) -> None:
    """By a client of the device itself; the control socket wants silence."""
    ours, theirs = unix_sockets.pair()
    ours.send(b"early")
    rig.device.call(theirs, 7)
    rig.guest.answer(rig.guest.receive(), RESPONSE)
    assert rig.guest.receive().data == b"early"
    ours.close()


def test_without_a_driver_there_is_nobody_to_call(tmp_path: Path) -> None:
    with running(tmp_path, start=False) as rig:
        ours, theirs = unix_sockets.pair()
        assert not rig.device.has_driver
        with pytest.raises(HostError) as caught:
            rig.device.call(theirs, 1)
        assert caught.value.errno == errno.ECONNREFUSED
        assert theirs.fileno() >= 0, "still the caller's"
        ours.close()
        theirs.close()


def test_a_reset_ends_calls_that_the_guest_has_not_answered(tmp_path: Path) -> None:
    with running(tmp_path) as rig, call(rig.device) as client:
        assert rig.guest.receive().op == REQUEST
        rig.device.reset()
        assert read_all(client) == b""
        assert not rig.device.has_driver


def test_there_are_no_more_calls_than_streams(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "MAX_STREAMS", 4)
    clients = [call(rig.device, port) for port in range(4)]
    requests = [rig.guest.receive() for _ in clients]
    with call(rig.device) as extra:
        assert read_all(extra) == b"", "turned away"
    for request, client in zip(requests, clients, strict=True):
        rig.guest.answer(request, RST)
        assert read_all(client) == b""
        client.close()
    with call(rig.device):
        assert rig.guest.receive().op == REQUEST, "there is room again"


def test_a_device_without_a_path_refuses_the_guest_and_takes_calls() -> None:
    device = VsockDevice(3)
    assert device.stats()["streams"] == 0
    with pytest.raises(HostError):
        device.call(unix_sockets.pair()[0], 1)


# --- the control socket --------------------------------------------------------------------------


def methods(*devices: VsockDevice) -> dict[str, Method]:
    """The answers of the control socket of a machine that has `devices`."""
    spec = VmSpec("k", devices=tuple(Vsock() for _ in devices))
    return registry.methods(Running(spec, devices, lambda: False, lambda: 0))


def connect(port: int, *devices: VsockDevice) -> Any:
    return methods(*devices)["vsock.connect"].run(port=port)


def test_a_vm_without_vsock_says_how_to_have_it() -> None:
    with pytest.raises(ConfigError, match="no vsock device; run it with --agent, or --vsock"):
        connect(1023)


@pytest.mark.parametrize("port", [-1, 1 << 32, 10**30])
def test_a_port_that_cannot_be_is_refused(rig: Rig, port: int) -> None:
    with pytest.raises(ConfigError, match="there is no port"):
        connect(port, rig.device)


def test_a_guest_that_is_not_that_far_is_told_from_one_without(tmp_path: Path) -> None:
    with running(tmp_path, start=False) as rig, pytest.raises(ControlError) as caught:
        connect(1023, rig.device)
    assert caught.value.code == NOT_READY


def test_a_client_that_speaks_too_soon_is_cut_off(rig: Rig) -> None:
    upgrade = connect(1023, rig.device)
    assert isinstance(upgrade, Upgrade)
    ours, theirs = unix_sockets.pair()
    upgrade.hand_over(theirs, b"too soon")
    assert ours.recv(1) == b""
    ours.close()


@pytest.fixture
def vm(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A VM called "vm" that has the rig's device, at a real control socket."""
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    from pyvmm.control.registry import register

    with register("vm") as registration:
        assert registration.listener is not None
        server = ControlServer(registration.listener, methods(rig.device).get)
        server.start()
        yield rig
        server.close()


def test_a_program_reaches_the_guest_through_the_control_socket(vm: Rig) -> None:
    from threading import Thread

    streams: list[unix_sockets.Socket] = []
    connecting = Thread(target=lambda: streams.append(control_client.connect_vsock("vm", 1023)))
    connecting.start()
    request = vm.guest.receive()
    vm.guest.answer(request, RESPONSE)
    # What the guest says at once is not taken for a part of the answer.
    vm.guest.send(Packet(RW, request.dst_port, request.src_port, data=b"hello"))
    connecting.join(HANG)
    with socket.socket(fileno=streams[0].detach()) as stream:
        stream.settimeout(HANG)
        assert read_exactly(stream, 5) == b"hello"


def test_a_port_where_nobody_listens_is_refused(vm: Rig) -> None:
    from threading import Thread

    errors: list[HostError] = []

    def connect() -> None:
        try:
            control_client.connect_vsock("vm", 9)
        except HostError as error:
            errors.append(error)

    connecting = Thread(target=connect)
    connecting.start()
    vm.guest.answer(vm.guest.receive(), RST)
    connecting.join(HANG)
    assert errors[0].errno == errno.ECONNREFUSED
    assert "port 9 of the guest of vm" in str(errors[0])


def test_a_vm_that_is_not_there_is_a_config_error(vm: Rig) -> None:
    with pytest.raises(ConfigError, match="no VM called 'other'"):
        control_client.connect_vsock("other", 1023)
