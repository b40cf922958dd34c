"""The shared parts of benchmarks with a Linux guest: guests that take orders, on pyvmm and QEMU.

Everything here runs in the emulated KVM host. Several guests can be up at once; all but one of them
wait for a line on their serial port, so that loads can take turns between monitors within seconds.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

DEBUGFS = Path("/sys/kernel/debug")
PATIENCE = 120.0  # seconds in which a guest may stand still, however long it takes in all
_LOOKS_EACH = 10.0  # seconds, while it says nothing: a look costs the guest a little
# What a guest asks its monitor for: one that spins, or waits for ever, has none of these.
_ASKS = ("io_exits", "mmio_exits")
# KVM's counters on arm64, and what x86 calls the like.
COUNTERS = {"mmio_exit_user": "mmio_exits", "wfi_exit_stat": "halt_exits"}
# The lean machine of QEMU's documentation of microvm, with two changes in QEMU's favour: the ISA
# serial port is the console, and there is a clock (rtc=off costs seconds, in which Debian's kernel
# probes for one). ACPI stays on: this kernel has no other way to find virtio-mmio devices.
MICROVM = "microvm,x-option-roms=off,pit=off,pic=off,isa-serial=on,rtc=on"
PARAMETERS = "console=ttyS0 panic=-1 reboot=k quiet root=/dev/vda rw"
# QEMU's machine for arm64, which has a PL011. ACPI would take the place of the device tree.
VIRT = "virt,gic-version=3,acpi=off"
VIRT_PARAMETERS = PARAMETERS.replace("ttyS0", "ttyAMA0").replace(" reboot=k", "")
X86, ARM64 = "x86_64", "arm64"
ARCHITECTURES = (X86, ARM64)
DEFAULT_KERNEL = "6.1"
FOREIGN_PYTHON = "/usr/bin/python3"
# The guest's side. An order is a line: shell commands. What they print goes to the serial port only
# when all is done and counted, because each character of it is an exit.
SCRIPT = """\
exec < /dev/console
stty -echo
echo lab-ready
while read -r order; do
    eval "$order" > /run/answer 2>&1
    echo lab-done
    read -r go
    cat /run/answer
    echo lab-end
