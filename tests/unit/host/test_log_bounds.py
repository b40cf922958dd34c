"""A log line holds up nobody, and no guest can make a log grow without end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap

import pytest

from pyvmm.host import log

SAFETY_TIMEOUT = 60


def run(script: str, stderr: int, *argv: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *argv],
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


FLOOD = """
import os, sys
from pyvmm.host import log
for _ in range(20000):
    log.to_stderr("x" * 99)
print(log.left_out(), flush=True)
os.read(int(sys.argv[1]), 1)
log.to_stderr("afterwards")
log.flush()
"""


@pytest.mark.parametrize("kind", ["pipe", "socket", "terminal"])
def test_nobody_waits_for_who_does_not_read_and_the_loss_is_told(kind) -> None:
    go_reader, go_writer = os.pipe()
    os.set_inheritable(go_reader, True)
    reader, writer = -1, -1
    if kind == "pipe":
        reader, writer = os.pipe()
    elif kind == "terminal":
        reader, writer = os.openpty()
    else:
        reader, writer = (end.detach() for end in socket.socketpair())
    process = subprocess.Popen(
        [sys.executable, "-c", FLOOD, str(go_reader)],
        stdout=subprocess.PIPE,
        stderr=writer,
        pass_fds=(go_reader,),
    )
    assert os.get_blocking(writer)  # its flags are everybody's
    os.close(writer)
    try:
        lost = int(process.stdout.readline())  # which comes though nobody has read
        assert 0 < lost < 20000
        text = b""
        while b"that nobody read in time" not in text:
            text += os.read(reader, 1 << 16)
        os.write(go_writer, b"!")
        while b"afterwards" not in text:
            text += os.read(reader, 1 << 16)
        lines = text.replace(b"\r", b"").splitlines()
        assert lines[-2:] == [
            b"pyvmm: left out %d messages that nobody read in time" % lost,
            b"pyvmm: afterwards",
        ]
        assert len(lines) == 20000 - lost + 2
        assert set(lines[:-2]) == {b"pyvmm: " + b"x" * 99}
        assert process.wait(SAFETY_TIMEOUT) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for fd in (reader, go_reader, go_writer):
            os.close(fd)


def test_a_process_that_nobody_reads_ends_all_the_same() -> None:
    reader, writer = os.pipe()
    process = run(
        """
        from pyvmm.host import log
        for _ in range(20000):
            log.to_stderr("x" * 99)
        log.flush(0.1)
        """,
        writer,
    )
    assert process.wait(SAFETY_TIMEOUT) == 0
    os.close(writer)
    os.close(reader)
    process.stdout.close()


def test_a_source_tells_so_much_and_says_which_line_is_the_last() -> None:
    lines: list[str] = []
    now = [0.0]
    warn = log.RateLimited(lines.append, prefix="disk0: ", total=25, clock=lambda: now[0])
    for _ in range(1000):
        for _ in range(30):
            warn("odd")
        now[0] += 6
    assert len(lines) == 26
    assert lines[-1] == "disk0: no more warnings of this kind are shown"
    assert lines.count("disk0: 20 similar warnings were left out") == 2


def test_a_vm_tells_so_much_in_all_and_what_is_no_guests_doing_for_ever(
    monkeypatch, capsys
) -> None:
    monkeypatch.setattr(log, "_warnings", 0)
    monkeypatch.setattr(log, "MOST_WARNINGS", 50)
    log.set_vm("web")
    seen: list[log.Line] = []
    log.observe(seen.append)
    try:
        for number in range(20):
            warn = log.RateLimited(log.of_vm("web"), prefix=f"disk{number}: ", error="io")
            for _ in range(10):
                warn("odd")
        log.to_stderr("web: the guest's kernel panicked")
    finally:
        log.forget(seen.append)
        log.set_vm("")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 52
    assert lines[-2:] == [
        "pyvmm: web: no more warnings are shown",
        "pyvmm: web: the guest's kernel panicked",
    ]
    assert len(seen) <= 52  # nor is there an event for each
