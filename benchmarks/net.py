"""A guest's network: pyvmm and QEMU's microvm, in turn, on the same tap and on passt.

    python benchmarks/net.py [--json FILE] [--rounds 3] [--seconds 4] [--kernel 6.1]
                             [--ways tap vhost passt passt-vhost]

iperf3 with one stream, both ways, and the round trip of a ping, between a guest and the machine it
runs on. Both run in one emulated KVM host, with the same kernel and disk; what is in there is 10 to
20 times slower than on real KVM, so the ratio is what counts. On the way called vhost both leave a
tap's frames to the kernel's vhost-net; on that called tap neither does. On passt-vhost both leave
them to passt, by vhost-user; on passt both have a stream. All but QEMU's on passt are Debian
trixie's passt.
A guest that stands still for PATIENCE seconds is stopped, and its figures are missing: iperf3
prints a line each second, however slow the machine is.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import guest_lab

TAP, HOST, GUEST = "bench0", "10.77.0.1", "10.77.0.2"
PATIENCE = 300
MACHINE = "microvm,x-option-roms=off,pit=off,pic=off,isa-serial=on,rtc=on"
PARAMETERS = "console=ttyS0 panic=-1 reboot=k pci=off quiet root=/dev/vda rw"
MAC = "52:54:00:be:ac:01"
SCRIPT = """\
rate() {{ # NAME, OPTIONS
    name=$1
    shift
    iperf3 -c {peer} -t {seconds} -f m -i 1 --forceflush "$@" |
        sed -u "s/.* \\([0-9.]*\\) Mbits.*receiver/$name=\\1/"
}}
busybox ping -q -c 5 {peer} > /dev/null
busybox ping -q -c 100 -i 0.02 {peer} |
    sed -n 's/^round-trip.*= [^/]*[/]\\([^/]*\\)[/].*/ping=\\1/p'
rate sent
rate received -R
"""
WAYS = ("tap", "vhost", "passt", "passt-vhost")
KEYS = ("sent", "received", "ping")  # Mbit/s, Mbit/s, ms


class Setup(NamedTuple):
    """The settings for the part inside the emulated host, as JSON."""

    kernel: str
    initrd: str
    disk: str
    scripts: dict[str, str]
    rounds: int
    passt: list[str]  # one that knows vhost-user


def pyvmm_command(setup: Setup, way: str) -> list[str]:
    """pyvmm, as a user would type it."""
    nets = {"tap": f"tap={TAP},vhost=off", "vhost": f"tap={TAP},vhost", "passt": "user,host"}
    net = {**nets, "passt-vhost": "user,host,vhost-user"}[way]
    return [
        *(sys.executable, "-m", "pyvmm", "run", "--kvm=host", "--memory", "256M"),
        *("--kernel", setup.kernel, "--initrd", setup.initrd),
        *("--net", f"{net},mac={MAC}"),
        *("--disk", setup.disk, "--disk", f"{setup.scripts[way]},readonly"),
        *("--cmdline", f"quiet {guest_parameters(way)}"),
    ]


def qemu_command(setup: Setup, way: str, socket: str) -> list[str]:
    """QEMU's microvm, the same."""
    network = {
        "tap": f"tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off",
        "vhost": f"tap,id=net,ifname={TAP},script=no,downscript=no,vhost=on",
        "passt": f"stream,id=net,server=off,addr.type=unix,addr.path={socket}",
        "passt-vhost": "vhost-user,id=net,chardev=passt",
    }
    command = ["qemu-system-x86_64", "-M", MACHINE, "-enable-kvm", "-cpu", "host", "-m", "256"]
    command += ["-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio"]
    command += ["-global", "virtio-mmio.force-legacy=false"]  # passt serves no legacy device
    command += ["-kernel", setup.kernel, "-initrd", setup.initrd]
    command += ["-append", f"{PARAMETERS} {guest_parameters(way)}"]
    for index, file in enumerate((setup.disk, setup.scripts[way])):
        command += ["-drive", f"id=d{index},file={file},format=raw,if=none,snapshot=on"]
        command += ["-device", f"virtio-blk-device,drive=d{index}"]
    if way == "passt-vhost":
        command += ["-object", "memory-backend-memfd,id=ram,size=256M,share=on"]
        command += ["-machine", "memory-backend=ram"]
        command += ["-chardev", f"socket,id=passt,path={socket}"]
    command += ["-netdev", network[way], "-device", f"virtio-net-device,netdev=net,mac={MAC}"]
    return command


def guest_parameters(way: str) -> str:
    address = "" if way.startswith("passt") else f" pyvmm.ip={GUEST}/24"
    return f"pyvmm.exec=/dev/vdb{address}"


