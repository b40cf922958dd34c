"""Linux's own virtio_console driver: the terminal as hvc0, and named ports."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
from disks import artifacts
from guest import HANG_SECONDS, GuestResult
from terminal_guest import TerminalGuest

pytestmark = pytest.mark.usefixtures("linux_guests")

BOOTS = (("6.1", ""), ("6.12", ""), ("6.1", ",packed"))
CTRL_A = "\x01"
LONG = 300_000
LINES = 2000

# In the guest, without udev: the port's node by its name.
PORT = "/dev/$(basename $(dirname $(grep -l agent /sys/class/virtio-ports/*/name)))"


@dataclass
class Run:
    """The observations at the terminal and at the port's socket."""

    result: GuestResult
    rings: list[str]  # "1" for packed, of each console device
    lines: list[str]
    restored: bool
    greeting: bytes
    reply: bytes
    bulk: int
    after_close: bytes
    left_over: bool


def read_until(stream: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end) and (more := stream.recv(1 << 16)):
        data += more
    return data


def talk(folder: Path, kernel: str, ring: str) -> Run:
    made = artifacts(kernel)
    path = folder / "agent"
    guest = TerminalGuest(
        made.vmlinux,
        made.initramfs,
        [f"{made.rootfs},readonly"],
        options=[f"--console=virtio{ring}", "--port", f"name=agent,path={path}{ring}"],
        size=(100, 30),
    )
    guest.start()
    guest.wait_for("# ")
    guest.type("echo terminal=$(tty) size=$(stty size).; cat\r")
    guest.wait_for("terminal=/dev/hvc0")
    guest.type("purr\r")
    guest.wait_for("purr", times=2)
    guest.type("\x03")
    # The shell forgets what is typed before it is back. It draws its prompt again whenever it
    # likes, so prompts are not counted.
    guest.wait_for("# ", after="^C")
    # Of a device's features the 35th is RING_PACKED.
    guest.type(
        "cut -c35 /sys/bus/virtio/drivers/virtio_console/virtio*/features | sed s/^/ring-/;"
        " echo rings-$((1+1))\r"
    )
    guest.wait_for("rings-2")
    guest.type(f"seq 1 {LINES}; echo all-$((1+1))\r")
    guest.wait_for("all-2")

    guest.resize(132, 43)
    guest.type("until [ \"$(stty size)\" = '43 132' ]; do sleep 0.2; done; echo grown-$((1+1))\r")
    guest.wait_for("grown-2")
    guest.resize(90, 20)
    guest.type("until [ \"$(stty size)\" = '20 90' ]; do sleep 0.2; done; echo shrunk-$((1+1))\r")
    guest.wait_for("shrunk-2")

    with socket.socket(socket.AF_UNIX) as agent:
        agent.settimeout(HANG_SECONDS)
        agent.connect(str(path))
        guest.type(f"exec 5<> {PORT}; echo hello >&5; read line <&5; echo got $line >&5\r")
        greeting = read_until(agent, b"\n")
        agent.sendall(b"question\n")
        reply = read_until(agent, b"\n")
        guest.type(f"head -c {LONG} /dev/zero >&5; exec 5<&-; echo closed-$((1+1))\r")
        bulk = 0
        while data := agent.recv(1 << 16):
            bulk += len(data)
        after_close = data
    guest.wait_for("closed-2")
    with socket.socket(socket.AF_UNIX) as agent:  # one that sends, and leaves
        agent.settimeout(HANG_SECONDS)
        agent.connect(str(path))
        # A write waits until the guest has heard that somebody is there; a read would find the end.
        guest.type(
            f"exec 5<> {PORT}; echo again >&5; read line <&5; echo second-$line; exec 5<&-\r"
        )
        assert read_until(agent, b"\n") == b"again\n"
        agent.sendall(b"client\n")
        guest.wait_for("second-client")
    guest.type(f"{CTRL_A}h")
    guest.wait_for("this help")
    guest.type("exit\r")
    result = guest.wait()
    # Behind bash's escapes; a line that is typed early is echoed twice, at last at the prompt.
    rings = re.findall(r"(?:^|\r)ring-([01])\r?$", result.console, re.MULTILINE)
    seq = result.console.partition("all-2")[0].rpartition(f"seq 1 {LINES}")[2]
    lines = re.findall(r"(?:^|\r)([0-9]+)\r?$", seq, re.MULTILINE)
    return Run(
        *(result, rings, lines),
        guest.after == guest.before,
        greeting,
        reply,
        bulk,
        after_close,
        path.exists(),
    )


@pytest.mark.parametrize(
    ("kernel", "ring"),
    [pytest.param(*row, marks=pytest.mark.boot.with_args(talk, *row)) for row in BOOTS],
)
def test_a_terminal_and_a_port(boot: Run, kernel: str, ring: str) -> None:
    assert boot.result.code == 0, boot.result.ending()
    assert "terminal=/dev/hvc0 size=30 100." in boot.result.console, "known before any change"
    assert boot.restored
    assert boot.rings == ["1" if ring else "0"] * 2, "the terminal, and the port"
    assert boot.lines == [str(number + 1) for number in range(LINES)], "nothing is lost"
    assert (boot.greeting, boot.reply) == (b"hello\n", b"got question\n")
    assert boot.bulk == LONG, "all that the guest wrote before it closed"
    assert boot.after_close == b"", "the guest's close is the end of the connection"
    assert not boot.left_over, "the socket is gone with the monitor"
    assert "unable to open an initial console" not in boot.result.console
