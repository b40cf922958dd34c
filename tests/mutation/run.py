"""`make mutants`: which small faults in the core would no test notice?

    make mutants                                  # ten minutes of mutants, in an order of its own
    make mutants SEED=7 SECONDS=3600
    make mutants ONLY=queue/chain SAMPLE=50       # of the modules whose path has this in it
    python tests/mutation/run.py --only transport/ --report /tmp/survivors.toml

Each mutant is a process that imports the faulty module from memory. It runs those tests of that
module (targets.py) that reach the faulty statement (reach.py), until one fails. A survivor that
accepted.toml does not list is a failure.

Faulty code may do anything, so all of it runs in namespaces of its own (unshare of util-linux): it
sees no process but its own, cannot write to the checkout nor to the images that were built, and has
a home that goes away, with those images in it: program images are not made for mutants. A mutant
that hangs, or takes more memory than it may have, counts as noticed.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutation import reach, survivors, targets
from mutation.mutate import Mutant, mutants, mutated

ROOT = Path(__file__).parents[2]
INSIDE = "PYVMM_MUTATION_INSIDE"
IMAGES = "PYVMM_MUTATION_IMAGES"  # the folder of the images that were built
MEMORY = 3 << 30  # bytes that a mutant's process may have; looked at while it runs
TEST_SECONDS = 20  # of a single test, and five times what it takes as it is
LOOK = 0.05  # seconds between looks at those that run


# --- one mutant -----------------------------------------------------------------------------------


class _FaultyLoader(importlib.machinery.SourceFileLoader):
    """Loads a module with a fault, from memory."""

    def __init__(self, name: str, path: str, mutant: Mutant) -> None:
        super().__init__(name, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        source = Path(self.path).read_text()
        return compile(mutated(source, self._mutant), self.path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant
        self._name = mutant.file.removesuffix(".py").replace("/", ".")

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        file = str(ROOT / self._mutant.file)
        loader = _FaultyLoader(fullname, file, self._mutant)
        return importlib.util.spec_from_file_location(fullname, file, loader=loader)


@dataclass
class Try:
    """A mutant's process. `mutant` is None for the code as it is."""

    mutant: Mutant | None
    tests: tuple[str, ...]
    pid: int
    folder: Path
    deadline: float


def begin(
    mutant: Mutant | None,
    tests: tuple[str, ...],
    seconds: float,
    chosen: Sequence[reach.Test] | None = None,
    record: Sequence[str] = (),
) -> Try:
    """Run these files of tests, of them those `chosen`, and `record` what they reach."""
    folder = Path(tempfile.mkdtemp(prefix="m"))
    pid = os.fork()
    if pid == 0:
        try:
            code = _in_child(mutant, tests, folder, chosen, record)
        except BaseException:
            code = 3
        os._exit(code)
    return Try(mutant, tests, pid, folder, time.monotonic() + seconds)


def _in_child(
    mutant: Mutant | None,
    tests: tuple[str, ...],
    folder: Path,
    chosen: Sequence[reach.Test] | None,
    record: Sequence[str],
) -> int:
    os.setsid()
    out = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    null = os.open("/dev/null", os.O_RDONLY)
    for fd, onto in ((null, 0), (out, 1), (out, 2)):
        os.dup2(fd, onto)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = str(folder)
    if IMAGES in os.environ:
        (folder / "pyvmm").mkdir()
        (folder / "pyvmm" / "images").symlink_to(os.environ[IMAGES])
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    if mutant is not None:
        sys.meta_path.insert(0, _Finder(mutant))
    import pytest

    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    options += ["--assert=plain"]  # rewriting has an import of its own, of the module as it is
    options += ["--hypothesis-seed=0", f"--basetemp={folder / 't'}", "-o"]
    plugins: list[object] = []
    if record:
        options.append("timeout=600")
        plugins.append(recorder := reach.Recorder(ROOT, record))
    else:
        slowest = max((test.seconds for test in chosen or ()), default=0)
        options.append(f"timeout={TEST_SECONDS + 5 * slowest:.0f}")
    if chosen is not None:
        plugins.append(reach.Choice(chosen))
        files = {test.name.partition("::")[0] for test in chosen}
        tests = tuple(test for test in tests if test in files)
    # One file after the other: most mutants do not live to see the second one.
    for test in tests:
        if code := pytest.main([*options, test], plugins):
            return int(code)
    if record:
        recorder.save(folder / "reach")
    return 0


