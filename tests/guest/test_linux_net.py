"""Linux's own virtio-net driver, on user-mode networking and on a tap."""

from __future__ import annotations

import hashlib
import random
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import pytest
from disks import artifacts, root_disk
from guest import HANG_SECONDS, Guest, GuestResult, wait_until
from taps import boot_with_taps

from pyvmm import images
from pyvmm.host import passt

pytestmark = pytest.mark.usefixtures("linux_guests")

MAC = "52:54:00:ca:fe:01"
MTU = 9000
BYTES = 6_000_001
DATA = random.Random(5).randbytes(BYTES)
DIGEST = hashlib.sha256(DATA).hexdigest()

USER_SCRIPT = """\
echo "mac=$(cat /sys/class/net/eth0/address)"
echo "mtu=$(cat /sys/class/net/eth0/mtu)"
echo "carrier=$(cat /sys/class/net/eth0/carrier)"
echo "driver=$(ethtool -i eth0 | sed -n 's/^driver: //p')"
echo "address=$(busybox ip -4 -o addr show eth0 | sed 's/.*inet \\([^ ]*\\).*/\\1/')"
echo "router=$(busybox ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')"
busybox wget -q -O /dev/shm/data http://{host}:{port}/data
echo "download=$(sha256sum < /dev/shm/data | cut -d' ' -f1)"
busybox nc {host} {upload} < /dev/shm/data > /dev/null
echo "from the guest" | busybox nc -l -p 80 &
web=$!
until grep -q ":0050 " /proc/net/tcp*; do sleep 0.1; done
perl -MSocket -e '
    socket(S, PF_INET, SOCK_DGRAM, 0); bind(S, sockaddr_in(7500, INADDR_ANY)) or die;
    send(S, length($_) . " bytes", 0, $from) while $from = recv(S, $_, 65536, 0);' &
until grep -q ":1D4C " /proc/net/udp; do sleep 0.1; done
busybox ip addr add 192.168.7.1/24 dev eth0
touch -d 2000-01-01 /run/pyvmm-lease.eth0
for process in /proc/[0-9]*; do # udhcpc renews its lease
    if tr '\\0' ' ' 2> /dev/null < $process/cmdline | grep -q '^/bin/busybox udhcpc -i eth0'; then
        kill -USR1 ${{process#/proc/}}
    fi
done
until [ "$(find /run -name pyvmm-lease.eth0 -newermt 2001-01-01)" ]; do sleep 0.1; done
echo "renewed=$(busybox ip -4 -o addr show eth0 | sed 's/.*inet \\([^ ]*\\).*/\\1/' | tr '\\n' ' ')"
echo "servers=$(sed -n 's/^nameserver //p' /etc/resolv.conf | tr '\\n' ' ')"
echo "listening=yes"
wait $web
if busybox nc -w 3 {host} 1 < /dev/null 2> /dev/null; then
    echo "closed=open"
else
    echo "closed=refused"
fi
cd /sys/class/net/eth0/statistics
echo "dropped=$(cat rx_errors tx_errors | tr '\\n' ' ')"
"""


@dataclass
class Net:
    """A run with a network card, and what came out of it."""

    result: GuestResult
    uploaded: str = ""
    forwarded: bytes = b""
    left_over: list[str] = field(default_factory=list)
    answered: list[bool] = field(default_factory=list)  # UDP from 127.0.0.1, from another address


class Server(Thread):
    """Gives DATA to whoever asks by HTTP, and takes one upload; both at `address`."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.web, self.upload = (socket.create_server((address, 0)) for _ in range(2))
        self.uploaded = ""
        self.start()
        self._taker = Thread(target=self._take, daemon=True)
        self._taker.start()

    def run(self) -> None:
        while True:
            connection, _ = self.web.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % BYTES + DATA)

    def upload_digest(self) -> str:
        """The checksum of what was uploaded, once its end has come."""
        self._taker.join(HANG_SECONDS)
        return self.uploaded

    def _take(self) -> None:
        connection, _ = self.upload.accept()
        digest = hashlib.sha256()
        with connection:
            while data := connection.recv(1 << 20):
                digest.update(data)
        self.uploaded = digest.hexdigest()


def boot_user(folder: Path, kernel: str, option: str) -> Net:
    images.passt_command(make=True)  # for a machine whose own is old: its making would be told
    files = artifacts(kernel, "test")
    own = own_address()
    server = Server("127.0.0.1" if option else own)
    port, udp_port = free_port(socket.SOCK_STREAM), free_port(socket.SOCK_DGRAM)
    script = USER_SCRIPT.format(
        port=server.web.getsockname()[1],
        upload=server.upload.getsockname()[1],
        host=passt.GATEWAY if option else own,
    )
    forwards = f"forward={port}:80,forward=udp:0.0.0.0:{udp_port}:7500"
    net = f"user{option},mac={MAC},mtu={MTU},{forwards}"
    with root_disk(folder, "test") as disk:
        guest = Guest(
            files.bzimage, files.initramfs, [str(disk)], cpus=2, options=["--net", net]
        ).start(script, folder=folder)
        guest.wait_for("listening=yes")
        answered = [answers_udp(address, udp_port) for address in ("127.0.0.1", own)]
        forwarded = fetch(port)
        result = guest.wait()
    return Net(result.check(), server.upload_digest(), forwarded, passts(port), answered)


def free_port(kind: socket.SocketKind) -> int:
    """A port that nobody has, and that no program gets which asks for any (ip_local_port_range)."""
    while True:
        with socket.socket(socket.AF_INET, kind) as probe, suppress(OSError):
            probe.bind(("0.0.0.0", random.randrange(10_000, 32_768)))
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


def answers_udp(address: str, port: int) -> bool:
    """True if the guest answers a client there, also after one of the largest datagrams."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind((address, 0))
        client.connect((address, port))
        client.settimeout(1)
        client.send(bytes(65494))
        for _ in range(int(HANG_SECONDS)):
            try:
                client.send(b"hello")
                if client.recv(100) == b"5 bytes":
                    return True
            except (TimeoutError, ConnectionError):
                continue
    return False


