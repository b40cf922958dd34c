"""`pyvmm matrix`, with runs of which only the exit code counts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import click
import pytest

from pyvmm.cli import matrix
from pyvmm.cli.commands import run_command
from pyvmm.cli.matrix import Row

KERNELS = ("--kernel", "debian:6.1", "--kernel=./linux", "--kernel", "debian:sid")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The arguments of `pyvmm run`; on ./linux the command fails."""
    made: list[Sequence[str]] = []

    def run(kernel: str, words: Sequence[str], timeout: float | None) -> Row:
        made.append(words)
        code = {"./linux": 3, "slow": None}.get(kernel, 0)
        return Row(kernel, code, 1.25)

    monkeypatch.setattr(matrix, "_run", run)
    return made


def test_a_table_at_the_end_and_an_exit_code(runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["matrix", *KERNELS, "--memory", "1G", "test", "--", "make", "-k"]) == 1
    assert runs[0] == [
        *("--rm", "--kernel", "debian:6.1", "--memory", "1G", "test", "--", "make", "-k")
    ]
    assert capsys.readouterr().out.splitlines() == [
        "KERNEL      RESULT      SECONDS",
        "debian:6.1  passed      1.2",
        "./linux     failed (3)  1.2",
        "debian:sid  passed      1.2",
    ]
    assert run_command(["matrix", "--kernel", "a", "--", "true"]) == 0


def test_the_first_failure_can_be_the_last(runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["matrix", "--fail-fast", *KERNELS, "--", "true"]) == 1
    assert len(runs) == 2
    assert "debian:sid  not run     -" in capsys.readouterr().out


def test_one_that_takes_too_long(runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["matrix", "--timeout", "5", "--kernel", "slow", "--", "true"]) == 1
    assert "slow    timed out  1.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--", "true"], "--kernel: there is no kernel"),
        (["--timeout=nan", "--kernel", "slow", "--", "true"], "not a number of seconds"),
        (["--timeout=1e300", "--kernel", "slow", "--", "true"], "not a number of seconds"),
        (["--timeout=0", "--kernel", "slow", "--", "true"], "--timeout"),
        (["--timeout=-1", "--kernel", "slow", "--", "true"], "--timeout"),
        (["--kernel", "a"], "--: there is no command to run; add: -- CMD"),
        (["--kernel", "a", "--name=x", "--", "true"], "--name: is for one VM, not for a matrix"),
        (["--kernel", "a", "-d", "--", "true"], "-d: is for one VM, not for a matrix"),
    ],
)
def test_what_a_matrix_cannot_be(runs, words, why, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["matrix", *words]) == 2
    assert why in capsys.readouterr().err
    assert not runs


def test_a_run_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real child, which sleeps instead of running a guest."""
    root = click.Command("root", params=[click.Argument(["words"], nargs=-1)])
    root.callback = lambda words: time.sleep(600)
    with click.Context(root):
        row = matrix._run("slow", [], 0.2)
    assert row.code is None and row.seconds < 300


def test_what_is_wrong_with_a_kernel_fails_its_row(capfd: pytest.CaptureFixture[str]) -> None:
    """The real `pyvmm run`, which refuses both."""
    code = run_command(["matrix", "--kernel", "debian:potato", "--kernel", "/", "--", "true"])
    out, err = capfd.readouterr()
    assert code == 1
    assert "debian:potato  failed (2)" in out and "/              failed (2)" in out
    assert "there is no kernel 'debian:potato'" in err
    assert "is a directory without a kernel" in err
