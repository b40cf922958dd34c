"""`pyvmm top`: how busy the VMs are, as a table that changes."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import click
from rich import box
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pyvmm.cli.answers import of_monitor
from pyvmm.cli.parameter_types import Seconds
from pyvmm.cli.stats import COUNTS, is_counted, merged, quantile, size_text, time_text
from pyvmm.control import registry
from pyvmm.control.client import Client
from pyvmm.errors import ConfigError, PyvmmError, how_many
from pyvmm.host.log import harmless
from pyvmm.platform.terminal import Terminal, is_terminal

_PATIENCE = 2.0  # seconds for each VM
_WIDE = 110  # columns of a terminal with room for all
_WIDTH = 140  # where the output is not a terminal
_REASONS = 3  # so many reasons of exits in the table of all VMs

Plain = dict[str, Any]


class Look(NamedTuple):
    """A VM's answer, and its time by time.monotonic()."""

    at: float
    status: Plain
    stats: Plain


@click.command()
@click.argument("vm", required=False)
@click.option(
    "--interval",
    type=Seconds(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Print one table, of one interval, and end.")
def top(vm: str | None, interval: float, once: bool) -> None:
    """Show how busy the VMs are, or VM and its devices: exits, requests, bytes, latency.

    All are per second, of the last interval; the latencies too. q or Ctrl-C ends it.
    """
    if vm is not None:
        Client.connect(vm).close()  # raises if there is none
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    before = _look(vm)
    if once or not console.is_terminal:
        time.sleep(interval)
        console.print(_render(console, vm, before, _look(vm)))
        return
    with _keyboard() as key_within, Live(console=console, screen=True, auto_refresh=False) as live:
        live.update(_render(console, vm, before, before), refresh=True)
        while True:
            if key_within(interval) in ("q", "Q", "\x03", "\x04"):
                return
            now = _look(vm)
            if vm is not None and not now:
                break
            live.update(_render(console, vm, before, now), refresh=True)
            before = now
    raise ConfigError(f"{vm} has ended")


def _look(vm: str | None) -> dict[str, Look]:
    """The answer of each VM; those that do not answer are left out."""
    found = {}
    for name in registry.running() if vm is None else [vm]:
        try:
            with Client.connect(name) as client:
                status = client.call("status", patience=_PATIENCE)
                stats = client.call("stats", patience=_PATIENCE)
                look = Look(time.monotonic(), status, stats)
                with of_monitor(name):
                    _all({}, {name: look}, wide=True)
                    _one(name, look, look)
                    float(stats["uptime_seconds"])
                    found[name] = look
        except PyvmmError:
            continue  # It starts still, has just ended, or hangs.
    return found


@contextmanager
def _keyboard() -> Iterator[Any]:
    """A callable that waits for a key, so many seconds at the most: the key, or ""."""
    fd = 0 if sys.stdin is not None and is_terminal(0) else None

    def key_within(seconds: float) -> str:
        if fd is None:
            time.sleep(seconds)
            return ""
        if not select.select([fd], [], [], seconds)[0]:
            return ""
        return os.read(fd, 1).decode(errors="replace") or "q"

    with Terminal(fd):
        yield key_within


# --- tables --------------------------------------------------------------------------------------


def _render(
    console: Console, vm: str | None, before: dict[str, Look], now: dict[str, Look]
) -> RenderableType:
    if vm is None:
        return _all(before, now, wide=console.width >= _WIDE)
    if vm not in now:
        return Text(f"{vm} does not answer")
    return _one(vm, before.get(vm, now[vm]), now[vm])


def _all(before: dict[str, Look], now: dict[str, Look], wide: bool) -> RenderableType:
    table = _table("VM", "STATE", "CPUS", "MEMORY", "EXITS", "IRQS", "REQS", "TO VM", "FROM VM")
    if wide:
        table.add_column("MOST EXITS", no_wrap=True)
    for name, look in now.items():
        rates = Rates(before.get(name, look), look)
        devices = list(look.stats["devices"])
        exits = rates.exits()
        most = sorted(((rate, why) for why, rate in exits.items() if why != "total"), reverse=True)
        reasons = ", ".join(f"{why} {_count(rate)}" for rate, why in most[:_REASONS] if rate)
        _add(
            table,
            name,
            look.status["state"],
            str(look.status["cpus"]),
            size_text(look.stats["memory"]["resident"]),
            _count(exits["total"]),
            _count(rates.of("interrupts")),
            _count(sum(rates.of("devices", device, "requests") for device in devices)),
            size_text(sum(rates.of("devices", device, "bytes_to_guest") for device in devices)),
            size_text(sum(rates.of("devices", device, "bytes_from_guest") for device in devices)),
            *([reasons] if wide else []),
        )
    return table if now else Text("no VM is running")


def _one(name: str, before: Look, now: Look) -> RenderableType:
    rates = Rates(before, now)
    memory = now.stats["memory"]
    head = _text(
        f"{name}  {now.status['state']}, up {now.status['uptime_seconds']:.0f} s, "
        f"{how_many(now.status['cpus'], 'vCPU')}, {size_text(memory['resident'])} "
        f"of {size_text(memory['size'])}; per second:"
    )
    exits = _table("EXITS", "RATE")
    for why, rate in sorted(rates.exits().items(), key=lambda item: -item[1]):
        if rate or why == "total":
            _add(exits, why, _count(rate))
    _add(exits, "interrupts", _count(rates.of("interrupts")))
    devices = _table("DEVICE", "REQS", "IRQS", "KICKS", "TO VM", "FROM VM", "P50", "P99", "ERRORS")
    for device, counted in now.stats["devices"].items():
        latency = rates.latency(device)
        _add(
            devices,
            device,
            *(_rate(rates, device, counted, what) for what in COUNTS),
            *(_bytes(rates, device, counted, what) for what in _DEVICE_BYTES),
            time_text(quantile(latency, 0.50)),
            time_text(quantile(latency, 0.99)),
            str(counted.get("errors", "-")),
        )
    return Group(head, exits, devices)


_DEVICE_BYTES = ("bytes_to_guest", "bytes_from_guest")


def _rate(rates: Rates, device: str, counted: Plain, what: str) -> str:
    return _count(rates.of("devices", device, what)) if is_counted(counted, what) else "-"


def _bytes(rates: Rates, device: str, counted: Plain, what: str) -> str:
    return size_text(rates.of("devices", device, what)) if what in counted else "-"


def _table(name: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(name, no_wrap=True)
    for column in columns:
        justify: JustifyMethod = "left" if column == "STATE" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*map(_text, cells))


def _text(text: str) -> Text:
    """It is a monitor's word: neither Rich nor a terminal obeys it."""
    return Text(harmless(text))


def _count(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 or not rate else f"{rate:.1f}"


class Rates:
    """The changes from one look to the next, per second."""

    def __init__(self, before: Look, now: Look) -> None:
        """The same look twice gives zeros, and so does a VM that has taken another's name."""
        same = before.stats["uptime_seconds"] <= now.stats["uptime_seconds"]
        self._before = before.stats if same else now.stats
        self._now = now.stats
        self._seconds = max(now.at - before.at, 1e-3)

    def of(self, *path: str) -> float:
        """Of a counter at `path`, and 0 for one that is not there."""
        change = _at(self._now, path) - _at(self._before, path)
        return max(0, change) / self._seconds

    def exits(self) -> dict[str, float]:
        """By reason."""
        return {why: self.of("exits", why) for why in self._now["exits"]}

    def latency(self, device: str) -> dict[str, int]:
        """The histogram of what was served meanwhile."""
        after, before = (_latency(stats, device) for stats in (self._now, self._before))
        return {bound: count - before.get(bound, 0) for bound, count in after.items()}


def _latency(stats: Plain, device: str) -> dict[str, int]:
    queues = stats["devices"].get(device, {}).get("queues", ())
    return merged([queue["latency_ns"] for queue in queues])


def _at(stats: Plain, path: tuple[str, ...]) -> float:
    value: Any = stats
    for name in path:
        value = value.get(name, 0) if isinstance(value, dict) else 0
    return value if isinstance(value, int | float) else 0
