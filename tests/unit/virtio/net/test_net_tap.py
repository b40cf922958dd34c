"""Real taps: opened, refused, gone with their descriptors; frames to and from this machine."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from net_rig import HEADER, MAC, header, running

from pyvmm.errors import ConfigError
from pyvmm.host import tap
from pyvmm.kinds import net as device_net
from pyvmm.kinds.interface import Context
from pyvmm.virtio.net.device import NetDevice
from pyvmm.virtio.net.tap import TapBackend


@pytest.fixture(autouse=True)
def needs_taps() -> None:
    try:
        fds, _ = tap.open_tap("pyvmmt%d", create=True)
    except (ConfigError, OSError) as error:
        pytest.skip(f"no taps can be made here: {error}")
    for fd in fds:
        os.close(fd)


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def opened(text: str, closing: ExitStack) -> NetDevice:
    spec = device_net.check(device_net.parse(text))
    return device_net.open_device(spec, Context("vm", None, closing))


def test_a_tap_that_we_make_is_up_and_vanishes_with_us(closing: ExitStack) -> None:
    device = opened("tap=pyvmmt7,address=10.99.7.1/24,mtu=1400,vhost=off", closing)
    assert device.name == "net-pyvmmt7"
    assert tap.is_up("pyvmmt7") and tap.mtu_of("pyvmmt7") == 1400
    assert device.read_config(10, 2) == (1400).to_bytes(2, "little")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("10.99.7.1", 0))
    closing.close()
    assert not tap.exists("pyvmmt7")


def test_a_tap_vanishes_even_after_kill_9() -> None:
    code = (
        "import sys, time; from pyvmm.host import tap; tap.open_tap('pyvmmt8', create=True);"
        "print('made', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert tap.exists("pyvmmt8")
        process.kill()
    deadline = time.monotonic() + 30
    while tap.exists("pyvmmt8") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not tap.exists("pyvmmt8")


def test_a_tap_that_exists_or_is_busy_is_one_line(closing: ExitStack) -> None:
    opened("tap=pyvmmt9,create", closing)
    with pytest.raises(ConfigError, match="already an interface pyvmmt9"):
        opened("tap=pyvmmt9,create", closing)
    with pytest.raises(ConfigError, match="pyvmmt9 is in use"):
        opened("tap=pyvmmt9", closing)
    with pytest.raises(ConfigError, match="not one with multi_queue"):
        opened("tap=pyvmmt9,queues=2", closing)


def test_a_wrong_address_or_bridge_is_one_line_and_leaves_no_tap(closing: ExitStack) -> None:
    with pytest.raises(ConfigError, match=r"'10\.99' is not an address"):
        opened("tap=pyvmmt10,address=10.99", closing)
    with pytest.raises(ConfigError, match="there is no bridge nosuchbr0"):
        opened("tap=pyvmmt10,bridge=nosuchbr0", closing)
    assert not tap.exists("pyvmmt10")


def test_several_queues_are_attached_and_detached() -> None:
    fds, name = tap.open_tap("pyvmmt%d", 4, create=True)
    backend = TapBackend(fds, 1500)
    try:
        assert len(backend.channels) == 4
        for pairs in (1, 3, 4, 1, 2):
            backend.set_active(pairs)
        assert os.path.isdir(f"/sys/class/net/{name}/queues/rx-1")
    finally:
        backend.close()


def test_a_driver_with_fewer_queues_than_before_keeps_its_link() -> None:
    fds, _ = tap.open_tap("pyvmmt%d", 2, create=True)
    with running(TapBackend(fds, 1500)) as rig:  # type: ignore[arg-type]
        for _ in range(10):
            assert rig.command(4, 0, b"\2\0") == 0
            rig.offer(2048, pair=1)
            rig.send(header() + MAC + MAC + bytes(60), pair=1)
            assert rig.command(4, 0, b"\1\0") == 0
            rig.offer(2048, pair=1)
            rig.send(header() + MAC + MAC + bytes(60), pair=1)
        rig.driver.restart()
        assert rig.device.link_up and not rig.lines


def test_a_driver_comes_up_on_a_tap_that_is_gone() -> None:
    fds, name = tap.open_tap("pyvmmt%d", create=True)
    with running(TapBackend(fds, 1500)) as rig:  # type: ignore[arg-type]
        rig.driver.mmio.reset()
        subprocess.run(["ip", "link", "del", name], check=True)
        for _ in range(2):
            rig.driver.restart()
            assert not rig.device.link_up and not rig.driver.needs_reset
            assert rig.send(header() + MAC + MAC + bytes(60)) == 0
        assert rig.lines == ["the link is down: the tap is gone"]


def test_packets_of_this_machine_reach_the_driver_and_come_back(closing: ExitStack) -> None:
    fds, name = tap.open_tap("pyvmmt%d", create=True)
    from pyvmm.host import interfaces

    interfaces.set_up(name, address="10.99.11.1/24")
    backend = TapBackend(fds, 1500)
    with running(backend) as rig:  # type: ignore[arg-type]
        sender = closing.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        sender.bind((name, 0x88B5))
        sender.settimeout(30)
        data = MAC + b"\2\0\0\0\0\1" + b"\x88\xb5" + os.urandom(500)
        chains = rig.offer(*[2048] * 40)
        sender.send(data)
        for chain in chains:  # the kernel says hello in IPv6 at times
            written, got = rig.received(chain)
            if got[HEADER:] == data:
                assert got[:HEADER] == header(num_buffers=1) and written == HEADER + len(data)
                break
        else:
            pytest.fail("the frame never came")
        answer = b"\2\0\0\0\0\1" + MAC + b"\x88\xb5" + os.urandom(700)
        rig.send(header() + answer)
        while sender.recv(2048) != answer:
            pass


def test_a_tap_that_is_deleted_takes_the_link_down() -> None:
    fds, name = tap.open_tap("pyvmmt%d", create=True)
    from pyvmm.host import interfaces

    interfaces.set_up(name)
    with running(TapBackend(fds, 1500)) as rig:  # type: ignore[arg-type]
        rig.offer(*[2048] * 10)
        subprocess.run(["ip", "link", "delete", name], check=True)
        deadline = time.monotonic() + 30
        while rig.device.link_up and time.monotonic() < deadline:
            rig.send(header() + MAC + MAC + bytes(60))
        assert not rig.device.link_up
        assert not rig.driver.needs_reset


def test_counters_are_found_among_those_of_many_interfaces() -> None:
    """A machine of many VMs has more of them than the kernel tells of at once."""
    libc = ctypes.CDLL(None, use_errno=True)
    found: list[dict[str, int]] = []

    def look() -> None:
        assert libc.unshare(0x40000000) == 0, ctypes.get_errno()  # CLONE_NEWNET of <linux/sched.h>
        with ExitStack() as closing:
            names = []
            for _ in range(100):
                fds, name = tap.open_tap("pyvmmc%d", create=True)
                names.append(name)
                for fd in fds:
                    closing.callback(os.close, fd)
            counts = tap.open_counts()
            closing.callback(os.close, counts)
            for name in names:
                found.append(tap.Interface(name).counters())
                found.append(tap.Interface(name, counts).counters())

    with ThreadPoolExecutor(1) as pool:
        pool.submit(look).result(60)
    assert len(found) == 200 and not any(counted["frames_to_guest"] for counted in found)