done
"""


def pyvmm_program() -> list[str]:
    """The beginning of a command line of the pyvmm that this Python has: as a user types it, where
    it is installed."""
    installed = os.path.join(os.path.dirname(sys.executable), "pyvmm")
    return [installed] if os.path.exists(installed) else [sys.executable, "-m", "pyvmm"]


def keep(result: object, path: str | None) -> None:
    """Write the figures to the file at `path` as JSON, if there is one."""
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")


class Files(NamedTuple):
    """What guests of an `arch` boot from, and the beginnings of command lines that run QEMU and
    Python in the emulated host of it."""

    arch: str
    kernel: str
    initrd: str
    root: str
    qemu: list[str]
    python: list[str]


def files_for(arch: str, kernel: str, variant: str, folder: str) -> Files:
    """Those of the recipes' `kernel`, "" for the usual one, and of a root disk that is a `variant`
    on x86; that of another architecture is made in `folder`. Raises PyvmmError."""
    from pyvmm import images

    if arch == X86:
        found = images.artifacts(kernel or DEFAULT_KERNEL, variant, make=True)
        qemu = ["qemu-system-x86_64"]
        return Files(arch, found.bzimage, found.initramfs, found.rootfs, qemu, [sys.executable])
    names = [f"programs-lab-{arch}", f"programs-{arch}"]
    lab, programs = (os.path.join(one, "root") for one in images.folders(names, make=True))
    newer = kernel and kernel != DEFAULT_KERNEL
    booted = images.boot_files(f"{arch}-{kernel}" if newer else arch, make=True)
    root = os.path.join(folder, "root.img")
    make_root(root, os.path.join(programs, "usr/bin/busybox"), lab)
    libraries = os.path.join(lab, "usr/lib/aarch64-linux-gnu")
    qemu = [os.path.join(lab, "usr/lib/ld-linux-aarch64.so.1"), "--library-path", libraries]
    qemu += ["--argv0", "qemu-system-aarch64", os.path.join(lab, "usr/bin/qemu-system-aarch64")]
    qemu += ["-L", os.path.join(lab, "usr/share/qemu")]
    return Files(arch, *booted, root, qemu, [FOREIGN_PYTHON])


def make_root(disk: str, busybox: str, programs: str) -> None:
    """Make at `disk` a root disk that starts as the recipes' do, with a static busybox, and with
    fio and its libraries out of the unpacked `programs`: no package need be configured."""
    from pyvmm.images import recipes

    tree = Path(f"{disk}.tree")
    for name in ("dev", "etc", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/lib"):
        (tree / name).mkdir(parents=True)
    for name in ("bin", "lib", "sbin"):
        (tree / name).symlink_to("usr/lib" if name == "lib" else "usr/bin")
    (tree / "etc/hostname").write_text("lab\n")
    shutil.copy(busybox, tree / "usr/bin/busybox")
    for applet in ("cat", "dmesg", "grep", "mount", "sh", "sleep", "stty", "sync", "true", "uname"):
        (tree / "usr/bin" / applet).symlink_to("busybox")
    shutil.copy(recipes.load().file("rootfs", "pyvmm-init"), tree / "usr/bin/init")
    for path in with_libraries(Path(programs), "usr/bin/fio"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(programs, path), tree / path)
    command = ["mke2fs", "-q", "-t", "ext4", "-L", "pyvmm-root", "-d", str(tree), disk, "256M"]
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    env = {**os.environ, "PATH": path}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)


def with_libraries(root: Path, program: str) -> set[str]:
    """`program` and all shared libraries that it is linked with: paths below `root`."""
    found: set[str] = set()
    waiting = [program]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        shown = subprocess.run(
            ["readelf", "-dl", root / path], capture_output=True, text=True, check=True
        )
        folders = ["usr/lib/aarch64-linux-gnu", "usr/lib"]
        for line in shown.stdout.splitlines():
            value = line.partition("[")[2].partition("]")[0]
            if "(RUNPATH)" in line:
                folders = [*(one.lstrip("/") for one in value.split(":")), *folders]
            if "program interpreter:" in line:
                waiting.append("usr" + line.partition(": ")[2].rstrip("]"))
        for line in shown.stdout.splitlines():
            if "(NEEDED)" in line:
                name = line.partition("[")[2].partition("]")[0]
                places = [f"{folder}/{name}" for folder in folders]
                waiting += [place for place in places if (root / place).exists()][:1]
    return found


class Machine(NamedTuple):
    """The files that a guest boots from, and its size, the same for every monitor."""

    kernel: str
    initrd: str
    root: str
    script: str  # a file with SCRIPT in it
    disk: str  # what is measured; "" for something else
    cpus: int = 1
    memory_mib: int = 256
    arch: str = X86


def pyvmm_command(
    machine: Machine, python: Sequence[str], options: Sequence[str] = ()
) -> list[str]:
    """pyvmm, as a user would type it, with more `options`."""
    return [
        *(*python, "-m", "pyvmm", "run", "--kvm=host", "--memory", f"{machine.memory_mib}M"),
        *("--cpus", str(machine.cpus), "--kernel", machine.kernel, "--initrd", machine.initrd),
        *("--disk", f"{machine.root},snapshot", "--disk", f"{machine.script},readonly"),
        *(("--disk", machine.disk) if machine.disk else ()),
        *("--cmdline", "quiet pyvmm.exec=/dev/vdb"),
        *options,
    ]


def qemu_command(
    machine: Machine,
    aio: str,
    transport: str = "mmio",
    qemu: Sequence[str] = ("qemu-system-x86_64",),
) -> list[str]:
    """QEMU's microvm, or `virt` on arm64: the same disks, the last one with a thread of its own."""
    pci = transport == "pci"
    blk = "virtio-blk-pci" if pci else "virtio-blk-device"
    buses = ["", "", ""]
    if machine.arch == X86:
        model = f"{MICROVM},pcie=on" if pci else MICROVM
        parameters = PARAMETERS if pci else f"{PARAMETERS} pci=off"
    else:
        model, parameters = VIRT, VIRT_PARAMETERS
        if not pci:  # which QEMU gives to the last device first
            buses = [f",bus=virtio-mmio-bus.{number}" for number in range(len(buses))]
    command = [*qemu, "-M", model, "-enable-kvm", "-cpu", "host"]
    command += ["-m", str(machine.memory_mib), "-smp", str(machine.cpus)]
    command += ["-global", "virtio-mmio.force-legacy=false"]
    command += ["-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio"]
    command += ["-kernel", machine.kernel, "-initrd", machine.initrd]
    command += ["-append", f"{parameters} pyvmm.exec=/dev/vdb", "-object", "iothread,id=thread"]
    for index, file in enumerate((machine.root, machine.script)):
        command += ["-drive", f"id=d{index},file={file},format=raw,if=none,snapshot=on"]
        command += ["-device", f"{blk},drive=d{index}{buses[index]}"]
    if machine.disk:
        command += ["-drive", f"id=disk,file={machine.disk},format=raw,if=none,aio={aio}"]
        command += ["-device", f"{blk},drive=disk,iothread=thread{buses[-1]}"]
    return command


