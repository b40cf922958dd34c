"""The emulated host without QEMU: archives, module order, command lines, marks, errors."""

from __future__ import annotations

import lzma
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from pyvmm.emulated_host import (
    EmulatedHostError,
    EmulatedHostSpec,
    HostDisk,
    HostImage,
    initramfs,
    limits,
)
from pyvmm.emulated_host.cache import boot_files
from pyvmm.emulated_host.find import find_image
from pyvmm.emulated_host.initramfs import RunSettings, run_script, settings_of
from pyvmm.emulated_host.launch import Launched
from pyvmm.emulated_host.limits import available_mib, check_memory
from pyvmm.emulated_host.modules import load_order, without_signature
from pyvmm.emulated_host.ports import open_machine_ports, open_run_ports
from pyvmm.emulated_host.probe import check_qemu, probe
from pyvmm.emulated_host.pumps import InputPump, OutputPump, mark_prefix
from pyvmm.emulated_host.qemu import machine_arguments, open_disk, run_arguments
from pyvmm.emulated_host.session import Session
from pyvmm.emulated_host.x86.kernel import vmlinux
from pyvmm.emulated_host.x86.machine import KVM_MODULES, ROOT_MODULES, kernel_parameters
from pyvmm.emulated_host.x86.tsc import frequency_khz, measure
from pyvmm.errors import ConfigError
from pyvmm.host import cpio
from pyvmm.host.syscalls import EventFd
from pyvmm.images.builder import Catalogue

MARK = b"0123456789abcdef"
STATIC_ELF = b"\x7fELF" + bytes(28) + struct.pack("<Q", 64) + bytes(14) + struct.pack("<HH", 56, 1)
STATIC_ELF = STATIC_ELF.ljust(64, b"\0") + struct.pack("<I", 1).ljust(56, b"\0")
ELF_KERNEL = b"\x7fELF and the rest of a kernel"


def bzimage(payload: bytes, *, protocol: int = 0x20F, sectors: int = 3) -> bytes:
    """A bzImage as Documentation/arch/x86/boot.rst has it, with `payload` 100 bytes in."""
    setup = bytearray((1 + (sectors or 4)) * 512)
    setup[0x1F1] = sectors
    setup[0x202:0x208] = b"HdrS" + protocol.to_bytes(2, "little")
    struct.pack_into("<II", setup, 0x248, 100, len(payload))
    return bytes(setup) + bytes(100) + payload + b"what follows"


@pytest.fixture
def image(tmp_path: Path) -> HostImage:
    """A complete image in which every wanted module needs the module before it and `common`."""
    modules = tmp_path / "modules"
    modules.mkdir()
    lines = ["kernel/common.ko:"]
    (modules / "kernel").mkdir()
    (modules / "kernel/common.ko").write_bytes(b"common")
    for name in (*ROOT_MODULES, *KVM_MODULES):
        path = f"kernel/{name.replace('_', '-')}.ko.xz"
        (modules / path).write_bytes(lzma.compress(name.encode()))
        lines.append(f"{path}: kernel/common.ko")
    (modules / "modules.dep").write_text("\n".join(lines) + "\n")
    (tmp_path / "kernel").write_bytes(bzimage(lzma.compress(ELF_KERNEL, lzma.FORMAT_XZ) + b"size"))
    (tmp_path / "busybox").write_bytes(STATIC_ELF)
    busybox = str(tmp_path / "busybox")
    return HostImage(str(tmp_path / "kernel"), str(modules), busybox, ("no-such-qemu",))


# ---- archives


def test_an_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    entries = [
        cpio.directory("folder", 0o700),
        cpio.regular("folder/file", b"odd length", 0o640),
        cpio.symlink("link", "folder/file"),
        cpio.regular("empty", b""),
    ]
    data = cpio.archive(entries)
    assert len(data) % 4 == 0
    command = ["cpio", "--extract", "--quiet", "--no-preserve-owner"]
    subprocess.run(command, input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "link").read_bytes() == b"odd length"
    assert os.readlink(tmp_path / "link") == "folder/file"
    assert (tmp_path / "empty").read_bytes() == b""
    assert (tmp_path / "folder/file").stat().st_mode & 0o777 == 0o640
    assert data == cpio.archive(entries)  # nothing in it depends on when it was made


