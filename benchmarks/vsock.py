"""A guest's vsock: pyvmm, and QEMU's microvm with vhost-device-vsock, in turn.

    python benchmarks/vsock.py [--json FILE] [--rounds 3] [--seconds 3] [--kernel 6.1]

One stream, both ways, and the round trip of 64 bytes, between a program in the guest and one on the
machine it runs on, across a Unix socket there; both are vsock_load.c. Everything is in one emulated
KVM host, with the same kernel and disk; what is in there is 10 to 20 times slower than on real KVM,
so the ratio is what counts. vhost-device-vsock (Rust, Debian sid) is a vhost-user device, for which
the guest's memory is shared with it; nobody has the kernel's vhost here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import guest_lab
from guest_lab import MICROVM, PARAMETERS, run_inside

PATIENCE = 60  # seconds in which a guest may stand still
TIMEOUT = 600.0  # for a round
MEMORY_MIB = 256
PINGS = 300
CID = 3
KEYS = {"sent": "MB/s sent", "received": "MB/s received", "ping": "ms round trip of 64 bytes"}
UNITS = {"sent": 1e6, "received": 1e6, "ping": 1e6}
SCRIPT = """\
cat /dev/vdc > /run/load
chmod +x /run/load
/run/load measure {seconds} {pings}
"""


class Setup(NamedTuple):
    """The settings for the part inside the emulated host."""

    kernel: str
    initrd: str
    root: str
    script: str
    load: str  # the program, as a disk and as a file that runs here
    device: list[str]  # the beginning of vhost-device-vsock's command line
    rounds: int


# --- inside the emulated host ---------------------------------------------------------------------


def pyvmm_command(setup: Setup, path: str) -> list[str]:
    """pyvmm, as a user would type it."""
    return [
        *(sys.executable, "-m", "pyvmm", "run", "--kvm=host", "--memory", f"{MEMORY_MIB}M"),
        *("--kernel", setup.kernel, "--initrd", setup.initrd, "--vsock", f"cid={CID},path={path}"),
        *("--disk", f"{setup.root},snapshot", "--disk", f"{setup.script},readonly"),
        *("--disk", f"{setup.load},readonly", "--cmdline", "quiet pyvmm.exec=/dev/vdb"),
    ]


def qemu_command(setup: Setup, device: str) -> list[str]:
    """QEMU's microvm, the same, with the socket device that listens at `device`."""
    command = ["qemu-system-x86_64", "-M", f"{MICROVM},memory-backend=ram", "-enable-kvm"]
    command += ["-cpu", "host", "-m", str(MEMORY_MIB)]
    command += ["-object", f"memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on"]
    command += ["-global", "virtio-mmio.force-legacy=false"]
    command += ["-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio"]
    command += ["-kernel", setup.kernel, "-initrd", setup.initrd]
    command += ["-append", f"{PARAMETERS} pci=off pyvmm.exec=/dev/vdb"]
    for index, file in enumerate((setup.root, setup.script, setup.load)):
        command += ["-drive", f"id=d{index},file={file},format=raw,if=none,snapshot=on"]
        command += ["-device", f"virtio-blk-device,drive=d{index}"]
    command += ["-chardev", f"socket,id=vsock,path={device}"]
    return [*command, "-device", "vhost-user-vsock-device,chardev=vsock"]


@contextmanager
def vhost_device(setup: Setup, folder: str, path: str) -> Iterator[str]:
    """A vhost-device-vsock whose host side is at `path`; its socket for a monitor."""
    socket = f"{folder}/device"
    process = subprocess.Popen(
        [*setup.device, "--guest-cid", str(CID), "--socket", socket, "--uds-path", path],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )
    try:
        until = time.monotonic() + PATIENCE
        while not os.path.exists(socket):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"vhost-device-vsock does not listen: {process.returncode}")
            time.sleep(0.1)
        yield socket
    finally:
        process.kill()
        process.wait()