def fetch(port: int) -> bytes:
    """The bytes of the guest's server, through the forward; it may still be about to listen."""
    for _ in range(int(HANG_SECONDS)):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.settimeout(HANG_SECONDS)
            try:
                # passt of 2023 completes the handshake only with the client's first bytes.
                connection.sendall(b"hello\n")
                if data := connection.recv(100):
                    return data
            except ConnectionError:
                pass
        time.sleep(0.2)
    return b""


def passts(port: int) -> list[str]:
    """Command lines of passt processes that serve this port, after a while to end."""
    found: list[str] = []

    def have_ended() -> bool:
        lines = [_read(path) for path in Path("/proc").glob("[0-9]*/cmdline")]
        found[:] = [line for line in lines if f"/{port}:80" in line and "passt" in line]
        return not found

    wait_until(have_ended)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


user_61 = pytest.mark.boot.with_args(boot_user, "6.1", ",host")
user_612 = pytest.mark.boot.with_args(boot_user, "6.12", "")


def check_user(boot: Net) -> None:
    result = boot.result.check()
    values = {
        "mac": MAC,
        "mtu": str(MTU),
        "carrier": "1",
        "driver": "virtio_net",
        "address": f"{passt.GUEST}/{passt.PREFIX}",
        "router": passt.GATEWAY,
        "download": DIGEST,
        "closed": "refused",
        "dropped": "0 0",
        "renewed": f"{passt.GUEST}/{passt.PREFIX} 192.168.7.1/24",
    }
    assert {key: result.value(key) for key in values} == values
    assert result.value("servers").split()
    assert boot.answered == [True, True]
    assert boot.uploaded == DIGEST
    assert boot.forwarded == b"from the guest\n"
    assert boot.left_over == []
    assert result.messages == []


@user_61
def test_dhcp_transfers_both_ways_and_forwards(boot: Net) -> None:
    check_user(boot)


@user_612
def test_dhcp_transfers_both_ways_and_forwards_with_a_newer_kernel(boot: Net) -> None:
    check_user(boot)


# --- a tap, made and used where the monitor runs --------------------------------------------------

TAP_GUEST = """\
echo "queues=$(ethtool -l eth0 | sed -n 's/^Combined:[^0-9]*//p' | tr '\\n' ' ')"
ethtool -L eth0 combined 2 && echo "set=yes"
ethtool -k eth0 > /run/features
for name in rx-checksumming tx-checksumming tcp-segmentation-offload; do
    echo "$name=$(sed -n "s/^$name: //p" /run/features)"
done
busybox ping -q -c 20 -i 0.1 -s 1400 10.77.0.1 > /run/ping && echo "ping=ok" || cat /run/ping
measure() { # OPTIONS; the server listens anew after each test, a moment later than this ends
    until iperf3 "$@" > /run/iperf 2>&1; do
        grep -qE 'busy|refused' /run/iperf || return 1
        sleep 0.5
    done
}
for way in "" -R; do
    measure -c 10.77.0.1 -t 3 -P 2 $way && echo "iperf$way=ok" || cat /run/iperf
done
measure -c 10.77.0.1 -u -b 0 -l 1400 -t 3 -R && echo "flood=ok" || cat /run/iperf
busybox ping -q -c 3 10.77.0.1 > /run/ping && echo "after=ok" || cat /run/ping
echo "errors=$(cat /sys/class/net/eth0/statistics/rx_errors)"
now() { cut -d' ' -f1 /proc/uptime | tr -d .; }
busybox ip addr add 10.78.0.2/24 dev eth1
for way in "" -R; do
    began=$(now)
    measure -c 10.78.0.1 -n 2M -w 64K $way || cat /run/iperf
    echo "limited$way=$(($(now) - began))"
done
"""
LIMIT = 1 << 20  # bytes a second, of the second card
# In hundredths of a second: 2 MiB, less a burst of a tenth of a second's worth and what still lies
# in the sender's socket when iperf3 has done with it.
LEAST_TIME = 160


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_a_tap_with_two_queues_offloads_and_a_flood(kernel: str, tmp_path: Path) -> None:
    iperf3 = shutil.which("iperf3")
    if iperf3 is None:
        pytest.skip("iperf3 is not installed")
    nets = [
        "tap=vmtap0,address=10.77.0.1/24,queues=2,vhost=off",
        f"tap=vmtap1,address=10.78.0.1/24,rx-bps={LIMIT},tx-bps={LIMIT}",
    ]
    beside = [iperf3, "-s", "--logfile", "/dev/null"]
    result = boot_with_taps(tmp_path, kernel, TAP_GUEST, nets, beside, cpus=2).check()
    values = {
        "queues": "2 2",  # the most, and those in use: Linux takes one for each CPU
        "set": "yes",
        "rx-checksumming": "on [fixed]",
        "tx-checksumming": "on",
        "tcp-segmentation-offload": "on",
        "ping": "ok",
        "iperf": "ok",
        "iperf-R": "ok",
        "flood": "ok",
        "after": "ok",
        "errors": "0",
    }
    assert {key: result.value(key) for key in values} == values
    for way in ("", "-R"):
        assert int(result.value(f"limited{way}")) >= LEAST_TIME
