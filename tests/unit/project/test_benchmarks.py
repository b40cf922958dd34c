"""The benchmarks' own arithmetic, and what becomes of a part that hangs or fails."""

from __future__ import annotations

import importlib
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
# A line of fio 3.33's terse output, of a run of reads: 419 requests a second, 421 ms.
TERSE = (
    "3;fio-3.33;l;0;0;704;1676;419;420;3;77;10.7;8.2;905;9611;2350.1;1411.9;"
    "1.000000%=1044;5.000000%=1122;10.000000%=1187;20.000000%=1302;30.000000%=1417;"
    "40.000000%=1548;50.000000%=1728;60.000000%=2057;70.000000%=2441;80.000000%=3162;"
    "90.000000%=4292;95.000000%=5210;99.000000%=7634;99.500000%=8454;99.900000%=9633;"
    "99.950000%=9633;99.990000%=9633;0%=0;0%=0;0%=0;912;9650;2361.0;1413.2;0;0;0.0%;0.0;0.0;"
    "0;0;0;0;0;0;0.0;0.0;0;0;0.0;0.0;" + 20 * "0%=0;" + "0;0;0.0;0.0;0;0;0.0%;0.0;0.0;2;5;80;0;60"
)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if (
            getattr(sys.modules[name], "__file__", None)
            and BENCHMARKS in Path(str(sys.modules[name].__file__)).parents
        ):
            del sys.modules[name]


