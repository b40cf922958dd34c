"""A busy Linux guest, saved and restored again and again, and many clones of one side by side.

    python benchmarks/linux_snapshots.py [--rounds 20] [--cpus 2 4 1] [--transport mmio pci]
                                         [--nothing-saved] [--clones 50] [--json FILE]

Where there is no KVM for Linux guests, all of it runs in one emulated host, which has the KVM:

    python -m pyvmm.emulated_host --memory 4096 -- python benchmarks/linux_snapshots.py
    python -m pyvmm.emulated_host --memory 8192 -- python benchmarks/linux_snapshots.py --rounds 0 \
        --clones 50

In the guest fio writes and verifies, a stream of TCP goes to the host and back, all vCPUs pass the
time on to one another, and a stream of vsock is open. After each round all of them must have moved
on, with no byte lost, no clock that has gone backwards and no complaint of the kernel's. Each other
snapshot is of what has changed since the one before. The first that is wrong ends it: what is
known of the guest is printed, and the exit code is 1. What the kernel warns of is counted; with
--nothing-saved the same guest works as long without a snapshot, to compare that with.

Each clone has a disk that it writes to and reads back, and no two of them, nor the original, may
have the same random numbers, UUID, address, machine-id or host name. The memory of one is what
smaps calls private, of the monitor with its guest's RAM; what all share is not in it. Every ten
seconds a line tells how far they are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from clones import private_kib

from pyvmm import VM, Disk, images
from pyvmm.control import registry, snapshot_store
from pyvmm.errors import PyvmmError
from pyvmm.host import passt

PATIENCE = 1200.0  # seconds; an emulated host is slow
PIECE = random.Random(9).randbytes(1 << 15)

DISK = """
n=0
while :; do
    fio --name=verified --filename=/root/verified --size=2m --rw=randwrite --bs=4k --direct=1 \
        --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --do_verify=1 \
        --randseed=$n > /run/fio 2>&1 ||
        { echo "fio $n: $(tail -n 5 /run/fio)" > /run/lost.disk; exit 1; }
    n=$((n + 1))
    echo $n > /run/disk.new && mv /run/disk.new /run/disk.round
done
"""
# A connection ends with the machine, or stands still then: what has come must be right.
NET = r"""
use strict;
use IO::Socket::INET;
my ($host, $port, $n) = (@ARGV, 0);
sub tell_it { my ($to, $what) = @_; open(my $f, ">", "$to.new"); print $f "$what\n"; close $f;
    rename("$to.new", $to) }
while (1) {
    my $sent = join "", map { pack "N", int rand 2**32 } 1 .. 16384;
    my $got = "";
    eval {
        local $SIG{ALRM} = sub { die "late\n" };
        alarm 60;
        my $peer = IO::Socket::INET->new(PeerAddr => $host, PeerPort => $port) or die "refused\n";
        local $SIG{PIPE} = "IGNORE";
        print $peer $sent or die "cut\n";
        $peer->flush; shutdown($peer, 1);
        while (sysread($peer, $got, 65536, length $got)) {}
    };
    alarm 0;
    if ($got ne substr($sent, 0, length $got)) { tell_it("/run/lost.net", "stream $n"); exit 1 }
    if (length $got == length $sent) { tell_it("/run/net.round", ++$n) }
    else { select undef, undef, undef, 0.2 }
}
"""
# The time goes from each vCPU to the next one, after a timer has run out there.
CLOCK = r"""
use strict;
use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC CLOCK_REALTIME CLOCK_BOOTTIME);
my $cpus = shift;
my @clocks = (CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_BOOTTIME);
my @pipes = map { pipe(my $r, my $w) or die; [$r, $w] } 1 .. $cpus;
sub tell_it { my ($to, $what) = @_; open(my $f, ">", "$to.new"); print $f "$what\n"; close $f;
    rename("$to.new", $to) }