# ---- modules


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text(
        "k/top.ko: k/middle.ko k/base.ko k/other-base.ko\n"
        "k/middle.ko: k/base.ko\n"
        "k/base.ko:\n"
        "k/other-base.ko: k/base.ko\n"
        "k/unwanted.ko:\n"
    )
    (tmp_path / "modules.builtin").write_text("k/inside.ko\n")
    order = [module.name for module in load_order(str(tmp_path), ["top", "inside", "other_base"])]
    assert sorted(order) == ["base", "middle", "other_base", "top"]
    assert order[0] == "base"
    assert order[-1] == "top"
    with pytest.raises(ConfigError, match=r"no module 9p.*generic kernel"):
        load_order(str(tmp_path), ["9p"])
    with pytest.raises(ConfigError, match="depmod"):
        load_order(str(tmp_path / "nowhere"), ["top"])


def test_a_signature_is_cut_off_and_nothing_else() -> None:
    magic = b"~Module signature appended~\n"
    signed = b"module" + b"signature" + bytes(8) + (9).to_bytes(4, "big") + magic
    assert without_signature(signed) == b"module"
    assert without_signature(b"module") == b"module"
    lying = b"module" + bytes(8) + (1000).to_bytes(4, "big") + magic
    assert without_signature(lying) == lying


# ---- kernel and cache


def test_the_kernel_is_found_in_a_bzimage() -> None:
    packed = lzma.compress(ELF_KERNEL, lzma.FORMAT_XZ) + len(ELF_KERNEL).to_bytes(4, "little")
    assert vmlinux(bzimage(packed)) == ELF_KERNEL
    assert vmlinux(bzimage(packed, sectors=0)) == ELF_KERNEL  # 0 means 4
    assert vmlinux(ELF_KERNEL) == ELF_KERNEL
    assert vmlinux(bzimage(packed, protocol=0x207)) is None
    assert vmlinux(bzimage(b"\x28\xb5\x2f\xfd of ZSTD")) is None
    with pytest.raises(ConfigError, match="damaged"):
        vmlinux(bzimage(packed[:12] + b"garbage" * 10))
    with pytest.raises(ConfigError, match="neither"):
        vmlinux(b"no kernel")


