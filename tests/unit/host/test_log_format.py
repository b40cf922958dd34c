"""--log-format json: each message is one object, whoever says it; text is as it was."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.machine.outcome import Ending, Outcome
from pyvmm.monitor import phases
from pyvmm.monitor.exit_code import explain
from pyvmm.testing import attached
from pyvmm.virtio.blk.backend import Backend
from pyvmm.virtio.blk.device import BlockDevice

Lines = Callable[[], str]  # what was written to standard error


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    monkeypatch.setenv("PYVMM_LOG_FORMAT", "json")
    log.set_vm("web")
    yield lambda: capsys.readouterr().err
    log.set_vm("")


def records(lines: Lines) -> list[dict[str, object]]:
    return [json.loads(line) for line in lines().splitlines()]


def test_a_device_s_warning_tells_vm_and_device_apart(lines: Lines) -> None:
    warn = log.RateLimited(log.of_vm("web"), prefix="disk0: ", device="disk0")
    warn("a kick is ignored")
    [record] = records(lines)
    time = record.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", str(time))
    assert record == {
        "level": "warning",
        "vm": "web",
        "device": "disk0",
        "message": "a kick is ignored",
    }


def test_an_error_has_its_cure_apart(lines: Lines) -> None:
    error = ConfigError("no such kernel", cure="name another", option="--kernel")
    assert explain(error) == 2
    [record] = records(lines)
    assert record["level"] == "error"
    assert record["message"] == "no such kernel"
    assert (record["cure"], record["option"], record["exit_code"]) == (
        "name another",
        "--kernel",
        2,
    )


@pytest.mark.parametrize(
    ("outcome", "level", "code"),
    [
        (Outcome(Ending.POWEROFF), "info", 0),
        (Outcome(Ending.PANIC), "error", 11),
        (Outcome(Ending.TRIPLE_FAULT, "the guest triple-faulted", "rip 0\nrsp 0"), "error", 12),
    ],
)
def test_every_ending_is_told(lines: Lines, outcome: Outcome, level: str, code: int) -> None:
    phases._report("web", outcome)
    [record] = records(lines)
    assert (record["level"], record["exit_code"]) == (level, code)
    assert record["ending"] == outcome.ending.name.lower()
    assert record["message"]
    assert record.get("report", "") == outcome.report


def test_text_is_as_it_was(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYVMM_LOG_FORMAT", "text")
    log.RateLimited(log.of_vm("web"), prefix="disk0: ", device="disk0")("odd")
    phases._report("web", Outcome(Ending.QUIT, "ended by Ctrl-A x"))
    phases._report("web", Outcome(Ending.POWEROFF))
    assert lines() == "pyvmm: web: disk0: odd\npyvmm: web: ended by Ctrl-A x\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "--log-format=json", "--kernel", "/nowhere/kernel"],
        ["run", "--kernel", "/nowhere/kernel", "--rng", "--log-format", "json"],
        ["run", "--no-such-option", "--log-format=json"],
    ],
)
def test_wrong_options_are_told_in_json_too(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", *argv], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    record = json.loads(line)
    assert (record["level"], record["exit_code"]) == ("error", 2)


class Broken(Backend):
    """A host whose disk fails."""

    size_sectors = 8
    read_only = False

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        raise OSError(5, "Input/output error")

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


def test_what_the_host_fails_is_told_apart_from_what_the_guest_does_wrong(
    lines: Lines,
) -> None:
    heard: list[tuple[str, str]] = []

    def observe(line: log.Line) -> None:
        heard.append((line.device, line.error))

    log.observe(observe)
    try:
        with attached(BlockDevice(Broken(), name="disk0")) as driver:
            for sector in (0, 1 << 40):
                header = (0).to_bytes(8, "little") + sector.to_bytes(8, "little")
                driver.request([header], [512, 1])
    finally:
        log.forget(observe)
    assert heard == [("disk0", "io"), ("disk0", "")]


def test_a_machine_that_gives_no_thread_is_no_defect(lines: Lines) -> None:
    before = threading.stack_size(1 << 46)  # bytes, which no address space has
    try:
        with pytest.raises(RuntimeError) as met:
            threading.Thread(target=bool).start()
    finally:
        threading.stack_size(before)
    assert explain(met.value) == 1
    [record] = records(lines)
    assert str(record["message"]).endswith("ulimit -u, or pids= of --cgroup")


def test_a_long_message_has_its_two_ends(
    lines: Lines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may quote a stranger's file whole; one of more than what waits would be left out."""
    error = ConfigError("begin " + "x" * 400_000 + " end", cure="mend it")
    explain(error)
    [record] = records(lines)
    assert re.fullmatch(r"begin x{8186} \[…\] x{8188} end", str(record["message"]))
    monkeypatch.delenv("PYVMM_LOG_FORMAT")
    explain(error)
    shown = capsys.readouterr().err
    assert shown.startswith("pyvmm: begin xxx") and shown.endswith("xxx end; mend it\n")
    assert len(shown) < 17 << 10


def test_a_terminal_obeys_nothing_that_a_line_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    """Names in a stranger's files, say, which are no lines of ours; tabs and letters stay."""
    log.to_stderr("partition \x1b]0;title\x07 of ü\r\x9b2J\udcff\n\tnext")
    shown = "pyvmm: partition \\x1b]0;title\\x07 of ü\\r\\x9b2J\\udcff\\n\tnext\n"
    assert capsys.readouterr().err == shown