syswrite $pipes[0][1], pack "d3", 0, 0, 0;
for my $cpu (0 .. $cpus - 1) {
    next if fork;
    system("taskset -cp $cpu $$ > /dev/null") == 0 or die;
    my $n = 0;
    while (sysread($pipes[$cpu][0], my $data, 24) == 24) {
        my @before = unpack "d3", $data;
        my @now = map { clock_gettime($_) } @clocks;
        for (0 .. 2) {
            next if $now[$_] >= $before[$_];
            tell_it("/run/lost.clock", "clock $_ on vCPU $cpu: $now[$_] after $before[$_]");
        }
        tell_it("/run/clock.round", ++$n) if $cpu == 0;
        select undef, undef, undef, 0.02;
        syswrite $pipes[($cpu + 1) % $cpus][1], pack "d3", @now;
    }
    exit;
}
"""
BEGIN = """
cd /run
for one in 'sh disk' "perl net {host} {port}" "perl clock {cpus}"; do
    set -- $one
    echo 0 > /run/$2.round
    setsid $one > /run/$2.said 2>&1 &
done
dmesg -C
"""
# All of them move on, within as long as it takes.
SEEN = """
for one in disk net clock; do
    first=$(cat /run/$one.round)
    i=0
    while [ "$(cat /run/$one.round)" -le "$first" ] && [ $i -lt 2400 ] &&
        ! ls /run/lost.* > /dev/null 2>&1; do
        sleep 0.25
        i=$((i + 1))
    done
    echo "$one=$(cat /run/$one.round) +$(($(cat /run/$one.round) - first))"
done
echo "lost=$(cat /run/lost.* 2> /dev/null | tr '\\n' ' ')"
echo "said=$(cat /run/*.said | tr '\\n' ' ')"
echo "kernel=$(dmesg -l emerg,alert,crit,err,warn | tr '\\n' '|')"
"""
# In a line of the kernel's. It does say that its clocks were looked at late on a busy machine.
BAD_WORDS = ("stuck", "stall", "hung", "blocked for", "BUG", "WARNING", "I/O error", "Call Trace")

CLONES_KERNEL = "6.12"  # it hears that it is a copy
CLONES_PREPARE = """
echo 0123456789abcdef0123456789abcdef > /etc/machine-id
dmesg -C
"""
CLONES_WORK = """
dd if=/dev/zero of=/root/written bs=64k count=16 conv=fsync 2> /dev/null
echo 3 > /proc/sys/vm/drop_caches
echo sum=$(sha256sum < /root/written | cut -d' ' -f1)
echo bad=$(dmesg -l emerg,alert,crit | wc -l)
echo random=$(od -An -vtx1 -N32 /dev/urandom | tr -d ' \\n')
echo uuid=$(cat /proc/sys/kernel/random/uuid)
echo address=$(cat /sys/class/net/eth0/address)
echo machine=$(cat /etc/machine-id)
echo host=$(hostname)
"""
CLONES_OWN = ("random", "uuid", "address", "machine", "host")
CLONES_SUM = sha256(bytes(1 << 20)).hexdigest()


class Wrong(Exception):
    """A guest is not as it should be."""


class Echo(threading.Thread):
    """Sends back what it is sent, by TCP on the loopback address."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]

    def run(self) -> None:
        while True:
            connection, _ = self.server.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    @staticmethod
    def _serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):  # its machine has gone
            connection.settimeout(PATIENCE)
            while data := connection.recv(1 << 16):
                connection.sendall(data)


class Stream(threading.Thread):
    """Sends bytes to `cat` in the guest and compares what comes back, until the machine ends."""

    def __init__(self, vm: VM) -> None:
        super().__init__(daemon=True)
        self._command = vm.popen(["cat"], stdin=True)
        self.echoed = 0
        self.first = threading.Event()
        self.wrong: str | None = None

    def run(self) -> None:
        with suppress(PyvmmError), self._command as command:
            while self.wrong is None:
                left = PIECE[self.echoed % 1000 :]
                back = b""
                while left:
                    left = left[command.write(left) :]
                    if (piece := command.read(PATIENCE)) is None:
                        self.wrong = f"cat has ended after {self.echoed} bytes"
                        return
                    back += piece.data
                expected = PIECE[self.echoed % 1000 :]
                while len(back) < len(expected) and (piece := command.read(PATIENCE)) is not None:
                    back += piece.data
                if back != expected:
                    self.wrong = f"vsock: {self.echoed} bytes came back, and then others"
                self.echoed += len(back)
                self.first.set()
        self.first.set()