def test_files_to_boot_are_made_once(image: HostImage, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = boot_files(image, str(cache))
    assert Path(first.kernel).read_bytes() == ELF_KERNEL
    made = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert boot_files(image, str(cache)) == first
    assert made == {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    Path(image.busybox).write_bytes(STATIC_ELF + b"new")
    second = boot_files(image, str(cache))
    assert second.kernel == first.kernel
    assert second.initramfs != first.initramfs
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    command = ["cpio", "--extract", "--quiet", "--no-preserve-owner", "--no-absolute-filenames"]
    with open(second.initramfs, "rb") as archive:
        subprocess.run(command, stdin=archive, cwd=unpacked, check=True)
    assert (unpacked / "modules/kvm_amd.ko").read_bytes() == b"kvm_amd"  # no longer compressed
    assert (unpacked / "modules/root").read_text().split()[0] == "common"
    assert (unpacked / "modules/kvm").read_text().split() == list(KVM_MODULES)
    assert os.access(unpacked / "init", os.X_OK)


def test_what_is_missing_or_wrong_is_named(image: HostImage, tmp_path: Path) -> None:
    for part in ("kernel", "busybox"):
        missing = HostImage(**{**vars(image), part: str(tmp_path / "gone")})
        with pytest.raises(ConfigError, match=r"gone.*No such file"):
            boot_files(missing, str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        boot_files(image, image.kernel)  # a file where a directory should be
    for content in (b"#!/bin/sh\n", STATIC_ELF[:64] + struct.pack("<I", 3).ljust(56, b"\0")):
        Path(image.busybox).write_bytes(content)
        with pytest.raises(ConfigError, match="busybox-static"):
            boot_files(image, str(tmp_path / "cache"))


# ---- the settings of a run


def test_the_shell_reads_the_settings_back() -> None:
    argv = ("/bin/a=b", "it's", "$HOME `x` \\", "", "two\nlines")
    settings = RunSettings(
        argv, {"NAME": "a 'b'"}, "/some dir", "f" * 32, "host", ["/disk one"], ["/sink"]
    )
    script = run_script(settings).replace(b"exec /dev/.pyvmm/busybox", b"printf '%s|'")
    show = b'\nrun_command; printf "%s|" "$MARK" "$WORKING_DIRECTORY" "$DISK_COUNT" "$DISK_0"'
    out = subprocess.run(["sh", "-c", script + show], capture_output=True, check=True).stdout
    words = out.decode().split("|")
    assert words[:3] == ["env", "-i", "NAME=a 'b'"]
    assert tuple(words[-10:-5]) == argv
    assert words[-5:] == ["f" * 32, "/some dir", "1", "/disk one", ""]


def test_settings_name_disks_by_their_real_path(image: HostImage, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real.img")
    spec = EmulatedHostSpec(image, disks=(HostDisk(str(tmp_path / "link")),), env={"A": "b"})
    settings = settings_of(spec, ["true"])
    assert settings.disks == (str(tmp_path / "real.img"),)
    assert settings.env["A"] == "b"
    assert settings.env["PYVMM_INSIDE_EMULATED_HOST"] == "1"
    assert settings.mark != settings_of(spec, ["true"]).mark


def test_a_signal_that_comes_before_the_command_waits_for_it(tmp_path: Path) -> None:
    text = Path(initramfs.__file__).with_name("command.sh").read_text()
    _, begin, rest = text.partition("serve_requests() {\n")
    body, end, _ = rest.partition("\n}\n")
    # It ends its machine; here that is a file.
    served = begin + body.replace("/proc/sysrq-trigger", str(tmp_path / "ended")) + end
    assert "/proc" not in served
    script = f"""
        here={tmp_path}
        exec 9<&0
        {served}
        sleep 5 & command=$!
        serve_requests &
        sleep 0.2  # time in which it could be lost
        echo $command >$here/pid
        wait $command
    """
    run = subprocess.run(["sh", "-c", script], input=b"signal TERM\n", capture_output=True)
    assert run.returncode == 128 + signal.SIGTERM


def test_a_command_is_the_machines_own_not_busyboxs(image: HostImage, tmp_path: Path) -> None:
    (tmp_path / "ls").write_text("#!/bin/sh\n")
    (tmp_path / "ls").chmod(0o755)
    spec = EmulatedHostSpec(image, env={"PATH": f"/none:{tmp_path}"})
    assert settings_of(spec, ["ls", "-l"]).argv == (str(tmp_path / "ls"), "-l")
    assert settings_of(spec, ["no-such-program"]).argv == ("no-such-program",)
    assert settings_of(spec, ["./ls"]).argv == ("./ls",)


def test_a_directory_that_was_removed_is_no_obstacle(
    image: HostImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert EmulatedHostSpec(image).cwd == "/"


# ---- the time-stamp counter


def test_the_counters_frequency_is_measured_where_nobody_ran_in_between() -> None:
    moments = {"now": 1000}
    # Nanoseconds that pass after each look at the clock or the counter: somebody else runs.
    delays = iter([5, 9_000_000, 700, 40, 40, 3_000_000] * 10)

    def pass_time() -> int:
        now = moments["now"]
        moments["now"] += next(delays)
        return now

    def counter() -> int:
        return pass_time() * 5 // 2  # 2.5 GHz

    def sleep(seconds: float) -> None:
        moments["now"] += round(seconds * 1e9)

    assert measure(counter, pass_time, sleep) == pytest.approx(2_500_000, rel=1e-4)


def test_the_machines_counter_runs_at_one_frequency() -> None:
    found = [frequency_khz() for _ in range(3)]
    assert None not in found, "this machine lets no program make code"
    assert max(found) < min(found) * 1.001
    assert 500_000 < min(found) < 10_000_000


@pytest.mark.parametrize(("khz", "said"), [(2596132, ["tsc_early_khz=2596132"]), (None, [])])
def test_the_emulated_kernel_is_told_the_frequency(khz: int | None, said: list[str]) -> None:
    words = kernel_parameters(khz).split()
    assert [word for word in words if word.startswith("tsc_early")] == said
    assert "tsc=reliable" in words


# ---- QEMU's command line


def option_values(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in pairwise(arguments) if name == option]


def test_qemu_gets_open_disks_without_their_odd_tails(image: HostImage, tmp_path: Path) -> None:
    path = tmp_path / "odd, with a comma.img"
    path.write_bytes(bytes(1024 + 7))
    spec = EmulatedHostSpec(image, memory_mib=640, cpus=3)
    with open(path, "rb") as file, ExitStack() as closing:
        ports, run_ports = open_machine_ports(), open_run_ports(1, 0)
        for port in (*ports, *run_ports):
            closing.enter_context(port.ours)
            closing.enter_context(port.theirs)
        machine = machine_arguments(spec, console_fd=98, qmp_fd=97, ports=ports)
        disks = [open_disk(file.fileno(), read_only=True)]
        run = run_arguments(spec, ports=run_ports, disks=disks)
        fdsets = option_values(run, "-add-fd")
        assert fdsets == [f"fd={file.fileno()},set=0"]
    [file_node, raw_node] = option_values(run, "-blockdev")
    assert "read-only=on" in file_node and "read-only=on" in raw_node
    assert "locking=off" in file_node
    assert "size=1024" in raw_node.split(",")
    assert option_values(machine, "-m") == ["640"]
    assert option_values(machine, "-smp") == ["3"]
    assert not any("comma" in argument for argument in run)
    # Ports are /dev/vport0pN and, those of the run, /dev/vport2pN by the order of virtio devices.
    devices = option_values([*machine, *run], "-device")
    virtio = [device.split(",")[0] for device in devices if device.startswith("virtio-")]
    assert virtio == ["virtio-serial-pci", "virtio-9p-pci", "virtio-serial-pci", "virtio-blk-pci"]
    numbers = [device.split(",")[1:3] for device in devices if device.startswith("virtserialport")]
    assert numbers == [
        *(["bus=ports.0", f"nr={n}"] for n in range(1, 6)),  # stdin … relay
        *(["bus=run.0", f"nr={n}"] for n in (1, 2)),  # the sink, and the one that tells
    ]


# ---- streams


class LaunchedNothing:
    """What `launch` gives, with a program in QEMU's place; `theirs` are the other ends."""

    def __init__(self, program: list[str], *, restored: bool = False) -> None:
        ports = open_machine_ports()
        self.theirs = {port.name: port.theirs for port in ports}
        self.control = self.theirs["control"]
        self.pairs = [socket.socketpair() for _ in range(3)]
        console, messages, qmp = (ours for ours, _ in self.pairs)
        said_to = self.pairs[1][1]
        qemu = subprocess.Popen(program, stdout=said_to, stderr=said_to, start_new_session=True)
        if restored:
            said_to.close()  # as launch does; it ends with the program
        settings = RunSettings(["true"], {}, "/", MARK.decode(), "host", restored=restored)
        self.launched = Launched(qemu, ports, console, messages, qmp, settings)

    def __enter__(self) -> LaunchedNothing:
        return self

    @contextmanager
    def session(
        self, requests: deque[str] | None = None, stdin: int | None = None
    ) -> Iterator[Session]:
        with EventFd() as wake:
            yield Session(
                self.launched,
                stdin=stdin,
                outputs=[],
                on_input=bytes,
                requests=deque() if requests is None else requests,
                wake=wake,
                console_copy=None,
                start_timeout=60,
            )

    def __exit__(self, *error: object) -> None:
        self.launched.kill()
        self.launched.close()
        for _, theirs in self.pairs:
            theirs.close()
        for port in self.launched.ports:
            port.theirs.close()


def test_the_mark_is_found_however_it_is_cut() -> None:
    stream = b"data \n01234 0123456789abcde" + MARK
    for step in range(1, len(stream) + 1):
        near, far = socket.socketpair()
        near.setblocking(False)
        reader, writer = os.pipe()
        pump = OutputPump(near, writer, MARK)
        for start in range(0, len(stream), step):
            assert not pump.ended
            far.sendall(stream[start : start + step])
            pump.receive()
            while pump.wants_output:
                pump.send()
        assert pump.done
        os.close(writer)
        assert os.read(reader, 1000) == stream[: -len(MARK)]
        os.close(reader)
        near.close()
        far.close()


def test_output_is_not_held_back_without_need() -> None:
    assert mark_prefix(b"login: ", MARK) == 0
    assert mark_prefix(b"12:01", MARK) == 2
    assert mark_prefix(MARK[:-1], MARK) == len(MARK) - 1


def test_a_stream_that_is_cut_off_gives_up_what_it_held() -> None:
    near, far = socket.socketpair()
    reader, writer = os.pipe()
    pump = OutputPump(near, writer, MARK)
    far.sendall(b"abc" + MARK[:5])
    far.close()
    for _ in range(2):
        pump.receive()
        while pump.wants_output:
            pump.send()
    assert pump.done
    assert os.read(reader, 100) == b"abc" + MARK[:5]
    near.close()
    os.close(reader)
    os.close(writer)


def test_input_waits_for_the_other_side_and_ends_with_its_end() -> None:
    near, far = socket.socketpair()
    near.setblocking(False)
    reader, writer = os.pipe()
    seen: deque[bytes] = deque()

    def on_input(data: bytes) -> bytes:
        seen.append(data)
        return data.replace(b"x", b"")

    pump = InputPump(reader, near, on_input)
    os.write(writer, b"axb")
    pump.receive()
    assert list(seen) == [b"axb"]
    assert not pump.wants_input  # not before the port has taken this
    pump.send()
    assert far.recv(10) == b"ab"
    assert pump.wants_input
    os.close(writer)
    pump.receive()
    assert not pump.wants_input
    assert far.recv(10) == b""
    os.close(reader)
    near.close()
    far.close()


def test_s10_lines_from_inside_that_make_no_sense_are_left_out() -> None:
    """Root inside can write to the control port."""
    with LaunchedNothing(["true"]) as nothing, nothing.session() as session:
        control = nothing.control
        lines = b"exit\nexit \nexit x\nexit -1\nexit 1 2\nstarted\n\xff\0\nx" + b"y" * 9000
        control.sendall(b"awake\n" * 1000 + lines)
        while select.select([nothing.launched.port("control")], [], [], 0)[0]:
            session._receive_control()
        assert session._exit_code is None and session._start_by is None
        assert len(session._control_in) <= 4096
        assert session._control_out.count(b"\nMARK=") == 1  # it was told the settings once
        control.sendall(b"\nexit 7\n")
        assert session.run() == 7


def test_a_run_is_told_to_a_machine_that_is_awake_and_requests_come_after_it() -> None:
    """In what order init.sh reads it: a word, the settings with the time of now, requests."""
    requests = deque(["signal 15"])
    with LaunchedNothing(["true"]) as nothing, nothing.session(requests) as session:
        session._take_requests()
        session._send_control()
        assert nothing.control.recv(100) == b"go\n"
        nothing.control.sendall(b"awake\n")
        before = round(time.time())
        session._receive_control()
        session._send_control()
        length, _, rest = nothing.control.recv(1 << 16).partition(b"\n")
        script, after = rest[: int(length)], rest[int(length) :]
        assert after == b"signal 15\n"
        now = int(script.rpartition(b"NOW=")[2])
        assert script.endswith(b"\n") and before <= now <= round(time.time())


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 1", False),  # QEMU does not like the state
        ("kill -ABRT $$", False),
        ("kill -KILL $$", "killed by signal 9"),  # somebody wants it to end
        ("sleep 1000", False),  # the kernel in it does not go on
    ],
)
def test_a_machine_that_does_not_go_on_from_its_state(script: str, expected: bool | str) -> None:
    reader, writer = os.pipe()
    with LaunchedNothing(["sh", "-c", script], restored=True) as nothing:
        os.write(writer, b"input")
        with nothing.session(stdin=reader) as session:
            if expected is False:
                assert not session.came_up(5 if script != "sleep 1000" else 0.1)
            else:
                with pytest.raises(EmulatedHostError, match=str(expected)):
                    session.came_up(5)
        assert os.read(reader, 10) == b"input"  # another machine gets it all
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("said", [b"", b"awake\n"])
def test_what_was_asked_of_a_machine_that_does_not_go_on_is_asked_of_the_next(said: bytes) -> None:
    requests = deque(["signal 15", "signal 2"])
    with LaunchedNothing(["sleep", "1000"], restored=True) as nothing:
        nothing.control.sendall(said)
        with nothing.session(requests) as session:
            session._wake.signal()
            assert not session.came_up(0.1)
            assert list(requests) == ["signal 15", "signal 2"]
            assert select.select([session._wake.fd], [], [], 0)[0]  # so that the next one looks


def test_a_machine_that_went_on_gets_the_input() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"input")
    with LaunchedNothing(["sleep", "1000"], restored=True) as nothing:
        nothing.control.sendall(b"awake\nup\n")
        with nothing.session(stdin=reader) as session:
            assert session.came_up(5)
            for _ in range(10):  # nothing else is to be done
                session._step(time.monotonic() + 1)
            nothing.theirs["stdin"].setblocking(False)
            assert nothing.theirs["stdin"].recv(10) == b"input"
            nothing.control.sendall(b"exit 3\n")
            assert session.run() == 3
    os.close(reader)
    os.close(writer)


# ---- what the machine lacks


def test_the_kernel_is_found_whatever_lies_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(Catalogue().path("kernel-host"))
    (folder / "lib/modules/6.1").mkdir(parents=True)
    (tmp_path / "busybox").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "re.py").write_text("raise SystemExit('not the one of Python')")
    monkeypatch.chdir(tmp_path)
    Path(Catalogue().path("programs-emulator")).mkdir()
    found = find_image()
    assert found.kernel == str(folder / "vmlinux")
    assert found.modules_dir == str(folder / "lib/modules/6.1")
    assert found.busybox == str(tmp_path / "busybox")


def test_a_machine_without_the_image_hears_how_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    missing = [check for check in probe() if not check.ok]
    assert [check.name for check in missing] == ["QEMU and kernel"]
    assert missing[0].cure == "run: pyvmm image build kernel-host programs-emulator"


def test_too_much_memory_is_refused_with_both_numbers() -> None:
    available = available_mib()
    assert available is not None
    check_memory(1)
    with pytest.raises(ConfigError, match=r"--memory: .* needs 99999999 MiB .* MiB to give"):
        check_memory(99_999_999)


def test_a_containers_page_cache_is_memory_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemAvailable: 8388608 kB\nSwapFree: 0 kB\n",
        "/sys/fs/cgroup/memory.max": f"{2 << 30}\n",
        "/sys/fs/cgroup/memory.current": f"{2 << 30}\n",
        "/sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {1 << 30}\nactive_file {1 << 29}\n",
    }
    monkeypatch.setattr(limits, "read_or_empty", lambda path: files.get(path, ""))
    assert available_mib() == 1536


def test_a_qemu_that_cannot_do_it_is_told_apart(tmp_path: Path, image: HostImage) -> None:
    old = tmp_path / "qemu-system-x86_64"
    old.write_text("#!/bin/sh\n[ $1 != --version ] || echo 'QEMU emulator version 5.2.0'\n")
    old.chmod(0o755)
    checks = {check.name: check for check in check_qemu(replace(image, qemu=(str(old),)))}
    assert "5.2.0" in checks["QEMU"].found
    assert not checks["QEMU's devices"].ok
    broken = {check.name: check for check in check_qemu(image)}
    assert not broken["QEMU"].ok