def qemu_front_end(machine: Machine, kind: str, transport: str, socket: str) -> list[str]:
    """What makes QEMU a vhost-user front end for a device of `kind` (blk, fs) at `socket`; further
    properties of the device may be added to the last word."""
    memory = f"memory-backend-memfd,id=ram,size={machine.memory_mib}M,share=on"
    bus = "pci" if transport == "pci" else "device"
    return [
        *("-object", memory, "-machine", "memory-backend=ram"),
        *("-chardev", f"socket,id=back-end,path={socket}"),
        *("-device", f"vhost-user-{kind}-{bus},chardev=back-end"),
    ]


class Answer(NamedTuple):
    """The output of an order, and KVM's own counters for the time that it took."""

    text: str
    seconds: float
    counts: dict[str, int]


class Guest:
    """A running monitor whose guest takes orders."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        self._seen = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_up(self) -> None:
        """Raises RuntimeError if it does not come up."""
        self._read_until(b"lab-ready")

    def order(self, commands: str, patience: float = PATIENCE) -> Answer:
        """Let the guest's shell run `commands`. Raises RuntimeError if the guest ends, or stands
        still for `patience` seconds."""
        before, start = kvm_counts(self.pid), time.monotonic()
        self._send(commands)
        self._read_until(b"lab-done", patience)
        after, end = kvm_counts(self.pid), time.monotonic()
        self._send("go")
        text = self._read_until(b"lab-end").decode(errors="replace").replace("\r", "")
        counts = {name: after[name] - value for name, value in before.items() if name in after}
        return Answer(text.strip(), end - start, counts)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    def _read_until(self, mark: bytes, patience: float = PATIENCE) -> bytes:
        before, self._seen = read_until(self._process, mark, self._seen, patience)
        return before


def read_until(
    monitor: subprocess.Popen[bytes], mark: bytes, seen: bytes = b"", patience: float = PATIENCE
) -> tuple[bytes, bytes]:
    """What `monitor` prints before `mark`, beginning with `seen`, and what has come behind that.

    Raises RuntimeError with its last output if it ends before, or its guest stands still for
    `patience` seconds."""
    while mark not in seen:
        more = _more(monitor, patience)
        if not more:
            why = "it has ended" if more is not None else f"it stands still for {patience:g} s"
            tail = seen[-2000:].decode(errors="replace") + f"\n{_pulse(monitor.pid)}"
            name = _name(monitor)
            raise RuntimeError(f"{name}: no {mark.decode()}, {why}; its output:\n{tail}")
        seen += more
    before, _, behind = seen.partition(mark)
    return before, behind


def output_of(command: Sequence[str], patience: float = PATIENCE) -> str:
    """The output of the monitor `command`, whose guest runs to its end, and its complaints behind
    that. Raises RuntimeError with both if the guest stands still for `patience` seconds."""
    said = b""
    with tempfile.TemporaryFile() as errors:
        monitor = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        )
        assert monitor.stdout is not None
        try:
            while more := _more(monitor, patience):
                said += more
        finally:
            monitor.kill()
            monitor.wait()
            monitor.stdout.close()
        errors.seek(0)
        text = (said + errors.read()).decode(errors="replace")
    if more is None:
        raise RuntimeError(f"{_name(monitor)}: it stands still for {patience:g} s\n{text[-2000:]}")
    return text


def _more(monitor: subprocess.Popen[bytes], patience: float) -> bytes | None:
    """What `monitor` prints next, b"" at its end; None if the guest stands still: for `patience`
    seconds it prints nothing and asks its monitor for nothing, as far as KVM has counted."""
    assert monitor.stdout is not None
    asked, since = _asked(monitor.pid), time.monotonic()
    while True:
        left = max(0.0, since + patience - time.monotonic())
        if select.select([monitor.stdout], [], [], min(left, _LOOKS_EACH))[0]:
            return os.read(monitor.stdout.fileno(), 65536)
        if (now := _asked(monitor.pid)) != asked:
            asked, since = now, time.monotonic()
        elif left <= _LOOKS_EACH:
            return None


def _name(monitor: subprocess.Popen[bytes]) -> str:
    words = monitor.args
    return str(words[0] if isinstance(words, (list, tuple)) else words)


def _asked(pid: int) -> tuple[int, ...]:
    counts = kvm_counts(pid)
    return tuple(counts.get(name, 0) for name in _ASKS)


def _pulse(pid: int) -> str:
    """KVM's counts of a second, which show whether the processors run, and get interrupts."""
    before = kvm_counts(pid)
    time.sleep(1.0)
    after = kvm_counts(pid)
    names = ("exits", "io_exits", "mmio_exits", "halt_exits", "irq_injections")
    return " ".join(f"{name}={after.get(name, 0) - before.get(name, 0)}" for name in names)


