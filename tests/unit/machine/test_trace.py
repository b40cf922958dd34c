"""A trace that cannot be written ends; the guest that it shows goes on."""

from __future__ import annotations

import io
import sys

import pytest

from pyvmm.errors import ConfigError
from pyvmm.machine.trace import Trace


def hooked(trace: Trace):
    hook = trace.hook("requests")
    assert hook is not None
    return hook


def test_events_are_lines_with_kind_and_time(tmp_path):
    trace = Trace(("requests",), str(tmp_path / "out"))
    hooked(trace)("a read")
    trace.close()
    assert (tmp_path / "out").read_text().endswith("] requests  a read\n")


def test_a_kind_that_was_not_asked_for_has_no_hook(tmp_path):
    assert Trace(("requests",), str(tmp_path / "out")).hook("exits") is None


def test_a_full_disk_ends_the_trace_with_one_line(capsys):
    trace = Trace(("requests",), "/dev/full")
    hook = hooked(trace)
    for _ in range(1000):
        hook("x" * 1000)
    trace.close()
    assert capsys.readouterr().err == "pyvmm: the trace ends here: No space left on device\n"


def test_a_disk_that_is_full_only_at_the_end_is_said_too(capsys):
    trace = Trace(("requests",), "/dev/full")
    hooked(trace)("short enough for the buffer")
    trace.close()
    assert capsys.readouterr().err == "pyvmm: the trace ends here: No space left on device\n"


def test_an_event_after_the_end_goes_nowhere(tmp_path):
    trace = Trace(("requests",), str(tmp_path / "out"))
    hook = hooked(trace)
    trace.close()
    hook("late")
    assert (tmp_path / "out").read_text() == ""


def test_without_standard_error_there_is_nothing_to_trace_to(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    trace = Trace(("requests",))
    assert trace.hook("requests") is None
    trace.close()


def test_a_closed_standard_error_ends_the_trace(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    trace = Trace(("requests",))
    stream.close()
    hooked(trace)("gone")
    trace.close()


def test_a_file_that_cannot_be_written_is_the_users_error(tmp_path):
    with pytest.raises(ConfigError, match=r"--trace-file: cannot write .*missing/out"):
        Trace(("requests",), str(tmp_path / "missing/out"))
