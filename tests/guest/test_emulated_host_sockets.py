"""Unix sockets across the border of a real emulated host (QEMU, TCG), both ways."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest import HANG_SECONDS, pump_into, wait_until

import pyvmm
from pyvmm.emulated_host import EmulatedHostSpec, HostImage, HostListener
from pyvmm.emulated_host.find import find_image
from pyvmm.emulated_host.host import EmulatedHost
from pyvmm.emulated_host.probe import probe
from pyvmm.host import unix_sockets

MEMORY_MIB = 768
CHECKOUT = str(Path(pyvmm.__file__).parents[1])

# Inside: whatever comes in at /run/inner.sock goes out to the machine's socket and back, a line
# each; "quit" ends it.
INSIDE = f"""
import socket, sys, threading
sys.path.insert(0, {CHECKOUT!r})
from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
from pyvmm.relay import inside

inside.start()
server = socket.socket(socket.AF_UNIX)
server.bind("/run/inner.sock")
server.listen(16)

def refused(path):
    try:
        unix_sockets.reach(path)
    except HostError as error:
        return error.errno
    return 0

def copy(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)

print(refused({{secret!r}}), refused({{missing!r}}), flush=True)
inside.admit()
while True:
    caller, _ = server.accept()
    out = socket.socket(fileno=unix_sockets.reach({{out!r}}).detach())
    out.setblocking(True)
    back = threading.Thread(target=copy, args=(out, caller))
    back.start()
    copy(caller, out)
    back.join()
"""


@pytest.fixture(scope="module")
def image() -> HostImage:
    for check in probe():
        if not check.ok:
            pytest.skip(f"no emulated host here: {check.name} {check.found}; {check.cure}")
    return find_image()


def listener(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen(16)
    return made


def shout_back(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        with connection:
            while data := connection.recv(1 << 16):
                connection.sendall(data.upper())


@pytest.fixture
def relayed(image: HostImage, tmp_path: Path) -> Iterator[tuple[EmulatedHost, Path, str]]:
    """An emulated host that relays in.sock to out_7.sock and back; its first line of output."""
    secret = listener(tmp_path / "secret.sock")  # not announced, and so out of reach
    server = listener(tmp_path / "out_7")
    threading.Thread(target=shout_back, args=(server,), daemon=True).start()
    incoming = unix_sockets.listen(str(tmp_path / "in.sock"))
    script = INSIDE.format(
        secret=str(tmp_path / "secret.sock"),
        missing=str(tmp_path / "out_8"),
        out=str(tmp_path / "out_7"),
    )
    spec = EmulatedHostSpec(
        image,
        memory_mib=MEMORY_MIB,
        sockets_in=(HostListener("/run/inner.sock", incoming, owner_only=True),),
        sockets_out=(str(tmp_path / "out_*"),),
    )
    reader, writer = os.pipe()
    argv = [sys.executable, "-I", "-S", "-c", script]
    host = EmulatedHost(spec, argv, stdin=None, stdout=writer)
    host.start()
    early = socket.socket(socket.AF_UNIX)
    early.connect(str(tmp_path / "in.sock"))  # before anybody listens inside
    early.sendall(b"early")
    early.shutdown(socket.SHUT_WR)
    said = bytearray()
    pump = pump_into(said, reader)
    wait_until(lambda: b"\n" in said)
    line = said.decode()
    early.settimeout(HANG_SECONDS)
    assert b"".join(iter(lambda: early.recv(100), b"")) == b"EARLY"
    early.close()
    yield host, tmp_path, line
    host.kill()
    host.wait()
    os.close(writer)
    pump.join(HANG_SECONDS)
    os.close(reader)
    for made in (secret, server, incoming):
        made.close()


def test_sockets_lead_in_and_out(relayed: tuple[EmulatedHost, Path, str]) -> None:
    _, folder, line = relayed
    # ECONNREFUSED for both: what was not announced cannot be told from what is not there.
    assert line.split() == ["111", "111"]
    data = random.Random(2).randbytes(3_000_000).lower()
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(HANG_SECONDS)
        caller.connect(str(folder / "in.sock"))

        def send() -> None:
            caller.sendall(data)
            caller.shutdown(socket.SHUT_WR)

        threading.Thread(target=send, daemon=True).start()
        got = b"".join(iter(lambda: caller.recv(1 << 16), b""))
    assert hashlib.sha256(got).digest() == hashlib.sha256(data.upper()).digest()


def test_connections_end_with_the_emulated_host(relayed: tuple[EmulatedHost, Path, str]) -> None:
    host, folder, _ = relayed
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(HANG_SECONDS)
        caller.connect(str(folder / "in.sock"))
        caller.sendall(b"x")
        assert caller.recv(1) == b"X"
        host.kill()
        assert caller.recv(1) == b""
