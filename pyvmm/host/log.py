"""One line per event on standard error, with a bound on what a guest can cause.

A guest can provoke a warning as often as it likes; a `RateLimited` log lets a burst of them through
and then counts, so that a log cannot grow without bound (ROBUSTNESS: "warnings are rate-limited").

In the format "json" each line is a JSON object, for programs that collect logs: `time` (RFC 3339,
UTC), `level`, `vm`, `device`, `message`, and what else is known (`cure`, `exit_code`, …).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Self

Sink = Callable[[str], None]

INFO, WARNING, ERROR = "info", "warning", "error"

# An environment variable, so that it holds in an emulated host too, and for those who set it.
_VARIABLE = "PYVMM_LOG_FORMAT"

_vm = ""
_observers: list[Callable[[Line], None]] = []


class Line(str):
    """A line that knows what it is about.

    `device`: whose trouble it tells of. `error`: what kind of trouble that is, if those who listen
    for events are to hear of it. `more` are members for JSON, a `message` other than the text too.
    """

    level: str
    device: str
    error: str
    more: Mapping[str, object]

    def __new__(
        cls,
        text: str,
        *,
        level: str = WARNING,
        device: str = "",
        error: str = "",
        more: Mapping[str, object] | None = None,
    ) -> Self:
        line = super().__new__(cls, text)
        line.level, line.device, line.error = level, device, error
        line.more = {} if more is None else more
        return line


def set_format(name: str) -> None:
    """From now on lines are "text" or "json", in processes that this one starts too."""
    os.environ[_VARIABLE] = name


def is_json() -> bool:
    """Whether each line is a JSON object."""
    return os.environ.get(_VARIABLE) == "json"


def set_vm(name: str) -> None:
    """The VM that this process runs."""
    global _vm
    _vm = name


def observe(observer: Callable[[Line], None]) -> None:
    """Have `observer` called with each line that knows what it is about, by any thread."""
    _observers.append(observer)


def forget(observer: Callable[[Line], None]) -> None:
    """`observer` is not called any more."""
    if observer in _observers:
        _observers.remove(observer)


def of_vm(name: str) -> Sink:
    """A sink for what happens in the VM called `name`."""

    def write(line: str) -> None:
        text = f"{name}: {line}"
        if isinstance(line, Line):
            kept = (line.level, line.device, line.error, line.more)
            text = Line(text, level=kept[0], device=kept[1], error=kept[2], more=kept[3])
        to_stderr(text)

    return write


def to_stderr(line: str) -> None:
    """Write one line to standard error, whole, whatever thread calls."""
    if isinstance(line, Line):
        for observer in _observers:
            observer(line)
    stream = sys.stderr
    if stream is None:
        return  # It was closed when the process started.
    text = _as_json(line) if is_json() else f"pyvmm: {line}"
    try:
        # One write call per line keeps lines of several threads apart; \r because the terminal may
        # be in raw mode.
        end = "\r\n" if stream.isatty() else "\n"
        stream.write(text + end)
        stream.flush()
    except (OSError, ValueError):
        pass  # A closed standard error must not end the guest.


def message_of(line: str) -> str:
    """What `line` says, without the names of the VM and of the device in front."""
    text = str(line).removeprefix(f"{_vm}: ")
    if isinstance(line, Line) and line.device:
        for kind in ("", "disk ", "port "):
            text = text.removeprefix(f"{kind}{line.device}: ")
    return text


def _as_json(line: str) -> str:
    import json  # only where it is asked for

    if not isinstance(line, Line):
        line = Line(line)
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    record = {
        "time": f"{now}.{nanoseconds // 1000:06}Z",
        "level": line.level,
        "vm": _vm,
        "device": line.device,
        "message": message_of(line),
        **line.more,
    }
    return json.dumps({name: value for name, value in record.items() if value != ""})


class RateLimited:
    """Passes `burst` lines per `period` seconds to `sink`, then says how many were dropped."""

    def __init__(
        self,
        sink: Sink = to_stderr,
        *,
        prefix: str = "",
        device: str = "",
        error: str = "",
        burst: int = 10,
        period: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`device` and `error` are what the lines are about, see Line."""
        self._sink = sink
        self._prefix = prefix
        self._device = device
        self._error = error
        self._burst = burst
        self._period = period
        self._clock = clock
        self._window_start = clock()
        self._count = 0

    def __call__(self, line: str) -> None:
        """Log `line`, or only count it."""
        now = self._clock()
        if now - self._window_start >= self._period:
            dropped = self._count - self._burst
            self._window_start, self._count = now, 0
            if dropped > 0:
                self._say(f"{dropped} similar warnings were left out")
        self._count += 1
        if self._count <= self._burst:
            self._say(line, self._error)

    def _say(self, line: str, error: str = "") -> None:
        self._sink(Line(self._prefix + line, device=self._device, error=error))
