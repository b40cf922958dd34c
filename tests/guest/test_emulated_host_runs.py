"""Commands in a real emulated host (QEMU, TCG): they end and write as if run on the machine."""

from __future__ import annotations

import hashlib
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from guest import HANG_SECONDS, children

from pyvmm.emulated_host import (
    EmulatedHostError,
    EmulatedHostSpec,
    HostDisk,
    HostImage,
    HostSink,
    saved_state,
    x86,
)
from pyvmm.emulated_host.find import find_image
from pyvmm.emulated_host.host import EmulatedHost, run
from pyvmm.emulated_host.probe import probe
from pyvmm.emulated_host.x86.tsc import frequency_khz
from pyvmm.errors import ConfigError
from pyvmm.host.files import open_image

MEMORY_MIB = 768


@pytest.fixture(scope="module")
def image() -> HostImage:
    for check in probe():
        if not check.ok:
            pytest.skip(f"no emulated host here: {check.name} {check.found}; {check.cure}")
    return find_image()


class Run:
    """A command inside, with its streams in files."""

    def __init__(self, folder: Path, image: HostImage, stdin: bytes = b"", **spec: object) -> None:
        for name in ("in", "out", "err"):
            (folder / name).write_bytes(stdin if name == "in" else b"")
        self.folder = folder
        self.spec = EmulatedHostSpec(image, memory_mib=MEMORY_MIB, **spec)  # type: ignore[arg-type]

    def __call__(self, *argv: str) -> int:
        with ExitStack() as closing:
            modes = {"in": "rb", "out": "wb", "err": "wb"}
            opened = [closing.enter_context(open(self.folder / n, m)) for n, m in modes.items()]
            stdin, stdout, stderr = (file.fileno() for file in opened)
            return run(self.spec, argv, stdin=stdin, stdout=stdout, stderr=stderr)

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()


