"""passt, this machine's and the image's: what gets through to a guest, and what is said where it
does not. The guest is a few lines in tests/passt_rig.py; passt is the real one."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import passt_rig
import pytest
from front_end_rig import listens_at, restored, saved_of
from net_rig import MAC, header, running, wait_for
from passt_rig import Peer

from pyvmm import images
from pyvmm.errors import ConfigError
from pyvmm.host import passt
from pyvmm.host.passt import Forward
from pyvmm.host.programs import find_program
from pyvmm.kinds import net, registry
from pyvmm.kinds.interface import Context
from pyvmm.testing.attached import AttachedDriver, attached
from pyvmm.testing.ring import Chain
from pyvmm.virtio.net.stream import StreamBackend
from pyvmm.virtio.vhost_user.device import VhostUserDevice

GUEST_PORT = 7500


def image_command() -> list[str]:
    try:
        return images.passt_command()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's passt, an old one, and no other."""
    own = find_program("passt")
    if own is None or passt.is_recent([own]):
        pytest.skip("this machine has no passt older than August 2024")
    monkeypatch.setattr(passt, "_newer", None)


@pytest.fixture
def recent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The image's passt, and no other."""
    command = image_command()
    monkeypatch.setattr(passt, "find_program", lambda name: None)
    monkeypatch.setattr(passt, "_newer", lambda make: command)
    return command


