"""What commands show of a monitor that a guest has taken over: it answers anything."""

from __future__ import annotations

import json
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from pyvmm.cli import control, stats, top
from pyvmm.cli.answers import show_table
from pyvmm.control import registry
from pyvmm.control.client import Client, NoAnswer
from pyvmm.control.protocol import ControlError
from pyvmm.host import unix_sockets
from pyvmm.monitor.stats import as_text

STATUS = {"state": "running", "cpus": 1, "memory": 64 << 20, "uptime_seconds": 1.0, "version": "1"}
STATS = {
    "uptime_seconds": 1.0,
    "interrupts": 1,
    "vcpus": [{"id": 0, "exits": {"total": 1}, "interrupts": 1}],
    "memory": {"size": 64 << 20, "resident": 1 << 20},
    "exits": {"total": 1},
    "devices": {},
    "left_out": {"console_bytes": 0, "messages": 0},
}
METRICS = as_text("sane", STATUS, STATS)
QUEUE = {"requests": 0, "interrupts": 0, "kicks": 0, "latency_ns": {}, "latency_sum_ns": 0}
DEVICE = dict.fromkeys(("requests", "interrupts", "kicks", "errors", "failures"), 0)
DEVICE |= {"queues": [QUEUE]}  # type: ignore[dict-item]
NO_SENSE = [
    *("\x00", "[]", "[[[", "5", '"x"', "{}", '{"id": 1}', '{"id": 1, "error": "x"}', "[" * 100_000),
    *(json.dumps({"id": None, "result": one}) for one in (None, [], "x", 5, {})),
]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))


@contextmanager
def monitor(name: str, **answers: Any) -> Iterator[None]:
    """A VM that gives these answers; a text is the line itself."""
    ended = threading.Event()
    with registry.register(name) as registration:
        assert registration.listener is not None
        listener = registration.listener

        def serve() -> None:
            while not ended.is_set():
                if not select.select([listener], [], [], 0.05)[0]:
                    continue
                if (client := unix_sockets.accept(listener)) is None:
                    continue
                client.setblocking(True)
                while line := client.recv(1 << 16):
                    asked = json.loads(line)
                    answer = answers.get(asked["method"], "{}")
                    if not isinstance(answer, str):
                        answer = json.dumps({"id": asked["id"], "result": answer})
                    client.sendall(answer.encode() + b"\n")
                client.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def said(command: click.Command, *arguments: str) -> str:
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.output.replace("\n", "").isprintable()
    return done.output


@contextmanager
def sane() -> Iterator[None]:
    with monitor("sane", status=STATUS, stats=STATS):
        yield


@pytest.mark.parametrize("line", NO_SENSE, ids=lambda line: line[:20])
def test_an_answer_without_sense_costs_no_other_vm_its_line(line: str) -> None:
    with monitor("bad", status=line, stats=line), sane():
        rows = [row.split()[:1] + row.split()[2:4] for row in said(control.ps).splitlines()]
        assert ["sane", "running", "1"] in rows
        assert ["bad", "no", "answer"] in rows
        assert "sane" in said(top.top, "--once", "--interval=0.1")
        assert said(stats.metrics) == METRICS
        with pytest.raises(NoAnswer, match=r"^bad answers what makes no sense$"):
            said(stats.stats, "bad")


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": "ended"},
        *({"memory": one} for one in ("64M", 1.5, None)),
        *({"uptime_seconds": one} for one in ("x", float("inf"), [])),
    ],
    ids=str,
)
def test_a_status_of_another_shape_is_no_answer(wrong: dict[str, Any]) -> None:
    with monitor("bad", status={**STATUS, **wrong}, stats=STATS), sane():
        rows = [row.split() for row in said(control.ps, "-a").splitlines()]
        assert ["bad", "no", "answer"] in [[row[0], *row[2:4]] for row in rows]
        assert "sane" in said(top.top, "--once", "--interval=0.1")