def prepared(vm: VM, port: int, cpus: int) -> None:
    vm.wait_ready(PATIENCE)
    for name, text in (("disk", DISK), ("net", NET), ("clock", CLOCK)):
        vm.run(["sh", "-c", f"cat > /run/{name}"], input=text.encode(), check=True)
    begin = BEGIN.format(host=passt.GATEWAY, port=port, cpus=cpus)
    vm.run(["sh", "-c", begin], check=True, timeout=PATIENCE)


def look(vm: VM) -> dict[str, str]:
    """What the guest says of itself. Raises Wrong if that is not what it should be."""
    vm.wait_ready(PATIENCE)
    text = vm.run(["sh", "-c", SEEN], check=True, timeout=PATIENCE).stdout.decode()
    seen = dict(line.split("=", 1) for line in text.splitlines())
    moved = all(not seen[what].endswith("+0") for what in ("disk", "net", "clock"))
    if not moved or seen["lost"] or any(word in seen["kernel"] for word in BAD_WORDS):
        raise Wrong(seen)
    return seen


def kinds_of(lines: str) -> Iterator[str]:
    """What lines of a kernel's say, without their times and other numbers."""
    for line in filter(None, lines.split("|")):
        yield re.sub(r"\d+", "N", line.partition("] ")[2].strip())


def rounds_of(
    count: int, transport: str, cpus: int, options: dict[str, Any], saves: bool
) -> Iterator[dict[str, Any]]:
    """Rounds of one machine: what is known after each. Unless it `saves`, the guest only works.
    Raises Wrong."""
    echo = Echo()
    echo.start()
    name, paused, restored = f"{transport}-{cpus}", [], []
    began = time.monotonic()
    with ExitStack() as closing:
        vm = VM(**options, cpus=cpus, transport=transport, net="user,host", name=f"{name}-0")
        closing.enter_context(vm)
        try:
            prepared(vm, echo.port, cpus)
            print(f"{vm.name}: {look(vm)}", flush=True)
            for number in range(1, count + 1):
                round_began = time.monotonic()
                if saves or number == 1:
                    stream = Stream(vm)
                    stream.start()
                    stream.first.wait(PATIENCE)
                if saves:
                    base = f"{name}-{number - 1}" if number % 2 == 0 else None
                    paused.append(vm.snapshot(f"{name}-{number}", stop=True, diff_of=base))
                    vm.wait(PATIENCE)
                    stream.join(PATIENCE)
                    if stream.wrong or not stream.echoed:
                        raise Wrong(stream.wrong or "nothing came back by vsock")
                    vm.close()
                    begin = time.monotonic()
                    vm = VM.restore(f"{name}-{number}", name=f"{name}-{number}", kvm="host")
                    closing.enter_context(vm)
                    vm.wait_ready(PATIENCE)
                    restored.append(time.monotonic() - begin)
                seen = look(vm)
                took = time.monotonic() - round_began
                print(
                    f"{name}-{number} of {count}: {took:.0f} s, still {sum(paused[-1:]):.2f} s, "
                    f"ready {sum(restored[-1:]):.2f} s, vsock {stream.echoed} bytes, {seen}",
                    flush=True,
                )
                if saves and number > 1:
                    snapshot_store.remove(f"{name}-{number - 1}")
                found = {
                    "rounds": number,
                    "seconds": round(time.monotonic() - began),
                    "warnings": dict(Counter(kinds_of(seen["kernel"]))),
                }
                if saves:
                    found["paused_seconds"] = round(statistics.median(paused), 2)
                    found["ready_seconds"] = round(statistics.median(restored), 2)
                yield found
        except Exception:
            with suppress(PyvmmError, OSError):
                print(f"--- {vm.name}\n{vm.console.tail(200)}\n{vm.messages}", flush=True)
            raise