def end(running: Try) -> None:
    """Have nothing of it left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    shutil.rmtree(running.folder, ignore_errors=True)


def is_too_large(pid: int) -> bool:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return False
    return pages * resource.getpagesize() > MEMORY


# --- all of them ----------------------------------------------------------------------------------


class Runner:
    """Tries mutants, `jobs` at a time."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.running: dict[int, Try] = {}
        self.tests: dict[tuple[str, ...], list[reach.Test]] = {}  # as they are without a fault

    def start(self, mutant: Mutant | None, tests: tuple[str, ...]) -> None:
        chosen = None
        if mutant is not None and tests in self.tests:
            measured = self.tests[tests]
            # What no test reaches may have been executed by the import.
            chosen = [test for test in measured if test.reaches(mutant)] or measured
        seconds = sum(test.seconds for test in chosen) if chosen is not None else 200
        self._add(begin(mutant, tests, 3 * seconds + 4 * TEST_SECONDS, chosen))

    def _add(self, started: Try) -> None:
        self.running[started.pid] = started

    def next_end(self) -> tuple[Try, bool, str]:
        """Wait for one: it, whether its tests passed, and what they printed last."""
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            done = self.running.pop(pid, None) if pid else None  # else an orphan of some test
            if done is not None:
                passed = status == 0
                lines = (done.folder / "output").read_text(errors="replace").splitlines()
                if (done.folder / "reach").exists():
                    self.tests[done.tests] = reach.load(done.folder / "reach")
                end(done)
                return done, passed, "\n".join(lines[-15:])
            if pid:
                continue
            for one in self.running.values():
                if time.monotonic() > one.deadline or is_too_large(one.pid):
                    os.killpg(one.pid, signal.SIGKILL)
            time.sleep(LOOK)

    def stop(self) -> None:
        for one in self.running.values():
            end(one)

    def measure(self, files: Iterable[str]) -> None:
        """Run the tests of these modules on the code as it is. Exits if they fail."""
        left: dict[tuple[str, ...], list[str]] = {}
        for file in files:
            left.setdefault(targets.tests_of(file), []).append(file)
        while left or self.running:
            while left and len(self.running) < self.jobs:
                tests, record = left.popitem()
                self._add(begin(None, tests, 2400, record=record))
            done, passed, output = self.next_end()
            if not passed:
                self.stop()
                sys.exit(f"without a fault these fail: {' '.join(done.tests)}\n{output}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", help="modules with this in their path")
    parser.add_argument("--sample", type=int, help="so many mutants")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--seconds", type=float, help="begin no mutant after this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--nice", type=int, default=10, help="how far others go first")
    parser.add_argument("--report", type=Path, help="write survivors there, as accepted.toml is")
    parser.add_argument("--again", type=Path, help="only those in a --report, or in accepted.toml")
    options = parser.parse_args()
    if INSIDE not in os.environ:
        return _enter(options.nice)
    _make_read_only()

    listed = survivors.load()
    chosen = _choose(options.only)
    if options.again:
        again = survivors.load(options.again)
        chosen = [mutant for mutant in chosen if mutant.key in again]
    random.Random(options.seed).shuffle(chosen)
    if options.sample:
        del chosen[options.sample :]
    end_time = time.monotonic() + options.seconds if options.seconds else float("inf")
    print(f"seed {options.seed}: {len(chosen)} mutants, {options.jobs} at a time", flush=True)
    return _try_all(chosen, options.jobs, end_time, listed, options.report)


def _choose(only: Sequence[str] | None) -> list[Mutant]:
    files = [file for file in targets.files(ROOT) if not only or any(o in file for o in only)]
    return [mutant for file in files for mutant in mutants(file, (ROOT / file).read_text())]


def _try_all(
    chosen: list[Mutant],
    jobs: int,
    end_time: float,
    listed: dict[survivors.Key, survivors.Entry],
    report: Path | None,
) -> int:
    runner = Runner(jobs)
    tried: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    news = count = 0
    told = time.monotonic()
    queue = chosen[::-1]
    runner.measure(sorted({mutant.file for mutant in chosen}))
    print("the tests pass", flush=True)
    try:
        while (queue and time.monotonic() < end_time) or runner.running:
            while queue and len(runner.running) < jobs and time.monotonic() < end_time:
                mutant = queue.pop()
                runner.start(mutant, targets.tests_of(mutant.file))
            done, passed, _ = runner.next_end()
            assert done.mutant is not None
            mutant = done.mutant
            count += 1
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"… {count} of {len(chosen)}", flush=True)
            area = targets.area_of(mutant.file)
            tried[area] += 1
            entry = listed.get(mutant.key)
            if not passed:
                if entry is not None:
                    print(f"noticed, though listed as a survivor: {mutant}", flush=True)
                continue
            if entry is not None and entry.reason:
                accepted[area] += 1
                continue
            survived[area] += 1
            if entry is None:
                news += 1
                print(f"survives: {mutant}", flush=True)
                if report is not None:
                    with report.open("a") as file:
                        file.write(survivors.as_toml(mutant))
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        runner.stop()
    for area in sorted(tried):
        counted = tried[area] - accepted[area]
        score = 100 * (counted - survived[area]) / counted if counted else 100.0
        print(
            f"{area}: {tried[area]} tried, {accepted[area]} accepted, {survived[area]} more"
            f" survived: {score:.1f} % of {counted} noticed"
        )
    return 1 if news else 0


# --- where faulty code can do no harm -------------------------------------------------------------


def _enter(nice: int) -> int:
    """Run this program again in namespaces of its own."""
    sys.path.insert(0, str(ROOT))
    from pyvmm.host import user_cache  # not in the process that the mutants are forked from

    images = Path(user_cache.folder(), "images")
    images.mkdir(parents=True, exist_ok=True)
    for below in ("pyvmm", "tests"):
        compileall.compile_dir(ROOT / below, quiet=1)  # once; from then on nothing is written there
    who = [] if os.geteuid() == 0 else ["--map-root-user"]
    flags = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *who]
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        environment = {
            **os.environ,
            INSIDE: folder,
            IMAGES: str(images),
            "TMPDIR": folder,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = ["unshare", *flags, sys.executable, *sys.argv]
        try:
            return subprocess.run(["nice", f"-n{nice}", *command], env=environment).returncode
        except KeyboardInterrupt:
            return 130


def _make_read_only() -> None:
    for place in (str(ROOT), os.environ[IMAGES]):
        for command in (["--bind", place, place], ["-o", "remount,bind,ro", place]):
            subprocess.run(["mount", *command], check=True)
    # What every mutant imports anyway, once for all of them.
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
