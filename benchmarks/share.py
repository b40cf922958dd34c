"""A source tree shared with a guest: pyvmm's `--share` and QEMU's microvm on the same virtiofsd.

    python benchmarks/share.py [--json FILE] [--files 80000 | --source DIR] [--rounds 3]
                               [--transport pci]

`git status`, `find`, `tar`, a sequential read and random reads of 4 KiB, each with nothing of it in
the guest's caches. Both monitors run in one emulated KVM host at the same time, with the same
kernel, memory and vCPUs, and the tree on tmpfs; only one has work at a time. What is in there is 10
to 20 times slower than on real KVM, so the ratios are what counts. 80,000 files take most of an
hour; `--files 8000` a tenth. A part of it: `--loads "git status,find"`. With --source the files are
those of that directory, such as a kernel's source, which has as many.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import guest_disk
import guest_lab
from guest_lab import Guest, Machine

TAG, PLACE = "tree", "/mnt"
SHARED = "/run/shared"  # in the emulated host
TOOLS = "tools"
LARGE_MIB = 64
FILES_IN_FOLDER = 20
PATIENCE = 1200.0  # seconds for one load
READS = 3000
MONITORS = ("pyvmm", "qemu")
WANTED = 1.0


class Load(NamedTuple):
    """What the guest's shell runs; what it prints is the same on both monitors."""

    name: str
    command: str
    by_fio: bool = False


LOADS = (
    Load("git status", f"cd {PLACE}/{TAG} && /run/git status --porcelain | wc -l"),
    Load("find", f"find {PLACE}/{TAG} -type f | wc -l"),
    Load("tar", f"tar -C {PLACE} -cf - {TAG} | wc -c"),
    Load("sequential read", f"cat {PLACE}/large | wc -c"),
    Load(
        "random 4k read",
        # without O_DIRECT, which tmpfs has since Linux 6.6 only; the hint turns read-ahead off
        f"fio --name=l --filename={PLACE}/large --rw=randread --bs=4k --ioengine=psync --thread"
        f" --fadvise_hint=random --norandommap --number_ios={READS} --minimal --terse-version=3",
        by_fio=True,
    ),
)
# git of this machine, which the guest's image does not have, with the libraries that it needs.
INSTALL = (
    f"cp -r {PLACE}/{TOOLS} /run/{TOOLS}; printf '#!/bin/sh\\nexec /run/{TOOLS}/loader"
    f' --library-path /run/{TOOLS} /run/{TOOLS}/git "$@"\\n\' > /run/git; chmod +x /run/git;'
    " export HOME=/root; /run/git config --global --add safe.directory '*'; echo installed"
)


class Setup(TypedDict):
    """The settings for the part inside the emulated host, as JSON."""

    kernel: str
    initrd: str
    root: str
    script: str
    archive: str
    virtiofsd: list[str]
    rounds: int
    transport: str
    loads: list[str]