def test_an_interrupt_is_delivered_once_when_its_processor_is_kicked(
    image: HostImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread for both processors: each leaves its loop ten times a second without a reason of
    its own, which had interrupts delivered twice. No guest got as far as its init."""
    several = x86.machine_arguments

    def one_thread(cpus: int, memory_mib: int) -> list[str]:
        arguments = several(cpus, memory_mib)
        return [word.replace("thread=multi", "thread=single") for word in arguments]

    assert one_thread(2, MEMORY_MIB) != several(2, MEMORY_MIB)
    monkeypatch.setattr(x86, "machine_arguments", one_thread)
    ran = Run(tmp_path, image, cpus=2)
    command = ["run", "debian", "--kvm", "host", "--memory", "256M", "--rm", "--", "uname", "-n"]
    code = ran("timeout", str(HANG_SECONDS), sys.executable, "-m", "pyvmm", *command)
    assert (code, ran.out) == (0, "pyvmm\n"), ran.err[-2000:]


def test_a_command_keeps_its_surroundings(image: HostImage, tmp_path: Path) -> None:
    """Arguments, environment, directory, files of the machine, separate outputs and exit code."""
    folder = tmp_path / "a directory; with 'quotes'"
    folder.mkdir()
    (folder / "file").write_text("of the machine\n")
    environment = {**os.environ, "GREETING": "it's $HOME\nand `more`", "odd.name%": "1"}
    ran = Run(tmp_path, image, cwd=str(folder), env=environment)
    script = r"""
        printf '%s|' "$@"; echo; printenv GREETING
        tr '\0' '\n' </proc/$$/environ | grep -c '^odd.name%=1$'
        pwd; cat file; echo changed >file; cat file; cat /proc/sys/kernel/hostname
        python3 -c 'import sys; print(sys.stdin.read() == "")'
        echo complaint >/dev/stderr; test -c /dev/kvm && echo kvm; exit 42"""
    assert ran("sh", "-c", script, "sh", "one two", "", "*") == 42
    assert ran.out.splitlines() == [
        *("one two||*|", "it's $HOME", "and `more`", "1", str(folder), "of the machine", "changed"),
        *(os.uname().nodename, "True", "kvm"),
    ]
    assert ran.err == "complaint\n"
    assert (folder / "file").read_text() == "of the machine\n"  # writes end with the emulated host


def test_ten_megabytes_go_in_and_out_unchanged(image: HostImage, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(10_000_000)
    ran = Run(tmp_path, image, stdin=data)
    assert ran("tee", "/dev/stderr") == 0
    for name in ("out", "err"):
        assert (
            hashlib.sha256((tmp_path / name).read_bytes()).digest() == hashlib.sha256(data).digest()
        )


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("sh", "-c", "kill -KILL $$"), 128 + signal.SIGKILL),
        (("no-such-program",), 127),
    ],
)
def test_a_command_that_ends_badly(
    image: HostImage, tmp_path: Path, argv: tuple[str, ...], code: int
) -> None:
    assert Run(tmp_path, image)(*argv) == code


WRITER = """
import os
for path in {paths!r}:
    try:
        fd = os.open(path, os.O_RDWR | os.O_EXCL)
        os.pwrite(fd, b"written inside".ljust(512), 1024)
        os.fdatasync(fd)
    except PermissionError:
        print("refused")
        continue
    print(os.lseek(fd, 0, os.SEEK_END))
print("flushed", flush=True)
"""


def test_disks_and_sinks_reach_the_machine(image: HostImage, tmp_path: Path) -> None:
    """A writable disk with an odd tail, a read-only one, a locked one in /dev/shm, and a sink."""
    odd, fixed, locked = (
        tmp_path / "odd.img",
        tmp_path / "fixed.img",
        Path(f"/dev/shm/pyvmm-test-{os.getpid()}.img"),
    )
    odd.write_bytes(bytes(8192 + 100))
    fixed.write_bytes(bytes(4096))
    locked.write_bytes(bytes(4096))
    paths = [str(odd), str(fixed), str(locked)]
    sink = tmp_path / "sink"
    opened = open_image(str(locked))
    try:
        with open(sink, "wb") as sink_file:
            disks = (
                HostDisk(str(odd)),
                HostDisk(str(fixed), read_only=True),
                HostDisk(str(locked), fd=opened.fd),
            )
            sinks = (HostSink("/run/some/log", sink_file.fileno()),)
            ran = Run(tmp_path, image, disks=disks, sinks=sinks)
            script = f"{WRITER.format(paths=paths)}\nopen('/run/some/log', 'w').write('kept')\n"
            assert ran(sys.executable, "-I", "-c", script) == 0, ran.err
        assert ran.out.split() == ["8192", "refused", "4096", "flushed"]
        assert odd.read_bytes()[1024:1038] == locked.read_bytes()[1024:1038] == b"written inside"
        assert odd.stat().st_size == 8192 + 100
        assert fixed.read_bytes() == bytes(4096)
        assert sink.read_text() == "kept"
        with pytest.raises(ConfigError, match="in use"):
            open_image(str(locked))
    finally:
        opened.close()
        locked.unlink()


@pytest.fixture
def outer(image: HostImage, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The helper program, with a disk, in which a command writes, flushes, says so and stays."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(4096))
    script = f"{WRITER.format(paths=[str(disk)])}\nimport time\ntime.sleep(10000)"
    argv = [sys.executable, "-m", "pyvmm.emulated_host", "--memory", str(MEMORY_MIB)]
    argv += ["--disk", str(disk), "--", sys.executable, "-I", "-c", script]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_nothing_is_left_when_it_is_killed(outer: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert outer.stdout is not None
    assert [outer.stdout.readline(), outer.stdout.readline()] == [b"4096\n", b"flushed\n"]
    [qemu] = children(outer.pid)
    watch = os.pidfd_open(qemu)
    outer.kill()
    outer.wait()
    # A pidfd becomes readable when its process has ended.
    assert select.select([watch], [], [], HANG_SECONDS)[0] == [watch]
    os.close(watch)
    assert (tmp_path / "disk.img").read_bytes()[1024:1038] == b"written inside"
    open_image(str(tmp_path / "disk.img")).close()  # no lock is left either


def test_it_says_why_when_qemu_dies(image: HostImage, tmp_path: Path) -> None:
    spec = EmulatedHostSpec(image, memory_mib=MEMORY_MIB)
    with open(tmp_path / "out", "wb") as out:
        host = EmulatedHost(spec, ["sleep", "1000"], stdin=None, stdout=out.fileno())
        host.start()
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        with pytest.raises(EmulatedHostError, match="killed by signal 9"):
            host.wait()


def test_a_request_to_stop_reaches_the_command(image: HostImage, tmp_path: Path) -> None:
    script = "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.1; done"
    reader, writer = os.pipe()
    spec = EmulatedHostSpec(image, memory_mib=MEMORY_MIB)
    host = EmulatedHost(spec, ["sh", "-c", script], stdin=None, stdout=writer)
    host.start()
    assert os.read(reader, 100) == b"ready\n"
    host.request_stop(grace=HANG_SECONDS)
    assert host.wait() == 5
    assert os.read(reader, 100) == b"bye\n"
    os.close(reader)
    os.close(writer)


def test_a_command_that_will_not_stop_is_killed(image: HostImage) -> None:
    reader, writer = os.pipe()
    spec = EmulatedHostSpec(image, memory_mib=MEMORY_MIB)
    script = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    host = EmulatedHost(spec, ["sh", "-c", script], stdin=None, stdout=writer)
    host.start()
    assert os.read(reader, 100) == b"ready\n"
    host.request_stop(grace=0.1)
    assert host.wait() == 128 + signal.SIGTERM
    os.close(reader)
    os.close(writer)


def test_a_reader_that_goes_away_ends_the_command(image: HostImage) -> None:
    """As on the machine: the next write of the command fails, here by SIGPIPE."""
    reader, writer = os.pipe()
    spec = EmulatedHostSpec(image, memory_mib=MEMORY_MIB)
    host = EmulatedHost(spec, ["yes"], stdin=None, stdout=writer)
    host.start()
    assert os.read(reader, 2) == b"y\n"
    os.close(reader)
    assert host.wait() == 128 + signal.SIGPIPE
    os.close(writer)


def test_its_clock_does_not_go_by_its_emulated_timers(image: HostImage, tmp_path: Path) -> None:
    """On a busy machine they tell its kernel a frequency that is several times too low."""
    ran = Run(tmp_path, image)
    assert ran("sh", "-c", "dmesg | sed -n 's/.* tsc: //p'") == 0
    assert "reference calibration" not in ran.out and "against PIT" not in ran.out
    found = re.search(r"Detected ([0-9.]+) MHz", ran.out)
    assert found is not None
    assert float(found[1]) * 1000 == pytest.approx(frequency_khz(), rel=1e-3)


ASK = """
dmesg | grep -c 'crng reseeded due to virtual machine fork'
head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '
cat /proc/sys/kernel/random/uuid
date +%s
"""


def test_it_goes_on_from_a_state_that_is_made_once(
    image: HostImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time with other random numbers and the time of now; a state that is damaged, or that
    QEMU does not take, is as if there were none."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(saved_state, "cache_directory", lambda: str(cache))
    ran = Run(tmp_path, image)

    def ask() -> tuple[bool, str, str]:
        before = int(time.time())
        assert ran("sh", "-c", ASK) == 0, ran.err
        forks, numbers, uuid, now = ran.out.split()
        assert before - 1 <= int(now) <= time.time() + 1
        return forks == "1", numbers, uuid

    found = [ask(), ask()]
    assert [restored for restored, *_ in found] == [True, True]
    assert len({value for _, *values in found for value in values}) == 4
    [state] = [path for path in cache.iterdir() if path.name != "state-lock"]
    made = state.stat().st_ino
    assert ran("sleep", "0.1") == 0 and state.stat().st_ino == made

    with open(state, "r+b") as file:
        file.seek(state.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert not ask()[0] and not state.exists()

    stream = random.Random(3).randbytes(100_000)
    khz = frequency_khz()
    assert khz is not None
    record = saved_state._record(state.name[6:], len(stream), zlib.crc32(stream), khz)
    state.write_bytes(stream + record)
    assert not ask()[0] and not state.exists()
    assert Path(f"{state}.refused").exists()
    assert not ask()[0]