@pytest.fixture(params=["recent", "old"])
def either(request: pytest.FixtureRequest) -> str:
    request.getfixturevalue(request.param)
    return str(request.param)


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def own_address() -> str:
    """An address of this machine's that is not the loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("this machine has no network")
        address: str = probe.getsockname()[0]
    return address


def exchange(bound: str, client: str) -> bytes:
    """The answer to a client at the address `client`, through a forward at `bound`."""
    port = free_port()
    peer = Peer(passt.start([Forward("udp", bound, port, GUEST_PORT)]))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind((client, 0))
        made.settimeout(60)
        made.connect((client if bound == "0.0.0.0" else bound, port))
        made.send(b"question")
        came = peer.receive_udp()
        assert came is not None and (came.port, came.data) == (GUEST_PORT, b"question")
        peer.send_udp(b"answer", (came.source, came.source_port), GUEST_PORT)
        try:
            return made.recv(100)
        finally:
            peer.close()


@pytest.mark.parametrize("bound", ["127.0.0.1", "127.0.0.7", "0.0.0.0"])
def test_a_udp_forward_answers_clients_on_the_loopback_address(
    recent: Sequence[str], bound: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exchange(bound, "127.0.0.1") == b"answer"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("any", [False, True])
def test_a_udp_forward_answers_clients_at_other_addresses(either: str, any: bool) -> None:
    address = own_address()
    assert exchange("0.0.0.0" if any else address, address) == b"answer"


def test_what_an_old_passt_cannot_do_is_said_in_a_line_each(
    old: None, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = free_port(), free_port()
    forwards = [Forward("udp", "127.0.0.1", first, 7), Forward("tcp", "127.0.0.1", second, 7)]
    passt.start(forwards).close()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"udp:127.0.0.1:{first}:7" in lines[0] and "get no answers" in lines[0]
    assert "pyvmm image build programs-passt" in lines[0]
    passt.start([Forward("udp", "127.0.0.1", free_port(), 7)], host_access=True).close()
    passt.start([Forward("tcp", "127.0.0.1", free_port(), 7)]).close()
    assert capfd.readouterr().err == ""


def test_a_recent_one_is_made_only_for_what_an_old_one_cannot_do(
    old: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def newer(make: bool) -> Sequence[str]:
        asked.append(make)
        raise ConfigError("not built")

    monkeypatch.setattr(passt, "_newer", newer)
    passt.start([]).close()
    assert asked == [False]
    passt.start([Forward("udp", "127.0.0.1", free_port(), 7)]).close()
    assert asked == [False, False, True]


def test_without_any_passt_the_image_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    command = image_command()
    asked: list[bool] = []

    def newer(make: bool) -> Sequence[str]:
        asked.append(make)
        if make:
            return command
        raise ConfigError("not built")

    monkeypatch.setattr(passt, "find_program", lambda name: None)
    monkeypatch.setattr(passt, "_newer", newer)
    passt.start([]).close()
    assert asked == [False, True]


def test_without_any_at_all_the_cures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "find_program", lambda name: None)
    monkeypatch.setattr(passt, "_newer", None)
    with pytest.raises(ConfigError, match=r"pyvmm image build programs-passt.*apt-get install"):
        passt.start([])


@pytest.mark.parametrize("size", [65494, 65507])
def test_the_largest_datagrams_cost_nobody_the_network(either: str, size: int) -> None:
    port = free_port()
    cable = passt.start([Forward("udp", "127.0.0.1", port, GUEST_PORT)], host_access=True)
    with (
        running(_Cable(cable), ram=16 << 20) as rig,  # type: ignore[arg-type]
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.connect(("127.0.0.1", port))
        rig.offer(*[1526] * 60)
        taken = rig.device.received[0]
        rig.send(header() + passt_rig.arp_request(MAC))
        wait_for(lambda: taken.frames == 1)  # the answer
        client.send(bytes(size))
        wait_for(lambda: taken.dropped == {"larger than the MTU": 1})
        client.send(b"small")
        wait_for(lambda: taken.frames == 2)
        assert rig.device.link_up
        assert rig.lines == []


@contextmanager
def card(text: str) -> Iterator[AttachedDriver]:
    """The card of ``--net TEXT``, with a driver in front."""
    spec = net.check(net.parse(text))
    with ExitStack() as closing:
        device = net.open_device(spec, Context("vm", None, closing))
        with attached(device, irqfd=True, ram=8 << 20) as driver:
            yield driver


def ask_gateway(driver: AttachedDriver, left: list[Chain] | None = None) -> bytes:
    """The frame by which passt tells its address; others may come before it. Buffers of before that
    it has not used are in `left`, and then those of now."""
    rooms = [] if left is None else left
    rooms += [driver.mmio.submit(0, writable=[4096]) for _ in range(8)]
    driver.request([header() + passt_rig.arp_request(driver.config(0, 6))], queue=1)
    while rooms:
        room = rooms.pop(0)
        used = driver.mmio.wait_used(0, room)
        frame = driver.queues[0].contents(room)[len(header()) : used.written]
        if frame[12:14] == passt_rig.ARP and frame[20:22] == b"\0\2":
            return frame
    raise AssertionError("passt does not answer")


def test_by_vhost_user_passt_has_the_guests_memory(recent: list[str]) -> None:
    """A driver that is loaded anew finds it as the first one did; without passt the link is down,
    and what the guest sends is lost."""
    with card("user,vhost-user,mtu=9000,mac=52:54:00:00:00:01") as driver:
        assert driver.config(10, 2) == (9000).to_bytes(2, "little")
        for _ in range(2):
            frame = ask_gateway(driver)
            assert frame[:6] == bytes.fromhex("525400000001")
            assert frame[6:12] == passt_rig.GATEWAY_MAC
            driver.restart()
        assert driver.config(6, 2) == b"\1\0"
        device = driver.device
        assert isinstance(device, VhostUserDevice)
        assert device._link is not None
        device._link.hang_up()  # as when it dies
        wait_for(lambda: driver.config(6, 2) == b"\0\0")
        assert driver.request([header() + passt_rig.arp_request(bytes(6))], queue=1).written == 0
        assert not driver.needs_reset


def test_a_saved_card_goes_on_with_a_passt_of_its_own(recent: list[str]) -> None:
    text = "user,vhost-user,mac=52:54:00:00:00:01"
    left: list[Chain] = []
    with card(text) as driver, ExitStack() as closing:
        ask_gateway(driver, left)
        state = saved_of(driver)
        driver.transport.close()
        device = net.open_device(net.check(net.parse(text)), Context("vm", None, closing))
        with restored(driver, device, state):
            assert ask_gateway(driver, left)[6:12] == passt_rig.GATEWAY_MAC
            assert not driver.needs_reset and not driver.log


def test_an_old_passt_has_no_vhost_user(old: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"has no vhost-user, as it is older than 2025; run: pyv"):
        passt.start([], vhost_user=True)

    def gone(make: bool) -> Sequence[str]:
        raise ConfigError("no network" if make else "not built")

    monkeypatch.setattr(passt, "_newer", gone)
    with pytest.raises(ConfigError, match=r"older than 2025 \(no network\); run: pyvmm image buil"):
        passt.start([], vhost_user=True)


class _Cable(StreamBackend):
    """passt's cable as a rig wants it."""

    ends: tuple[socket.socket, ...] = ()

    def __init__(self, cable: socket.socket) -> None:
        super().__init__(cable.detach(), passt.MTU)


