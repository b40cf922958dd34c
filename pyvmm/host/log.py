"""One line per event on standard error, with a bound on what a guest can cause.

A guest can provoke a warning as often as it likes; a `RateLimited` log lets a burst of them through
and then counts, up to so many in all, so that a log cannot grow without bound.

Whoever logs never waits, be it for a pipe that nobody reads or a terminal that is paused: what has
no room is left out and counted, and a line says so once there is room again.

In the format "json" each line is a JSON object, for programs that collect logs: `time` (RFC 3339,
UTC), `level`, `vm`, `device`, `message`, and what else is known (`cure`, `exit_code`, …).
"""

from __future__ import annotations

import atexit
import os
import select
import sys
import time
from collections.abc import Callable, Mapping
from threading import Lock, Thread
from typing import Self

from pyvmm.errors import how_many
from pyvmm.host.output import Outbox

Sink = Callable[[str], None]

INFO, WARNING, ERROR = "info", "warning", "error"

# An environment variable, so that it holds in an emulated host too, and for those who set it.
_VARIABLE = "PYVMM_LOG_FORMAT"

MOST_WARNINGS = 2000
"""Lines of all `RateLimited` logs of a process, which is a VM's, on standard error."""

_LONGEST = 16 << 10  # characters of a message
_WAITING = 256 << 10  # bytes of lines that nobody has read yet

_vm = ""
_warnings = 0  # of RateLimited logs, on standard error
_observers: list[Callable[[Line], None]] = []
_copies: list[Callable[[bytes], None]] = []


class Line(str):
    """A line that knows what it is about.

    `device`: whose trouble it tells of. `error`: what kind of trouble that is, if those who listen
    for events are to hear of it. `more` are members for JSON, a `message` other than the text too.
    """

    level: str
    device: str
    error: str
    more: Mapping[str, object]
    by_guest = False  # of a RateLimited log

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
    """True if each line is a JSON object."""
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
            text.by_guest = line.by_guest
        to_stderr(text)

    return write


def to_stderr(line: str) -> None:
    """Write one line to standard error, whole, whatever thread calls."""
    global _warnings
    if isinstance(line, Line):
        if line.by_guest:
            _warnings += 1
            if _warnings > MOST_WARNINGS + 1:
                return
            if _warnings > MOST_WARNINGS:
                line = Line(f"{_vm}: no more warnings are shown")
        for observer in _observers:
            observer(line)
    text = as_written(line)
    for copy in _copies:
        copy(text.encode(errors="replace"))
    raw_to_stderr(text)


def as_written(line: str) -> str:
    """The text that is written for `line`, in the format that was chosen."""
    return _as_json(line) if is_json() else f"pyvmm: {harmless(line)}"


def harmless(text: str) -> str:
    """`text` as one line without what a terminal obeys: it may quote a stranger's file or a guest.
    Control characters but tabs are shown as Python writes them, and of a long text its two ends."""
    text = _bounded(text)
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\t" else ascii(one)[1:-1] for one in text)


def _bounded(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    kept = _LONGEST // 2
    return f"{text[:kept]} […] {text[-kept:]}"


def copy_to(copy: Callable[[bytes], None]) -> None:
    """Have `copy` called with each line as it is written, by any thread; it must not wait."""
    _copies.append(copy)


def do_not_copy_to(copy: Callable[[bytes], None]) -> None:
    """`copy` is not called any more."""
    if copy in _copies:
        _copies.remove(copy)


def raw_to_stderr(text: str) -> None:
    """Write `text`, whole lines without the end of the last, as it is. Never waits."""
    stream = sys.stderr
    if stream is None:
        return  # It was closed when the process started.
    try:
        # \r because the terminal may be in raw mode.
        end = "\r\n" if stream.isatty() else "\n"
        if stream is sys.__stderr__:
            _stderr.write((text + end).encode(errors="backslashreplace"))
        else:  # somebody's in this process
            stream.write(text + end)
            stream.flush()
    except (OSError, ValueError):
        pass  # A closed standard error must not end the guest.


def flush(patience: float = 1.0) -> None:
    """Write what waits, as long as somebody reads at least every `patience` seconds: the process is
    about to end."""
    _stderr.flush(patience)


def left_out() -> int:
    """The number of lines that nobody has read in time."""
    return _stderr.left_out


def _notice(count: int) -> bytes:
    return f"pyvmm: left out {how_many(count, 'message')} that nobody read in time\n".encode()


class _Stderr:
    """Standard error, for any thread. What it does not take at once waits for a thread that is
    there only as long as something waits."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._outbox: Outbox | None = None
        self._drainer: Thread | None = None
        self.left_out = 0

    def write(self, data: bytes) -> None:
        """Raises OSError if it is closed."""
        with self._lock:
            found = os.fstat(2)
            identity = (found.st_dev, found.st_ino, found.st_rdev)
            outbox = self._outbox
            if outbox is None or outbox.outlet.identity != identity:
                if outbox is not None:
                    outbox.outlet.close()
                outbox = self._outbox = Outbox(2, _WAITING, _notice)
            before = outbox.left_out
            outbox.put(data)
            self.left_out += outbox.left_out - before
            self._send(outbox)
            if len(outbox) and self._drainer is None:
                self._drainer = Thread(target=self._drain, name="stderr", daemon=True)
                self._drainer.start()
                atexit.register(self.flush, 1.0)

    def _send(self, outbox: Outbox) -> None:
        try:
            outbox.send()
        except OSError:
            outbox.clear()  # nobody reads any more

    def _drain(self) -> None:
        while True:
            with self._lock:
                outbox = self._outbox
                if outbox is not None:
                    self._send(outbox)
                if outbox is None or not len(outbox):
                    self._drainer = None
                    return
                poll = select.poll()
                poll.register(outbox.outlet.descriptor, select.POLLOUT)
            poll.poll(1000)

    def flush(self, patience: float) -> None:
        with self._lock:
            if self._outbox is not None:
                self._outbox.flush(patience)

    def after_fork(self) -> None:
        """In the child: the parent has what waits, and its thread."""
        self._lock = Lock()
        self._drainer = None
        if self._outbox is not None:
            self._outbox.outlet.close()
            self._outbox = None


_stderr = _Stderr()


def _after_fork() -> None:
    _stderr.after_fork()
    _copies.clear()  # they are the parent's


os.register_at_fork(after_in_child=_after_fork)


def message_of(line: str) -> str:
    """The text of `line`, without the names of the VM and of the device in front."""
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
    return json.dumps(
        {
            name: _bounded(value) if isinstance(value, str) else value
            for name, value in record.items()
            if value != ""
        }
    )


class RateLimited:
    """Passes `burst` lines per `period` seconds to `sink`, then says how many were dropped; and
    `total` of them in all. The last line says that it is the last."""

    def __init__(
        self,
        sink: Sink = to_stderr,
        *,
        prefix: str = "",
        device: str = "",
        error: str = "",
        burst: int = 10,
        period: float = 5.0,
        total: int = 200,
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
        self._left = total

    def __call__(self, line: str) -> None:
        """Log `line`, or only count it."""
        if not self._left:
            return
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
        if not self._left:
            return
        self._left -= 1
        self._tell(line, error)
        if not self._left:
            self._tell("no more warnings of this kind are shown")

    def _tell(self, text: str, error: str = "") -> None:
        line = Line(self._prefix + text, device=self._device, error=error)
        line.by_guest = True
        self._sink(line)