@contextmanager
def passt_for_qemu(command: Sequence[str]) -> Iterator[str]:
    """passt with the settings that pyvmm gives its own, and the path of its socket."""
    with tempfile.TemporaryDirectory() as folder:
        # passt becomes nobody before it makes its socket; where nobody may not make one it goes on
        # all the same, and can never be reached.
        os.chmod(folder, 0o777)
        socket = f"{folder}/socket"
        process = subprocess.Popen(
            [
                *(*command, "--foreground", "--quiet", "--stderr", "--socket", socket, "-i", "lo"),
                *("--address", "10.0.2.15", "--netmask", "24", "--gateway", "10.0.2.2"),
                *("--mac-addr", "52:55:0a:00:02:02", "--mtu", "65520"),
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            for _ in range(PATIENCE):
                if os.path.exists(socket) or process.poll() is not None:
                    break
                signal.sigtimedwait([], 0.1)
            yield socket
        finally:
            process.kill()
            process.wait()


def measure(command: list[str], patience: float = PATIENCE) -> dict[str, float]:
    """Run a guest to its end; the figures that it printed. Raises RuntimeError without them, and
    for one that stands still for `patience` seconds."""
    text = guest_lab.output_of(command, patience)
    found = dict(re.findall(r"^(sent|received|ping)=([0-9.]+)", text, re.MULTILINE))
    if len(found) < 2:
        raise RuntimeError(f"{command[0]}: no figures\n{text[-2500:]}")
    return {key: float(value) for key, value in found.items()}


def inside(setup: Setup) -> dict[str, Any]:
    """Runs in the emulated host: each monitor on each way, in turn."""
    for command in (
        ["ip", "tuntap", "add", TAP, "mode", "tap", "vnet_hdr"],
        ["ip", "addr", "add", f"{HOST}/24", "dev", TAP],
        ["ip", "link", "set", TAP, "up"],
    ):
        subprocess.run(command, check=True)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    programs: dict[str, Callable[[str], dict[str, float]]] = {
        "pyvmm": lambda way: measure(pyvmm_command(setup, way)),
        "qemu": lambda way: measure_qemu(setup, way),
    }
    for _ in range(setup.rounds):
        for way in setup.scripts:
            for name, program in programs.items():
                try:
                    with iperf3_server():
                        figures = program(way)
                except RuntimeError as error:
                    print(f"{way} {name}: {error}", file=sys.stderr, flush=True)
                    continue
                print(f"{way} {name}: {figures}", file=sys.stderr, flush=True)
                found.setdefault(way, {}).setdefault(name, []).append(figures)
    return found


@contextmanager
def iperf3_server() -> Iterator[None]:
    """One for each guest: to one whose guest ended in the middle of a test, that test goes on."""
    server = subprocess.Popen(["iperf3", "-s"], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        server.kill()
        server.wait()


def measure_qemu(setup: Setup, way: str) -> dict[str, float]:
    if not way.startswith("passt"):
        return measure(qemu_command(setup, way, ""))
    program = ["passt"] if way == "passt" else [*setup.passt, "--vhost-user"]
    with passt_for_qemu(program) as socket:
        return measure(qemu_command(setup, way, socket))


def outside(options: argparse.Namespace) -> dict[str, Any]:
    """Prepares the images and starts the emulated host."""
    from pyvmm import images

    files = images.artifacts(options.kernel, "test", make=True)
    with tempfile.TemporaryDirectory() as folder:
        disk = os.path.join(folder, "root.img")
        images.fresh_disk(disk, "test")
        scripts = {}
        for way in options.ways:
            peer = "10.0.2.2" if way.startswith("passt") else HOST
            scripts[way] = os.path.join(folder, way)
            with open(scripts[way], "wb") as file:
                text = SCRIPT.format(peer=peer, seconds=options.seconds).encode()
                file.write(text + bytes(-len(text) % 512))
        passt = images.passt_command(make=True)
        boot = (files.bzimage, files.initramfs)
        setup = Setup(*boot, disk, scripts, options.rounds, passt)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pyvmm.emulated_host", "--memory", "1200"),
                *("--disk", disk, "--"),
                *(sys.executable, __file__, "--inside", json.dumps(setup._asdict())),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
    if done.returncode:
        sys.exit(f"the emulated host's part failed with {done.returncode}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def table(found: dict[str, Any]) -> str:
    """Medians and ratios, as Markdown."""
    lines = ["| network | | pyvmm | QEMU microvm | ratio |", "|---|---|---|---|---|"]
    units = {"sent": "Mbit/s sent", "received": "Mbit/s received", "ping": "ms round trip"}
    for way, programs in found.items():
        for key in KEYS:
            ours, theirs = (
                [figures[key] for figures in programs.get(name, ()) if key in figures]
                for name in ("pyvmm", "qemu")
            )
            if ours and theirs:
                a, b = statistics.median(ours), statistics.median(theirs)
                lines.append(f"| {way} | {units[key]} | {a:.2f} | {b:.2f} | {a / b:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(inside(Setup(**json.loads(options.inside)))))
        return
    missing = [name for name in ("iperf3", "ip", "passt") if shutil.which(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}")
    found = outside(options)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file)
    print(table(found))


if __name__ == "__main__":
    main()