@pytest.mark.parametrize(
    "wrong",
    [
        {"devices": {"d": {}}},
        {"devices": {"d": {**DEVICE, "queues": [{"latency_ns": {"x": 1}}]}}},
        {"exits": {"total": "x"}},
        {"memory": {"size": "x", "resident": 1}},
        {"uptime_seconds": "x"},
    ],
    ids=str,
)
def test_numbers_of_another_shape_cost_no_other_vm_its_line(wrong: dict[str, Any]) -> None:
    with monitor("bad", status=STATUS, stats={**STATS, **wrong}), sane():
        shown = said(top.top, "--once", "--interval=0.1")
        assert "sane" in shown


def vcpu(**more: Any) -> dict[str, Any]:
    return {"vcpus": [{"id": 0, "exits": {}, "interrupts": 0, **more}]}


def device(called: str = "d", **more: Any) -> dict[str, Any]:
    return {"devices": {called: {**DEVICE, **more}}}


@pytest.mark.parametrize(
    "wrong",
    [
        *(vcpu(interrupts=one) for one in ("x", None, [], "1\nx")),
        *(vcpu(id=one) for one in ("\x1b[2J", "\u2028")),
        {"vcpus": [*vcpu()["vcpus"], *vcpu()["vcpus"]]},
        *(device(name) for name in ("\x1b[2J", "\r", "\ud800")),
        device(queues=[{**QUEUE, "latency_ns": {"x": 1}}]),
        *({"memory": one} for one in (None, {"size": "x", "resident": 1})),
    ],
    ids=repr,
)
def test_metrics_of_another_shape_are_left_out(wrong: dict[str, Any]) -> None:
    with monitor("bad", status=STATUS, stats={**STATS, **wrong}), sane():
        assert said(stats.metrics) == METRICS


@pytest.mark.parametrize(
    "evil",
    ['"', "\\", '\\"', "\n", 'x"} 1\npyvmm_cpus{vm="sane"} 7\nx{a="', '",vm="sane', "sane"],
)
def test_no_monitor_makes_metrics_of_another_vm(evil: str) -> None:
    counted = {evil: 2, "more": {evil: 3}, "vm": 4, "name": "sane"}
    wrong = {**vcpu(id=evil, exits={evil: 1}), **device(evil, **counted)}
    status = {**STATUS, "version": evil, "name": "sane"}
    with monitor("bad", status=status, stats={**STATS, **wrong}), sane():
        found = samples(said(stats.metrics))
    as_ever = samples(as_text("bad", STATUS, {**STATS, **vcpu(exits={"a": 1}), **device(a=1)}))
    assert {name for name, _, _ in found} <= {name for name, _, _ in as_ever}
    assert {dict(labels)["vm"] for _, labels, _ in found} == {"bad", "sane"}
    assert {one for one in found if dict(one[1])["vm"] == "sane"} == samples(METRICS)
    assert ("pyvmm_info", (("version", evil), ("vm", "bad")), 1.0) in found


def samples(text: str) -> set[tuple[str, tuple[tuple[str, str], ...], float]]:
    """Of each its name, its labels and its value."""
    return {
        (sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_neither_a_terminal_nor_rich_obeys_a_monitor() -> None:
    evil = "\x1b]0;title\x07[/][bold]"
    devices = {evil: DEVICE}
    with monitor("bad", status={**STATUS, "state": evil}, stats={**STATS, "devices": devices}):
        shown = r"\x1b]0;title\x07[/][bold]"
        assert shown in said(control.ps)
        assert shown in said(stats.stats, "bad")
        for words in (("--once", "--interval=0.1"), ("--once", "--interval=0.1", "bad")):
            assert shown in said(top.top, *words)


def test_a_table_has_columns_and_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    show_table([("A", "B"), ("long", "\x9b2J"), ("x", "y")])
    assert capsys.readouterr().out == "A     B\nlong  \\x9b2J\nx     y\n"


def test_errors_are_those_of_the_answer() -> None:
    error = {"code": "refused", "message": "no"}
    with (
        monitor("web", status=json.dumps({"id": 1, "error": error})),
        Client.connect("web") as client,
        pytest.raises(ControlError, match=r"^no$"),
    ):
        client.call("status")
