"""Events of a VM, as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from socket import SHUT_RDWR
from typing import Any

from pyvmm.api.cancellation import woken_by
from pyvmm.control.client import read_events
from pyvmm.host.unix_sockets import Socket


@dataclass(frozen=True)
class Event:
    """Something that has happened: `kind` is "started", "paused", "resumed", "panic", "ended" or
    another of docs/control-socket.md, `time` in seconds since 1970, `details` what is known of it.
    """

    kind: str
    time: float
    details: Mapping[str, Any] = field(default_factory=dict)


def events_of(stream: Socket) -> Iterator[Event]:
    """The events that come from `stream`, until the VM has ended; it is closed then."""
    lines = read_events(stream)
    try:
        while (line := _next(lines, stream)) is not None:
            yield as_event(line)
    finally:
        stream.close()


def _next(lines: Iterator[dict[str, Any]], stream: Socket) -> dict[str, Any] | None:
    with woken_by(partial(stream.shutdown, SHUT_RDWR)):
        return next(lines, None)


def as_event(line: Mapping[str, Any]) -> Event:
    """The event that the control socket tells as `line`."""
    details = {name: value for name, value in line.items() if name not in ("event", "time")}
    return Event(str(line["event"]), float(line.get("time", 0.0)), details)