@contextmanager
def servers(load: str, path: str) -> Iterator[None]:
    """The host's ends of the streams, which listen beside `path`. They let go of our output, which
    the emulated host would wait for."""
    process = subprocess.Popen(
        [load, "serve", path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    if process.wait():  # it leaves processes behind, in its own group
        raise RuntimeError("the host's ends of the streams do not listen")
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def run(command: list[str]) -> dict[str, float]:
    """Run a guest to its end; the figures that it printed. Raises RuntimeError without them, and
    for one that stands still."""
    text = guest_lab.output_of(command, PATIENCE)
    found = dict(re.findall(r"^(sent|received|ping)=([0-9]+)", text, re.MULTILINE))
    if set(found) != set(KEYS):
        raise RuntimeError(f"no figures\n{text[-3000:]}")
    return {key: float(value) for key, value in found.items()}


def measure_pyvmm(setup: Setup, folder: str, path: str) -> dict[str, float]:
    return run(pyvmm_command(setup, path))


def measure_qemu(setup: Setup, folder: str, path: str) -> dict[str, float]:
    with vhost_device(setup, folder, path) as socket:
        return run(qemu_command(setup, socket))


PROGRAMS: dict[str, Callable[[Setup, str, str], dict[str, float]]] = {
    "pyvmm": measure_pyvmm,
    "qemu": measure_qemu,
}


def inside(setup: Setup) -> dict[str, list[dict[str, float]]]:
    """Each monitor in turn; a guest that fails is told, and its figures are missing."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(setup.rounds):
        for name, measure in PROGRAMS.items():
            with tempfile.TemporaryDirectory(dir="/run") as folder:
                path = f"{folder}/v"
                load = f"{folder}/load"
                shutil.copy(setup.load, load)
                os.chmod(load, 0o755)
                try:
                    with servers(load, path):
                        figures = measure(setup, folder, path)
                except RuntimeError as error:
                    print(f"{name}: {error}", file=sys.stderr, flush=True)
                    continue
                print(f"{name}: {figures}", file=sys.stderr, flush=True)
                found[name].append(figures)
    return found


# --- outside --------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare what it takes, and start the emulated host. Raises PyvmmError or RuntimeError."""
    from pyvmm import images
    from pyvmm.images.programs import command

    files = images.artifacts(options.kernel, make=True)
    [device] = images.folders(["programs-vsock"], make=True)
    with tempfile.TemporaryDirectory() as folder:
        load, script = f"{folder}/load", f"{folder}/script"
        source = Path(__file__).with_name("vsock_load.c")
        subprocess.run(["cc", "-static", "-O2", "-Wall", "-Werror", "-o", load, source], check=True)
        text = SCRIPT.format(seconds=options.seconds, pings=PINGS).encode()
        Path(script).write_bytes(text)
        for file in (load, script):  # they become disks
            os.truncate(file, -(-os.path.getsize(file) // 512) * 512)
        setup = Setup(
            *(files.bzimage, files.initramfs, files.rootfs, script, load),
            command(device, "usr/bin/vhost-device-vsock", "vhost-device-vsock"),
            options.rounds,
        )
        seconds = TIMEOUT * options.rounds
        found = run_inside(__file__, setup._asdict(), memory_mib=1500, timeout=seconds)
    if not found["pyvmm"]:
        raise RuntimeError("no guest of pyvmm's came to its end")
    return dict(found)


def table(found: dict[str, Any]) -> str:
    """Medians and ratios, as Markdown."""
    lines = ["| vsock | pyvmm | QEMU microvm, vhost-device-vsock | ratio |", "|---|---|---|---|"]
    for key, title in KEYS.items():
        ours, theirs = ([figures[key] / UNITS[key] for figures in found[name]] for name in PROGRAMS)
        a = statistics.median(ours)
        other = (
            "failed | "
            if not theirs
            else (f"{statistics.median(theirs):.2f} | {a / statistics.median(theirs):.2f}")
        )
        lines.append(f"| {title} | {a:.2f} | {other} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(inside(Setup(**json.loads(options.inside)))))
        return
    found = measure(options)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