def make_tree(folder: Path, files: int, source: str) -> None:
    """A git repository of `files` files, as large as those of a source tree are, or of those in
    `source`, with one commit; a large file, and git itself."""
    tree = folder / TAG
    if source:
        shutil.copytree(source, tree, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    else:
        write_sources(tree, files)
    git = ["git", "-C", str(tree), "-c", "user.name=b", "-c", "user.email=b@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    # Files that were copied are the same, though their inodes are not.
    subprocess.run([*git, "config", "core.checkStat", "minimal"], check=True)
    subprocess.run([*git, "config", "core.trustctime", "false"], check=True)
    # One that a commit has begun in the background would not let ours begin.
    subprocess.run([*git, "config", "gc.auto", "0"], check=True)
    subprocess.run([*git, "add", "--force", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "all"], check=True)
    subprocess.run([*git, "-c", "pack.window=0", "gc", "--quiet"], check=True)
    guest_lab.prepare_disk(str(folder / "large"), LARGE_MIB)
    tools = folder / TOOLS
    tools.mkdir()
    program = shutil.which("git")
    assert program is not None
    shutil.copy(program, tools / "git")
    told = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    for line in told.splitlines():
        library = next((word for word in line.split() if word.startswith("/")), "")
        if library:
            name = "loader" if "ld-linux" in library else os.path.basename(library)
            shutil.copy(library, tools / name)


def write_sources(tree: Path, files: int) -> None:
    """`files` files of random words."""
    chance = random.Random(1)
    words = [chance.randbytes(chance.randrange(1, 5)).hex() for _ in range(2000)]
    for number in range(files):
        at = tree / f"part{number // 2000:03}" / f"folder{number // FILES_IN_FOLDER % 100:02}"
        if number % FILES_IN_FOLDER == 0:
            at.mkdir(parents=True)
        size = min(30_000, int(chance.lognormvariate(7.5, 1.0)))
        text = " ".join(chance.choices(words, k=40)) + "\n"
        (at / f"source{number:06}.c").write_text((text * (size // len(text) + 1))[:size])


def share_word() -> str:
    """What tells the guest's initramfs where to mount it (guest-images/initramfs/init)."""
    return f"pyvmm.share={TAG}:rw:{base64.b64encode(PLACE.encode()).decode()}"


def command_of(name: str, setup: Setup) -> list[str]:
    """The monitor called `name`."""
    files = (setup["kernel"], setup["initrd"], setup["root"], setup["script"])
    machine = Machine(*files, disk="", memory_mib=768)
    if name == "pyvmm":
        options = [f"--transport={setup['transport']}", f"--share={SHARED}:{PLACE},tag={TAG}"]
        return guest_lab.pyvmm_command(machine, [sys.executable], options)
    command = guest_lab.qemu_command(machine, "threads", setup["transport"])
    at = command.index("-append") + 1
    command[at] = f"{command[at]} {share_word()}"
    *words, device = guest_lab.qemu_front_end(
        machine, "fs", setup["transport"], "/run/virtiofsd.sock"
    )
    return [*command, *words, f"{device},tag={TAG}"]


@contextmanager
def virtiofsd_for_qemu(command: Sequence[str]) -> Iterator[None]:
    """virtiofsd with the options that pyvmm gives its own (pyvmm/host/virtiofsd.py)."""
    options = ["--socket-path=/run/virtiofsd.sock", f"--shared-dir={SHARED}", "--cache=auto"]
    options += ["--allow-direct-io", "--xattr", "--log-level=warn", "--modcaps=-mknod"]
    process = subprocess.Popen([*command, *options, "--sandbox=namespace"])
    try:
        for _ in range(600):
            if os.path.exists("/run/virtiofsd.sock"):
                break
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def inside(setup: Setup) -> dict[str, Any]:
    """Runs in the emulated host: both monitors, load by load."""
    guest_lab.mount_debugfs()
    os.mkdir(SHARED)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90%,mode=755", "tmpfs", SHARED], check=True)
    tell(f"unpacking {setup['archive']}")
    subprocess.run(["tar", "-C", SHARED, "-xf", setup["archive"]], check=True)
    found: dict[str, dict[str, list[float]]] = {}
    with virtiofsd_for_qemu(setup["virtiofsd"]):
        commands = {name: command_of(name, setup) for name in MONITORS}
        with guest_lab.guests(commands) as guests:
            for name, guest in guests.items():
                tell(f"{name}: {guest.order(INSTALL).text}")
            for load in LOADS:
                if load.name not in setup["loads"]:
                    continue
                figures = found[load.name] = {name: [] for name in MONITORS}
                answers = set()
                for number in range(setup["rounds"]):
                    # Whoever comes first in a round, so that none always follows the other.
                    for name in sorted(MONITORS, reverse=bool(number % 2)):
                        seconds, answer = measure(guests[name], load)
                        tell(f"{load.name} {name} {seconds:.2f} s")
                        figures[name].append(seconds)
                        answers.add(answer)
                if len(answers) > 1:
                    raise RuntimeError(f"{load.name}: not the same answers: {answers}")
    return found


def measure(guest: Guest, load: Load) -> tuple[float, str]:
    """Seconds, and what was printed, of `load` in a guest with nothing in its caches."""
    guest.order("sync; echo 3 > /proc/sys/vm/drop_caches")
    answer = guest.order(load.command, PATIENCE)
    line = answer.text.splitlines()[-1] if answer.text else ""
    if load.by_fio:  # without what fio needs to start
        return READS / guest_disk.read_terse(line, write=False).rate, ""
    if not line.strip().isdecimal():
        raise RuntimeError(f"{load.name}: {answer.text[-500:]}")
    return answer.seconds, line.strip()


def pages(path: Path) -> int:
    """The pages of 4 KiB that a file's content takes."""
    return -(-path.lstat().st_size // 4096)


def tell(line: str) -> None:
    """Show that it goes on."""
    print(line, file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    """Medians, and QEMU's seconds divided by ours, as a Markdown table."""
    lines = ["| | pyvmm, s | QEMU, s | times as fast | each round | wanted |"]
    lines.append("|---|---|---|---|---|---|")
    for name, seconds in result["loads"].items():
        ours, theirs = (statistics.median(seconds[monitor]) for monitor in MONITORS)
        pairs = zip(seconds["pyvmm"], seconds["qemu"], strict=True)
        each = " ".join(f"{other / one:.2f}" for one, other in pairs)
        ratio = f"{theirs / ours:.2f} | {each} | {WANTED:.1f}"
        lines.append(f"| {name} | {ours:.2f} | {theirs:.2f} | {ratio} |")
    return "\n".join(lines)


def outside(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare the images and the tree, and start the emulated host."""
    from pyvmm import images

    files = images.artifacts(options.kernel, "test", make=True)
    with tempfile.TemporaryDirectory() as folder:
        script, archive = os.path.join(folder, "script"), os.path.join(folder, "tree.tar")
        guest_lab.write_script(script)
        tree = Path(folder) / "tree"
        tell(f"making a tree of {options.source or f'{options.files} files'}")
        make_tree(tree, options.files, options.source)
        count = sum(len(names) for at, _, names in os.walk(tree / TAG) if "/.git" not in at)
        # In tmpfs each file takes whole pages, and an inode.
        memory = 3072 + count // 256 + sum(map(pages, tree.rglob("*"))) // 256
        subprocess.run(["tar", "-C", tree, "--format=posix", "-cf", archive, "."], check=True)
        shutil.rmtree(tree)
        setup = Setup(
            kernel=files.bzimage,
            initrd=files.initramfs,
            root=files.rootfs,
            script=script,
            archive=archive,
            virtiofsd=images.virtiofsd_command(make=True),
            rounds=options.rounds,
            transport=options.transport,
            loads=options.loads.split(","),
        )
        found = guest_lab.run_inside(
            __file__, dict(setup), memory_mib=memory, timeout=options.timeout
        )
    return {
        "kernel": options.kernel,
        "files": count,
        "transport": options.transport,
        "loads": found,
    }


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--files", type=int, default=80_000)
    parser.add_argument("--source", default="", metavar="DIR")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transport", choices=("pci", "mmio"), default="pci")
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--timeout", type=float, default=7200.0, metavar="SECONDS")
    parser.add_argument(
        "--loads",
        default=",".join(load.name for load in LOADS),
        help="those to run, by name, with commas between",
    )
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments if arguments is None else list(arguments))
    if options.inside:
        print(json.dumps(inside(json.loads(options.inside))))
        return 0
    missing = [name for name in ("git", "tar", "ldd") if shutil.which(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}")
    result = outside(options)
    print(table(result))
    guest_lab.keep(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