# --- name servers ---------------------------------------------------------------------------------


Ask = Callable[..., tuple[dict[str, object], list[str]]]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Runs tests/passt_rig.py on a machine with this /etc/resolv.conf."""
    tools = [shutil.which(name) for name in ("unshare", "mount", "ip")]
    if not all(tools) or subprocess.run(["unshare", "-nm", "true"], capture_output=True).returncode:
        pytest.skip("no name spaces can be made here: that needs root, unshare and ip")

    def run(resolv_conf: str, recent: Sequence[str] = ()) -> tuple[dict[str, object], list[str]]:
        file = tmp_path / "resolv.conf"
        file.write_text(resolv_conf)
        prepare = 'mount --bind "$1" /etc/resolv.conf && ip link set lo up && shift && exec "$@"'
        inside = (str(file), sys.executable, passt_rig.__file__, *recent)
        done = subprocess.run(
            ["unshare", "-nm", "sh", "-c", prepare, "sh", *inside],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr.splitlines()

    return run


@pytest.mark.parametrize("also", ["", "nameserver 192.0.2.53\n"])
def test_queries_go_to_a_name_server_on_the_loopback_address(ask: Ask, also: str) -> None:
    found, said = ask(
        f"search corp.example lab.example\nnameserver 127.0.0.1\n{also}", image_command()
    )
    assert found["servers"] == [passt.DNS, *also.split()[1:]]
    assert found["answer"] == [passt.DNS, 53, "answer to query"]
    assert found["search"] == "\x04corp\x07example\x00\x03lab\x07example\x00"
    assert said == []


def test_a_machine_whose_passt_passes_no_queries_on_says_so(ask: Ask, old: None) -> None:
    found, said = ask("nameserver 127.0.0.1\n")
    assert found["servers"] == []
    assert len(said) == 1 and "127.0.0.1 are not passed on" in said[0] and "image build" in said[0]
    found, said = ask("nameserver 127.0.0.1\nnameserver 192.0.2.53\n")
    assert (found["servers"], said) == (["192.0.2.53"], [])


@pytest.mark.parametrize(("resolv_conf", "named"), [("", "none"), ("nameserver ::1\n", "::1")])
def test_a_machine_without_a_name_server_for_the_guest_says_so(
    ask: Ask, resolv_conf: str, named: str
) -> None:
    found, said = ask(resolv_conf, image_command())
    assert found["servers"] == []
    assert said == [f"pyvmm: the guest has no name server: /etc/resolv.conf names {named}"]


def test_passt_as_a_vhost_user_back_end(recent: list[str], tmp_path: Path) -> None:
    """Somebody else's network card behind our front end: a question goes out, its answer comes."""
    path = tmp_path / "passt.socket"
    addresses = ["-a", passt.GUEST, "-n", "24", "-g", passt.GATEWAY, "-i", "lo"]
    process = subprocess.Popen(
        [*recent, "--foreground", "--vhost-user", "-s", str(path), *addresses],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: listens_at(path))
        [spec] = registry.check(
            "vhost_user", [registry.parse("vhost_user", f"socket={path},type=net")], None
        )
        with ExitStack() as closing:
            device = registry.open_device(spec, Context("vm", None, closing))
            with attached(device, irqfd=True, queue_sizes=[64, 64]) as driver:
                room = driver.mmio.submit(0, writable=[2048])
                driver.request([bytes(12) + passt_rig.arp_request(passt_rig.MAC)], queue=1)
                driver.mmio.wait_used(0, room)
                frame = driver.queues[0].contents(room)[12:]
                assert frame[:6] == passt_rig.MAC and frame[12:14] == passt_rig.ARP
                assert frame[20:22] == b"\0\2"  # an answer
                assert socket.inet_ntoa(frame[28:32]) == passt.GATEWAY
                assert not driver.needs_reset and not driver.log
    finally:
        process.terminate()
        process.wait()