def test_a_guest_that_asks_for_something_is_waited_for_and_one_that_stands_still_is_not(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = benchmark("guest_lab")
    monkeypatch.setattr(lab, "_LOOKS_EACH", 0.02)
    # In one piece, also where PYTHONUNBUFFERED has print write each of its parts by itself.
    says = "import os; input(); os.write(1, b'begin lab-doneend')"
    command = [sys.executable, "-c", says]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as monitor:
        assert monitor.stdin is not None
        looks = 0

        def asks_each_time(pid: int) -> dict[str, int]:
            nonlocal looks
            looks += 1
            if looks == 20:
                monitor.stdin.write(b"\n")
                monitor.stdin.flush()
            return {"io_exits": 5, "mmio_exits": looks}

        monkeypatch.setattr(lab, "kvm_counts", asks_each_time)
        assert lab.read_until(monitor, b"lab-done", patience=0.05) == (b"begin ", b"end")
        with pytest.raises(RuntimeError, match="no lab-done, it has ended; its output:\nend"):
            lab.read_until(monitor, b"lab-done", b"end", patience=0.05)
    assert looks >= 20
    monkeypatch.setattr(lab, "kvm_counts", lambda pid: {"io_exits": 5})
    with subprocess.Popen(["sleep", "1000"], **pipes) as still:
        try:
            with pytest.raises(RuntimeError, match=r"sleep: no lab-done, it stands still for 0.05"):
                lab.read_until(still, b"lab-done", patience=0.05)
        finally:
            still.kill()


@pytest.mark.parametrize("name", ["boot", "clones", "run_command", "start"])
def test_a_python_that_pyvmm_is_not_installed_for_runs_it_as_a_module(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    module = benchmark(name)
    program = getattr(module, "guest_lab", module).pyvmm_program
    installed = tmp_path / "pyvmm"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    assert program() == [sys.executable, "-m", "pyvmm"]
    installed.touch()
    assert program() == [str(installed)]


@pytest.mark.skipif(not shutil.which("cc") or not shutil.which("readelf"), reason="needs cc")
def test_libraries_are_found_where_what_needs_them_looks(benchmark: Any, tmp_path: Path) -> None:
    """fio's are in several folders."""
    inner, outer = tmp_path / "usr/lib/own/libinner.so", tmp_path / "usr/lib/libouter.so"
    inner.parent.mkdir(parents=True)
    empty = tmp_path / "empty.c"
    empty.touch()
    build = ["cc", "-nostdlib", "-Wl,--no-as-needed", "-shared", empty]
    subprocess.run([*build, "-o", inner, f"-Wl,-soname,{inner.name}"], check=True)
    path = "-Wl,--enable-new-dtags,-rpath,/usr/lib/own"
    subprocess.run([*build, "-o", outer, inner, path], check=True)
    found = benchmark("guest_lab").with_libraries(tmp_path, "usr/lib/libouter.so")
    assert found == {"usr/lib/libouter.so", "usr/lib/own/libinner.so"}


def test_fio_terse_line_is_read(benchmark: Any) -> None:
    found = benchmark("guest_disk").read_terse(TERSE, write=False)
    assert found.rate == 419
    assert found.requests == pytest.approx(419 * 0.42)
    assert (found.p50, found.p99) == (1728, 7634)


@pytest.mark.parametrize("line", ["fio: cannot open /dev/vdc", TERSE.replace(";l;0;0;", ";l;0;5;")])
def test_fio_that_failed_is_an_error(benchmark: Any, line: str) -> None:
    with pytest.raises(RuntimeError, match="fio failed"):
        benchmark("guest_disk").read_terse(line, write=False)


def test_ratios_are_to_the_qemus_of_both_transports(benchmark: Any) -> None:
    guest_disk = benchmark("guest_disk")
    counts = dict.fromkeys(guest_disk.COUNTS, 1.0)

    def runs(*rates: float) -> list[Any]:
        return [guest_disk.Run(rate=r, p99_us=1, requests=r, counts=counts) for r in rates]

    load = guest_disk.LOADS[0].name
    programs = {
        "pyvmm pci": runs(90, 100, 120),
        "pyvmm mmio": runs(50, 60, 55),
        "qemu threads pci": runs(100, 80, 80),
        "qemu io_uring mmio": runs(50, 60, 110),
    }
    [row] = guest_disk.summary({load: programs})["rows"]
    assert [(pair["ours"], pair["theirs"], pair["wanted"]) for pair in row["against"]] == [
        ("pyvmm pci", "qemu threads pci", 1.0),
        ("pyvmm pci", "qemu io_uring mmio", 1.2),
        ("pyvmm mmio", "qemu io_uring mmio", 1.0),
    ]
    assert row["against"][0]["ratio"] == 1.25
    assert row["against"][0]["ratios"] == [0.9, 1.25, 1.5]
    line = f"| {load} | pyvmm pci | 100 | qemu threads pci | 80 | 1.25 | 0.90 1.25 1.50 | 1.0 |"
    assert line in guest_disk.table({"rows": [row]})


def test_only_the_better_qemu_of_a_transport_goes_on_after_the_warm_up(benchmark: Any) -> None:
    guest_disk = benchmark("guest_disk")
    rates = {"pyvmm pci": 1.0, "qemu threads pci": 2.0, "qemu io_uring pci": 3.0}
    rates |= {"qemu threads mmio": 5.0, "qemu io_uring mmio": 4.0}
    said: list[str] = []

    def one(name: str) -> Any:
        said.append(name)
        return guest_disk.Run(rate=rates[name], p99_us=1, requests=1, counts={})

    found = guest_disk.in_turn(list(rates), one, 2)
    going_on = ["pyvmm pci", "qemu io_uring pci", "qemu threads mmio"]
    assert {name: len(runs) for name, runs in found.items()} == dict.fromkeys(going_on, 2)
    # In alternating order.
    assert said[5:] == [*going_on, *reversed(going_on)]


def test_boots_are_compared_with_the_faster_qemu_of_their_transport(benchmark: Any) -> None:
    boot = benchmark("boot")
    seconds = {
        "pyvmm mmio": [9, 2, 3, 4],
        "qemu mmio": [9, 2, 2, 2],
        "qemu plain mmio": [1, 1.5, 1.5, 1.5],
        "pyvmm pci": [9, 1, 1, 1],
    }
    boots = {name: [boot.Boot(value, 1.0) for value in row] for name, row in seconds.items()}
    result = boot.summary(boots, kernel="6.1", cpus=1)
    ratio = {"best_qemu": "qemu plain mmio", "median": 2.0, "busy": 1.0, "each": [1.333, 2, 2.667]}
    assert result["ratios"] == {"mmio": ratio}
    assert "pyvmm / qemu plain mmio, mmio: 2.00 by the clock, 1.00 in" in boot.table(result)


def test_latency_ratio_is_that_of_the_rounds(benchmark: Any) -> None:
    rounds = {
        "quiet": [{"p50": 10, "p99": 20}, {"p50": 10, "p99": 40}, {"p50": 12, "p99": 20}],
        "busy": [{"p50": 11, "p99": 30}, {"p50": 11, "p99": 40}, {"p50": 11, "p99": 80}],
    }
    row = benchmark("disk_latency").summary("name", rounds)
    assert row["ratios"] == [1.5, 1.0, 4.0]
    assert (row["ratio"], row["quiet_p99_us"], row["busy_p99_us"]) == (1.5, 20, 40)


# --- run.py ---------------------------------------------------------------------------------------


def part(run: Any, tmp_path: Path, script: str, *, limit: int = 30, lacks: str = "") -> Any:
    """A part of a benchmarks folder of its own, which is `script`."""
    (tmp_path / "mine.py").write_text(script)
    run.HERE = tmp_path
    return run.Part("mine", "Mine", limit, (), lambda: lacks)


def test_part_that_ran(benchmark: Any, tmp_path: Path) -> None:
    run = benchmark("run")
    script = "import sys; print('| a |'); open(sys.argv[2], 'w').write('{\"rows\": [1]}')"
    outcome = run.run_part(part(run, tmp_path, script), quick=False)
    assert outcome == run.Measured({"rows": [1]}, "| a |")


def test_part_that_fails_is_not_a_skipped_one(benchmark: Any, tmp_path: Path) -> None:
    run = benchmark("run")
    assert run.run_part(part(run, tmp_path, "import sys; sys.exit(3)"), quick=False) == run.Failed(
        3
    )
    lacking = part(run, tmp_path, "", lacks="there is no gcc")
    assert run.run_part(lacking, quick=False) == run.Skipped("there is no gcc")


def test_part_over_its_limit_is_ended_with_all_it_started(benchmark: Any, tmp_path: Path) -> None:
    run = benchmark("run")
    # A grandchild holds the write end of a FIFO: end of file says that it has gone.
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    script = (
        "import subprocess, time\n"
        f"subprocess.Popen(['sh', '-c', 'exec sleep 600 > {fifo}'])\n"
        "time.sleep(600)\n"
    )
    outcome = run.run_part(part(run, tmp_path, script, limit=3), quick=False)
    assert outcome == run.Skipped("it took longer than its limit of 3 s")
    ended, _, _ = select.select([reader], [], [], 30)
    assert ended and os.read(reader, 1) == b""
    os.close(reader)


def test_results_of_other_parts_are_kept(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = benchmark("run")
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    about = run.machine()
    old = {"boot": {"machine": about, "figures": {}, "table": "| old |"}}
    (tmp_path / "latest.json").write_text(json.dumps(old))
    assert run.earlier() == old
    results = {**run.earlier(), "net": run.entry_of(run.Skipped("no tap"), about)}
    text = run.markdown(results)
    assert "| old |" in text
    assert "skipped: no tap" in text


@pytest.mark.parametrize("quick", [True, False])
def test_only_figures_of_whole_runs_are_kept(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    run = benchmark("run")
    script = "import sys; print('| a |'); open(sys.argv[2], 'w').write('{}')"
    monkeypatch.setattr(run, "PARTS", (part(run, tmp_path, script),))
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "draw", lambda: "")
    monkeypatch.setattr(sys, "argv", ["run.py", *(["--quick"] if quick else [])])
    assert run.main() == 0
    assert (tmp_path / "results/latest.json").exists() is not quick


def test_unknown_part_is_refused(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = benchmark("run")
    monkeypatch.setattr(sys, "argv", ["run.py", "boot,nothing"])
    with pytest.raises(SystemExit) as error:
        run.main()
    assert error.value.code == 2


# --- charts.py ------------------------------------------------------------------------------------


def test_charts_are_the_same_bytes_again(benchmark: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no charts")
    charts = benchmark("charts")
    row = {"load": "4k read", "ratio": 1.1, "ratios": [0.9, 1.1, 1.2], "wanted": 1.0}
    latency = {"name": "Python", "quiet_p99_us": 20.0, "busy_p99_us": 31.0}
    ping = {"sent": 300.0, "received": 200.0, "ping": 2.0}
    figures = {
        "vhost_user": {"rows": [row]},
        "guest_disk": {
            "rows": [
                {"load": "4k", "against": [row | {"ours": "pyvmm pci", "theirs": "qemu x mmio"}]}
            ]
        },
        "disk_latency": {"monitor": [latency], "guest": []},
        "net": {"tap": {"pyvmm": [ping], "qemu": [ping]}},
        "boot": {"ratios": {"pci": {"each": [2.0, 2.1]}}},
    }
    source = tmp_path / "latest.json"
    source.write_text(json.dumps({name: {"figures": data} for name, data in figures.items()}))
    first, second = tmp_path / "first", tmp_path / "second"
    assert charts.draw_all(source, first) == list(figures)
    charts.draw_all(source, second)
    for name in figures:
        text = (first / f"{name}.svg").read_text()
        assert text == (second / f"{name}.svg").read_text()
        assert "<text" in text  # text stays text
        assert len(text) < 60_000
    assert "1.10" in (first / "vhost_user.svg").read_text()


def test_charts_without_figures_stay_as_they_are(benchmark: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no charts")
    source = tmp_path / "latest.json"
    source.write_text(json.dumps({"boot": {"skipped": "no QEMU"}}))
    assert benchmark("charts").draw_all(source, tmp_path / "charts") == []


def guest_that(script: str) -> list[str]:
    return [sys.executable, "-u", "-c", f"import sys, time\n{script}"]


def test_a_guest_of_the_network_that_goes_on_is_waited_for(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time it has said something it has all of that time again."""
    net, lab = benchmark("net"), benchmark("guest_lab")
    waits = []

    def wait(*words: Any) -> Any:
        waits.append(words[3])
        return select.select(*words)

    monkeypatch.setattr(lab, "select", SimpleNamespace(select=wait))
    monkeypatch.setattr(lab, "_LOOKS_EACH", 1000.0)
    says = "print('sent=1.5'); time.sleep(0.1); print('received=2')"
    assert net.measure(guest_that(says), 300.0) == {"sent": 1.5, "received": 2.0}
    assert len(waits) >= 2 and set(map(round, waits)) == {300}


def test_a_guest_of_the_network_that_stands_still_is_given_up(benchmark: Any) -> None:
    net = benchmark("net")
    with pytest.raises(RuntimeError, match=r"stands still for 0\.5 s\nsent=1"):
        net.measure(guest_that("print('sent=1'); time.sleep(600)"), 0.5)
    with pytest.raises(RuntimeError, match=r"no figures\nsent=1\n+why"):
        net.measure(guest_that("print('sent=1'); print('why', file=sys.stderr)"))


def test_the_two_ways_to_this_machines_files_are_compared(benchmark: Any) -> None:
    host_root = benchmark("host_root")
    found = {"pyvmm": [4.0, 6.0, 5.0], "vng": [8.0, 8.0, 20.0]}
    assert host_root.table({"seconds": found}).splitlines()[-1] == (
        "| 5.00 | 8.00 | 0.62 | 0.50 0.75 0.25 | at most 1.0 |"
    )
