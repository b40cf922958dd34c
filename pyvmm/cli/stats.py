"""`pyvmm stats`, `pyvmm metrics`: what VMs that run have counted."""

from __future__ import annotations

from typing import Any

import click

from pyvmm.cli.answers import of_monitor
from pyvmm.control import registry
from pyvmm.control.client import Client
from pyvmm.errors import ConfigError, PyvmmError, how_many
from pyvmm.host.log import harmless

_PATIENCE = 2.0  # seconds for each of many VMs
_ONE_PATIENCE = 30.0  # for one: in an emulated host that is busy the first answer takes a while


@click.command()
@click.argument("vm")
@click.option("--json", "as_json", is_flag=True, help="Print all numbers, as JSON.")
@click.option("--prometheus", is_flag=True, help="Print them in Prometheus' text format.")
def stats(vm: str, as_json: bool, prometheus: bool) -> None:
    """Show what VM has counted: exits, interrupts, requests, bytes, latencies.

    docs/watching.md explains the numbers; `pyvmm top` shows how fast they change.
    """
    if as_json and prometheus:
        raise click.UsageError("--json and --prometheus exclude each other")
    with Client.connect(vm) as found:
        if prometheus:
            click.echo(_metrics(vm, found, _ONE_PATIENCE), nl=False)
            return
        numbers = found.call("stats", patience=_ONE_PATIENCE)
    if as_json:
        import json

        click.echo(json.dumps(numbers, indent=2))
        return
    with of_monitor(vm):
        lines = _lines(numbers)
    for line in lines:
        click.echo(harmless(line))


def _lines(numbers: dict[str, Any]) -> list[str]:
    memory = numbers["memory"]
    reasons = sorted(numbers["exits"].items(), key=lambda item: -item[1])
    lines = [
        f"up {numbers['uptime_seconds']:.0f} s, memory {memory['resident'] >> 20} of "
        f"{memory['size'] >> 20} MiB, {how_many(numbers['interrupts'], 'interrupt')}",
        "exits: " + ", ".join(f"{reason} {count}" for reason, count in reasons if count),
    ]
    head = ("DEVICE", "REQUESTS", "INTERRUPTS", "KICKS", "TO GUEST", "FROM GUEST", "P50", "P99")
    rows = [head]
    served_by = [""]
    for name, device in numbers["devices"].items():
        histogram = merged([queue["latency_ns"] for queue in device["queues"]])
        server = device.get("served_by")
        served_by.append(f"  served by {server}" if server else "")
        rows.append(
            (
                name,
                *(counted(device, what) for what in COUNTS),
                size_text(device.get("bytes_to_guest")),
                size_text(device.get("bytes_from_guest")),
                time_text(quantile(histogram, 0.50)),
                time_text(quantile(histogram, 0.99)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row, note in zip(rows, served_by, strict=True):
        cells = [f"{row[0]:{widths[0]}}"]
        cells += [f"{text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells) + note)
    return lines


COUNTS = ("requests", "interrupts", "kicks")


def counted(device: dict[str, Any], what: str) -> str:
    """One of COUNTS of a device; "-" where nobody counts: another program serves the queues."""
    return str(device[what]) if is_counted(device, what) else "-"


def is_counted(device: dict[str, Any], what: str) -> bool:
    """False if one of COUNTS says nothing of a device: nobody here counts it."""
    return bool(device[what]) or not device.get("served_by")


def merged(histograms: list[dict[str, int]]) -> dict[str, int]:
    """One histogram of several."""
    found: dict[str, int] = {}
    for histogram in histograms:
        for bound, count in histogram.items():
            found[bound] = found.get(bound, 0) + count
    return found


def size_text(size: float | None) -> str:
    """A number of bytes in the unit that suits it; "-" for a device that counts none."""
    if size is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def time_text(nanoseconds: int) -> str:
    """An upper bound of a latency; "-" where nothing was counted."""
    if not nanoseconds:
        return "-"
    for unit, scale in (("ns", 1), ("µs", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)):
        value = nanoseconds / scale
        if value < 1000 or unit == "s":
            return f"{value:.3g} {unit}"
    raise AssertionError


@click.command()
@click.argument("vms", metavar="[VM]...", nargs=-1)
@click.option(
    "--listen",
    metavar="[ADDRESS:]PORT",
    help="Serve them at http://ADDRESS:PORT/metrics (127.0.0.1 unless given) until Ctrl-C. An IPv6 "
    "address is written as [::1]:9345.",
)
@click.option(
    "--allow-host",
    "names",
    metavar="NAME",
    multiple=True,
    help="With --listen: answer requests for this name too. Those for an IP address, localhost and "
    "this machine's name are answered; others may come from a web page (DNS rebinding).",
)
def metrics(vms: tuple[str, ...], listen: str | None, names: tuple[str, ...]) -> None:
    """Print the numbers of each VM (all that run) in Prometheus' text format.

    With --listen, Prometheus fetches them from here, for the VMs that run by then.
    """
    if listen is None:
        if names:
            raise ConfigError("it goes with --listen", cure="leave it out", option="--allow-host")
        click.echo(gather(vms), nl=False)
        return
    from pyvmm.cli.exporter import serve

    serve(*_address(listen), lambda: gather(vms, strict=False), names=names)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(f"{text!r} has no port", cure="write 9345, say", option="--listen")
    return host.strip("[]") or "127.0.0.1", int(port)


def gather(vms: tuple[str, ...] = (), *, strict: bool = True) -> str:
    """The metrics of `vms`, of all that run if none is named. With `strict`, one that does not
    answer is an error (raised); else it is left out."""
    texts = []
    for name in vms or registry.running():
        try:
            with Client.connect(name) as vm:
                texts.append(_metrics(name, vm, _PATIENCE))
        except PyvmmError:
            if strict and vms:
                raise  # of those that nobody has named one may have ended meanwhile
    return joined(texts)


def _metrics(vm: str, client: Client, patience: float) -> str:
    """The metrics of `vm`. Made here: whoever has its monitor says numbers and words, but not which
    metrics they are of, and of which VM. Raises PyvmmError, NoAnswer for what makes no sense."""
    from pyvmm.monitor.stats import as_text

    status = client.call("status", patience=patience)
    numbers = client.call("stats", patience=patience)
    with of_monitor(vm):
        text = as_text(vm, status, numbers)
        lines = text.split("\n")
        series = [line.rpartition(" ")[0] for line in lines if line and line[0] != "#"]
        if len(set(series)) < len(series) or not "".join(lines).isprintable():
            raise ValueError
        return text


def joined(texts: list[str]) -> str:
    """Several VMs' metrics as one text: the lines of a metric have to be together."""
    families: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines(keepends=True):
            if line.startswith("# HELP "):
                name = line
                families.setdefault(name, [])
            elif line.startswith("# TYPE "):
                if not families[name]:
                    families[name].append(line)
            else:
                families[name].append(line)
    return "".join(name + "".join(lines) for name, lines in families.items())


def quantile(histogram: dict[str, int], share: float) -> int:
    """The upper bound, in nanoseconds, of the bucket in which `share` of all counted lie; 0 if
    nothing was counted."""
    total = sum(histogram.values())
    seen = 0
    for bound, count in sorted((int(bound), count) for bound, count in histogram.items()):
        seen += count
        if seen >= share * total:
            return bound
    return 0