@contextmanager
def guests(commands: dict[str, list[str]]) -> Iterator[dict[str, Guest]]:
    """A guest for each command, all of them up; they are killed at the end."""
    running: dict[str, Guest] = {}
    try:
        for name, command in commands.items():
            running[name] = Guest(command)
            running[name].wait_until_up()
        yield running
    finally:
        for guest in running.values():
            guest.close()


def mount_debugfs() -> None:
    """KVM's counters are there."""
    mount = ["mount"] if shutil.which("mount") else ["busybox", "mount"]
    subprocess.run([*mount, "-t", "debugfs", "debugfs", str(DEBUGFS)], check=True)


def kvm_counts(pid: int) -> dict[str, int]:
    """The counts of KVM for the machine of process `pid`, over all its vCPUs."""
    counts: dict[str, int] = {}
    for folder in DEBUGFS.glob(f"kvm/{pid}-*"):
        for file in folder.iterdir():
            text = file.read_text() if file.is_file() else ""
            if text.strip().isdecimal():  # others are histograms
                counts[COUNTERS.get(file.name, file.name)] = int(text)
    return counts


def prepare_disk(path: str, mib: int) -> None:
    """A file with something in every block, so that reads do not meet holes."""
    block = bytes(range(256)) * 4096
    with open(path, "wb") as file:
        for _ in range(mib):
            file.write(block)


def write_script(path: str) -> None:
    """SCRIPT as a disk."""
    text = SCRIPT.encode()
    Path(path).write_bytes(text + bytes(-len(text) % 512))


def run_inside(
    program: str, setup: dict[str, Any], *, memory_mib: int, timeout: float, arch: str = X86
) -> Any:
    """Run `program --inside SETUP` in an emulated KVM host of `arch`; the JSON that it prints.

    Raises RuntimeError if it fails twice, or takes longer than `timeout` seconds: an emulated host
    ruins a guest now and then (docs/decisions/0071).
    """
    until = time.monotonic() + timeout
    try:
        return _try_inside(program, setup, memory_mib, until, arch)
    except RuntimeError as error:
        print(f"{error}; once more", file=sys.stderr, flush=True)
    return _try_inside(program, setup, memory_mib, until, arch)


def _try_inside(
    program: str, setup: dict[str, Any], memory_mib: int, until: float, arch: str
) -> Any:
    command = [sys.executable, "-m", "pyvmm.emulated_host", "--memory", str(memory_mib)]
    command += (
        ["--", sys.executable] if arch == X86 else ["--arch", "aarch64", "--", FOREIGN_PYTHON]
    )
    command += [os.path.abspath(program), "--inside", json.dumps(setup)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        output, _ = process.communicate(timeout=max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        raise RuntimeError("the part in the emulated host takes too long") from None
    if process.returncode:
        raise RuntimeError(f"the part in the emulated host ended with {process.returncode}")
    return json.loads(output)