class Progress(threading.Thread):
    """Tells every ten seconds how many VMs there are, how many have done their work, and what of
    this machine they take."""

    EVERY = 10.0  # seconds

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = 0
        self._over = threading.Event()
        self._began = time.monotonic()

    def run(self) -> None:
        before = self._busy()
        while not self._over.wait(self.EVERY):
            now = self._busy()
            print(
                f"{time.monotonic() - self._began:5.0f} s: {len(registry.running())} VMs, of which "
                f"{self.done} have worked; {(now - before) / self.EVERY:.1f} processors are busy, "
                f"{self._free_mib()} MiB are free",
                flush=True,
            )
            before = now

    def end(self) -> None:
        self._over.set()
        self.join()

    @staticmethod
    def _busy() -> float:
        """Seconds for which processors have worked."""
        user, nice, system, _, _, *others = Path("/proc/stat").read_text().split()[1:9]
        return sum(map(int, (user, nice, system, *others))) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _free_mib() -> int:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) >> 10


def work(vm: VM) -> dict[str, str]:
    """What a guest that does its work right says of itself. Raises Wrong."""
    command = ["sh", "-c", CLONES_WORK]
    text = vm.run(command, check=True, timeout=PATIENCE).stdout.decode()
    said = dict(line.split("=", 1) for line in text.splitlines())
    if said["sum"] != CLONES_SUM or said["bad"] != "0" or not all(map(said.get, CLONES_OWN)):
        raise Wrong(f"{vm.name}: {said}\n{vm.console.tail(40)}")
    return said


def side_by_side(count: int, options: dict[str, Any]) -> dict[str, Any]:
    """So many clones of one guest, all at work. Raises Wrong."""
    progress = Progress()
    with VM(**options, net="user", name="original") as vm:
        progress.start()
        vm.wait_ready(PATIENCE)
        vm.run(["sh", "-c", CLONES_PREPARE], check=True, timeout=PATIENCE)
        print("the original is ready", flush=True)
        begin = time.monotonic()
        copies = vm.clones(count)
        try:
            started = time.monotonic() - begin
            print(f"{count} clones run after {started:.1f} s", flush=True)

            def worked_by(copy: VM) -> dict[str, str]:
                said = work(copy)
                progress.done += 1
                print(f"{time.monotonic() - begin:.1f} s: {said}", flush=True)
                return said

            with ThreadPoolExecutor(count) as pool:
                said = list(pool.map(worked_by, copies))
            worked = time.monotonic() - begin
            if [one["host"] for one in said] != [copy.name for copy in copies]:
                raise Wrong("guests have the names of others")
            private = [private_kib(copy.pid) / 1024 for copy in copies]
            said.append(work(vm))
            for what in CLONES_OWN:
                if len({one[what] for one in said}) != count + 1:
                    raise Wrong(f"some have the same {what}")
        finally:
            progress.end()
            for copy in copies:
                print(f"{copy.name} ends: {copy.messages}", flush=True)
                copy.close()
    return {
        "clones": count,
        "all_run_seconds": round(started, 1),
        "all_worked_seconds": round(worked, 1),
        "private_mib": round(statistics.median(private), 1),
    }


def guest(kernel: str, memory: str) -> dict[str, Any]:
    """Debian with that kernel, whose root disk stays as it is."""
    files = images.artifacts(kernel, "test", make=True)
    return {
        "kernel": files.bzimage,
        "initrd": files.initramfs,
        "disks": [Disk(files.rootfs, snapshot=True)],
        "memory": memory,
        "kvm": "host",
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="of each machine")
    parser.add_argument("--cpus", type=int, nargs="+", default=[2, 4, 1])
    parser.add_argument("--transport", nargs="+", default=["mmio", "pci"])
    parser.add_argument("--nothing-saved", action="store_true", help="the guest only works")
    parser.add_argument("--clones", type=int, default=0, help="side by side, after the rounds")
    parser.add_argument("--memory", default="256M", help="of each guest")
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results: dict[str, Any] = {"memory": given.memory}
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_RUNTIME_DIR"] = os.environ["XDG_STATE_HOME"] = folder
            saves, options = not given.nothing_saved, guest(given.kernel, given.memory)
            for cpus in given.cpus if given.rounds else ():
                for transport in given.transport:
                    for found in rounds_of(given.rounds, transport, cpus, options, saves):
                        results[f"{transport}, {cpus} vCPUs"] = found
            if given.clones:
                results["clones"] = side_by_side(given.clones, guest(CLONES_KERNEL, given.memory))
    finally:  # what was measured before it was stopped, or something was wrong, counts
        print(json.dumps(results, indent=2), flush=True)
        if given.json:
            Path(given.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
