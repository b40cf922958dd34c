"""The parts of the time of a command in a guest: `pyvmm run --rm … -- true`, and Agent.run.

    python benchmarks/run_command.py [--json FILE] [--runs 5]

Everything happens in one emulated KVM host, where it is 10 to 20 times slower than on real KVM; so
beside the seconds stands their share of the boot. The first round fills the page cache and does not
count. A third table has the memory of the monitor of a VM that idles, without guest RAM.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from guest_lab import keep, pyvmm_program

STAGES = ("boot", "command", "power-off")
COMMANDS = 20
IDLE_SECONDS = 3
PATIENCE = 300.0


def inside(runs: int) -> None:
    """Measure, and print the figures as JSON."""
    os.environ["XDG_RUNTIME_DIR"] = "/run"
    run = [*pyvmm_program(), "run", "--kvm=host", "--rm"]
    rounds = []
    for _ in range(runs + 1):
        took, _ = one_run([*run, "debian", "--", "true"])
        # With --debug it tells the stages, and click reads its options, which takes longer.
        command = [*run, "--debug", "debian", "--", "true"]
        _, done = one_run(command)
        stages = re.findall(rb" ([a-z-]+) ([0-9.]+)(?=,|\n)", done.stderr.partition(b"took ")[2])
        if done.returncode or not stages:
            raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]!r}")
        rounds.append({"whole": took, **{name.decode(): float(value) for name, value in stages}})
        print("round", json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"rounds": rounds, "image": time_of_image(), **running([*run, "--agent"])}))


def one_run(command: list[str]) -> tuple[float, subprocess.CompletedProcess[bytes]]:
    """Seconds from start to end, and what it left."""
    begin = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
    return time.monotonic() - begin, done


def time_of_image() -> float:
    """The time that it takes to find an image that is there."""
    from pyvmm import images

    begin = time.monotonic()
    images.machine_image("debian", make=True)
    return time.monotonic() - begin


def running(command: list[str]) -> dict[str, Any]:
    """The cost of commands on a VM that runs, and the memory of its monitor while it idles."""
    from pyvmm.agent import PORT, Agent
    from pyvmm.control.client import connect_vsock

    process = subprocess.Popen(
        [*command, "--name=idle", "--cmdline=pyvmm.exec=agent", "debian"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        connecting: list[float] = []

        def connect() -> Any:
            begin = time.monotonic()
            made = connect_vsock("idle", PORT)
            connecting.append(time.monotonic() - begin)
            return made

        while not os.path.exists("/run/pyvmm/idle.sock"):
            time.sleep(0.1)
        agent = Agent(connect)
        agent.wait_ready(PATIENCE)
        agent.run(["true"], check=True)
        connecting.clear()
        times = []
        for _ in range(COMMANDS):
            begin = time.monotonic()
            agent.run(["true"], check=True)
            times.append(time.monotonic() - begin)
        time.sleep(IDLE_SECONDS)
        return {"commands": times, "connecting": connecting, "memory": memory(process.pid)}
    finally:
        process.kill()
        process.wait()


def memory(pid: int) -> dict[str, int]:
    """Private dirty and proportional set size of a process in KiB, without guest memory."""
    totals = {"Private_Dirty": 0, "Pss": 0}
    counts = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = "memfd:" not in line
        elif counts and key in totals:
            totals[key] += int(rest.split()[0])
    return totals


def measure(runs: int) -> dict[str, Any]:
    """Start the emulated host and run `inside` in it. Raises PyvmmError or RuntimeError."""
    import compileall

    import pyvmm
    from pyvmm import images
    from pyvmm.emulated_host import EmulatedHost, EmulatedHostSpec
    from pyvmm.emulated_host.find import find_image

    compileall.compile_dir(os.path.dirname(pyvmm.__file__), quiet=1)
    images.machine_image("debian", make=True)
    argv = [sys.executable, os.path.abspath(__file__), "--inside", str(runs)]
    reader, writer = os.pipe()
    spec = EmulatedHostSpec(find_image(make=True), memory_mib=2048)
    host = EmulatedHost(spec, argv, stdin=None, stdout=writer)
    host.start()
    code = host.wait()
    os.close(writer)
    with open(reader) as file:
        said = file.read()
    if code:
        raise RuntimeError(f"the measurement in the emulated host ended with {code}")
    return summary(json.loads(said))


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians; the warm-up round does not count."""
    rounds = found["rounds"][1:]
    run = {name: statistics.median(row[name] for row in rounds) for name in ("whole", *STAGES)}
    run["start"] = run["whole"] - sum(run[name] for name in STAGES)
    whole = statistics.median(found["commands"])
    connecting = statistics.median(found["connecting"])
    return {
        "run": run,
        "image": found["image"],
        "command": {"whole": whole, "connection": connecting, "command": whole - connecting},
        "memory_kib": found["memory"],
        "rounds": rounds,
    }


def table(result: dict[str, Any]) -> str:
    """`result` as Markdown tables."""
    run, command, memory = result["run"], result["command"], result["memory_kib"]
    boot = run["boot"]
    rows = [
        ("`pyvmm run --rm debian -- true`", run["whole"]),
        ("Python, options, image; the monitor's end", run["start"]),
        ("… of it, to find the image", result["image"]),
        ("boot, until the agent answers", boot),
        ("the command", run["command"]),
        ("power-off", run["power-off"]),
        ('`agent.run(["true"])`, guest running', command["whole"]),
        ("… of it, the connection", command["connection"]),
        ("… of it, the command", command["command"]),
    ]
    lines = ["| | seconds | of the boot |", "|---|---|---|"]
    lines += [f"| {name} | {value:.3f} | {value / boot:.3f} |" for name, value in rows]
    lines += [
        "",
        f"The monitor of an idle VM, without guest RAM: {memory['Private_Dirty'] / 1024:.1f} MiB "
        f"private dirty, {memory['Pss'] / 1024:.1f} MiB PSS",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        inside(options.inside)
        return 0
    result = measure(options.runs)
    print(table(result))
    keep(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
