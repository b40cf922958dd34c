"""``--vhost-user``: what it takes, and one line for each thing that it refuses."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from contextlib import ExitStack
from threading import Timer

import pytest
from front_end_rig import F_PROTOCOL, F_VERSION_1, Fake, fake, listens_at
from net_rig import wait_for

from pyvmm import images
from pyvmm.errors import ConfigError
from pyvmm.images.programs import command
from pyvmm.kinds import registry, vhost_user
from pyvmm.kinds.border import Border
from pyvmm.kinds.interface import Context
from pyvmm.kinds.vhost_user import Spec
from pyvmm.testing.attached import attached
from pyvmm.testing.vsock_driver import CREDIT_UPDATE, REQUEST, RESPONSE, RW, Packet, VsockDriver


def check(*texts):
    return registry.check(
        "vhost_user", [registry.parse("vhost_user", text) for text in texts], None
    )


def test_all_that_can_be_said():
    [spec] = check("socket=/a,,b,type=blk,queues=4,queue-size=256,reconnect=0,packed")
    assert spec == Spec("/a,b", "blk", 4, 256, reconnect=0, packed=True)
    assert check("socket=s,type=fs,tag=home")[0].tag == "home"
    assert check("socket=s,type=net,mac=52:54:00:00:00:01")[0].mac == "52:54:00:00:00:01"
    assert check("socket=s,type=net")[0].mac.startswith("52:54:00:")


def test_a_file_says_the_same():
    table = {"socket": "/s", "type": "blk", "queues": 2}
    assert registry.read("vhost_user", [table]) == [Spec("/s", "blk", 2)]
    assert registry.plain("vhost_user", [Spec("/s", "blk", 2)]) == [table]


def test_a_relative_path_is_relative_to_the_file():
    spec = registry.with_paths(Spec("s", "blk"), lambda path: f"/there/{path}")
    assert spec.socket == "/there/s"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "unknown option ''"),
        ("socket=s", "no type="),
        ("type=blk", "no socket="),
        ("socket=,type=blk", "unknown option 'socket='"),
        ("socket=s,type=tape", "unknown type 'tape'"),
        ("socket=s,type=blk,color=red", "unknown option 'color=red'"),
        ("socket=s,type=blk,queues=0", "not between 1 and 16"),
        ("socket=s,type=blk,queues=17", "not between 1 and 16"),
        ("socket=s,type=rng,queues=2", "not between 1 and 1"),
        ("socket=s,type=blk,queues=two", "not a number"),
        ("socket=s,type=blk,queues=²", "not a number"),
        ("socket=s,type=blk,queue-size=100", "not a power of two"),
        ("socket=s,type=blk,queue-size=4096", "not between 2 and 1024"),
        ("socket=s,type=blk,reconnect=99999999", "not between 0 and 86400"),
        ("socket=s,type=blk,tag=x", "only fs has one"),
        ("socket=s,type=fs,tag=" + 37 * "x", "36 bytes"),
        ("socket=s,type=fs,tag=" + 19 * "é", "36 bytes"),
        ("socket=s,type=blk,mac=52:54:00:00:00:01", "a network card's"),
        ("socket=s,type=net,mac=53:54:00:00:00:01", "not a card's address"),
    ],
)
def test_what_it_refuses(text, why):
    with pytest.raises(ConfigError, match="--") as caught:
        check(text)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_two_file_systems_of_one_name():
    with pytest.raises(ConfigError, match="two file systems with the tag home"):
        check("socket=a,type=fs,tag=home", "socket=b,type=fs,tag=home")


def test_nobody_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(vhost_user, "_START", 0.1)
    for path in (tmp_path / "nothing", tmp_path / "old"):
        if path.name == "old":
            path.write_bytes(b"")
        with pytest.raises(ConfigError, match=r"no back end can be reached: connect to .*start it"):
            registry.open_device(Spec(str(path), "rng"), Context("vm", None, None))


def test_it_waits_for_one_that_was_started_with_it(tmp_path):
    started = []
    path = tmp_path / "s"
    timer = Timer(0.2, lambda: started.append(Fake(path)))
    began = time.monotonic()
    timer.start()
    with ExitStack() as closing:
        registry.open_device(Spec(str(path), "rng"), Context("vm", None, closing))
        assert time.monotonic() - began > 0.1
    timer.join()
    started[0].close()


def test_a_back_end_for_something_else(tmp_path):
    path = tmp_path / "s"
    with (
        fake(path, features=F_VERSION_1 | F_PROTOCOL, protocol=0),
        pytest.raises(ConfigError, match="gives no 60 bytes of configuration; is it one for"),
    ):
        registry.open_device(Spec(str(path), "blk"), Context("vm", None, None))


def test_packed_rings_that_the_back_end_does_not_have(tmp_path):
    path = tmp_path / "s"
    with (
        fake(path),
        ExitStack() as closing,
        pytest.raises(ConfigError, match="has no packed rings; leave out packed"),
    ):
        registry.open_device(Spec(str(path), "rng", packed=True), Context("vm", None, closing))


def test_it_does_not_cross_into_an_emulated_host():
    border = Border(None, lambda path, flag: path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot have memory of a guest in the emulated KVM host"):
        registry.cross(Spec(os.path.abspath("s"), "blk"), border)


def test_a_vsock_of_debians(tmp_path):
    """vhost-device-vsock, which is none of ours: its number, and a stream to a program here."""
    try:
        [image] = images.folders(["programs-vsock"], make=False)
    except ConfigError as error:
        pytest.skip(str(error))
    path, programs = tmp_path / "s", tmp_path / "here"
    program = command(image, "usr/bin/vhost-device-vsock", "vhost-device-vsock")
    words = ["--guest-cid", "42", "--socket", str(path), "--uds-path", str(programs)]
    with ExitStack() as closing:
        process = subprocess.Popen([*program, *words], stderr=subprocess.DEVNULL)
        closing.callback(process.wait)
        closing.callback(process.kill)
        listener = closing.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{programs}_1234")
        listener.listen()
        wait_for(lambda: listens_at(path))
        [spec] = check(f"socket={path},type=vsock")
        device = registry.open_device(spec, Context("vm", None, closing))
        driver = closing.enter_context(attached(device, irqfd=True, queue_sizes=[64, 64, 64]))
        assert driver.config(0, 8) == (42).to_bytes(8, "little")
        guest = VsockDriver(driver.mmio, cid=42)
        guest.offer(8)
        guest.send(Packet(REQUEST, 1000, 1234))
        assert guest.receive().op == RESPONSE
        connection, _ = listener.accept()
        closing.enter_context(connection)
        guest.send(Packet(RW, 1000, 1234, data=b"from the guest"))
        assert connection.recv(100) == b"from the guest"
        connection.sendall(b"from here")
        while (answer := guest.receive()).op != RW:
            assert answer.op == CREDIT_UPDATE  # which it may send or not
        assert answer.data == b"from here"
        assert not driver.needs_reset and not driver.log
