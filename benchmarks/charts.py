"""Draws docs/charts/*.svg from the figures of benchmarks/run.py.

    python benchmarks/charts.py [benchmarks/results/latest.json]

The same figures make the same bytes. A chart whose figures are missing stays as it is.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot  # after the choice of what it draws with

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "latest.json"
FOLDER = HERE.parent / "docs" / "charts"
GOOD, BAD, PALE, LINE = "#2a7f62", "#c8553d", "#b8c4bb", "#333333"
STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, and the reader's own font
    "svg.hashsalt": "pyvmm",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Bar(NamedTuple):
    """A ratio: its median, least and greatest, and what is wanted. `lower` is better or not."""

    label: str
    ratio: float
    least: float
    greatest: float
    wanted: float
    lower: bool = False

    @property
    def met(self) -> bool:
        return self.ratio <= self.wanted if self.lower else self.ratio >= self.wanted


def row_bar(row: dict[str, Any]) -> Bar:
    """The Bar of a row of a table of loads."""
    return Bar(row["load"], row["ratio"], min(row["ratios"]), max(row["ratios"]), row["wanted"])


def time_bar(label: str, ratios: Sequence[float], wanted: float) -> Bar:
    """A Bar for times, of several rounds."""
    return Bar(label, statistics.median(ratios), min(ratios), max(ratios), wanted, lower=True)


def draw_bars(bars: Sequence[Bar], title: str, axis: str, path: Path) -> None:
    """Horizontal bars, the range of the rounds as a line, a tick where each is wanted to be."""
    figure, axes = pyplot.subplots(figsize=(6.4, 0.75 + 0.34 * len(bars)))
    for place, one in enumerate(bars):
        axes.barh(place, one.ratio, height=0.6, color=GOOD if one.met else BAD)
        axes.plot([one.least, one.greatest], [place, place], color=LINE, linewidth=1)
        axes.plot([one.wanted] * 2, [place - 0.42, place + 0.42], color=LINE, linewidth=2.2)
        right = max(one.greatest, one.ratio, one.wanted)
        axes.text(right, place, f"  {one.ratio:.2f}", va="center", color=LINE)
    axes.set_yticks(range(len(bars)), [one.label for one in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(max(one.greatest, one.ratio, one.wanted) for one in bars))
    axes.set_xlabel(axis)
    axes.set_title(title, loc="left", fontsize=10)
    save(figure, path)


def draw_groups(
    labels: Sequence[str], groups: Mapping[str, Sequence[float]], title: str, axis: str, path: Path
) -> None:
    """Two bars for each label, on a logarithmic axis."""
    figure, axes = pyplot.subplots(figsize=(6.4, 0.9 + 0.5 * len(labels)))
    for shift, (name, values), colour in zip(
        (-0.2, 0.2), groups.items(), (PALE, GOOD), strict=True
    ):
        places = [place + shift for place in range(len(labels))]
        axes.barh(places, values, height=0.38, color=colour, label=name)
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f" {value:,.0f}", va="center", color=LINE, fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.set_xlabel(axis)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, loc="best")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write it as SVG, without the time of day."""
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    # Its writer leaves spaces at the ends of lines.
    lines = (line.rstrip() for line in path.read_text().splitlines())
    path.write_text("\n".join(lines) + "\n")


# --- one function for each chart ------------------------------------------------------------------


def vhost_user(figures: dict[str, Any], path: Path) -> None:
    bars = [row_bar(row) for row in figures["rows"]]
    draw_bars(bars, "virtio-blk over vhost-user", "requests/s: pyvmm ÷ qemu-storage-daemon", path)


def guest_disk(figures: dict[str, Any], path: Path) -> None:
    bars = []
    for row in figures["rows"]:
        for pair in row["against"]:
            ours, theirs = (pair[side].split()[-1] for side in ("ours", "theirs"))
            bars.append(row_bar(pair | {"load": f"{row['load']}, {ours} ÷ {theirs}"}))
    draw_bars(bars, "fio in a Linux guest", "requests/s: pyvmm ÷ QEMU microvm", path)


def disk_latency(figures: dict[str, Any], path: Path) -> None:
    rows = [(where, row) for where in ("monitor", "guest") for row in figures[where]]
    labels = [f"{where}: {row['name']}" for where, row in rows]
    groups = {
        "quiet": [row["quiet_p99_us"] for _, row in rows],
        "a vCPU spins and prints": [row["busy_p99_us"] for _, row in rows],
    }
    draw_groups(labels, groups, "One 4 KiB read at a time", "99th percentile, µs", path)


def net(figures: dict[str, Any], path: Path) -> None:
    names = {"sent": "sent", "received": "received", "ping": "round trip"}
    bars = []
    for way, programs in figures.items():
        if not isinstance(programs, dict) or not {"pyvmm", "qemu"} <= programs.keys():
            continue
        for key, name in names.items():
            pairs = zip(programs["pyvmm"], programs["qemu"], strict=False)
            ratios = [a[key] / b[key] for a, b in pairs if key in a and key in b]
            if key == "ping" and ratios:
                bars.append(time_bar(f"{way}: {name}", ratios, 1.1))
            elif ratios:
                middle = statistics.median(ratios)
                bars.append(Bar(f"{way}: {name}", middle, min(ratios), max(ratios), 1.0))
    draw_bars(bars, "Network of a Linux guest", "pyvmm ÷ QEMU microvm", path)


def boot(figures: dict[str, Any], path: Path) -> None:
    bars = [time_bar(way, ratio["each"], 1.0) for way, ratio in figures["ratios"].items()]
    draw_bars(bars, "exec to the guest's init", "time: pyvmm ÷ QEMU microvm", path)


CHARTS: tuple[Callable[[dict[str, Any], Path], None], ...] = (
    vhost_user,
    guest_disk,
    disk_latency,
    net,
    boot,
)


def draw_all(results: Path, folder: Path) -> list[str]:
    """Draw what `results` has figures for into `folder`; the names of those drawn."""
    found = json.loads(results.read_text())
    folder.mkdir(exist_ok=True)
    drawn = []
    with pyplot.rc_context(STYLE):
        for chart in CHARTS:
            figures = found.get(chart.__name__, {}).get("figures")
            if figures:
                chart(figures, folder / f"{chart.__name__}.svg")
                drawn.append(chart.__name__)
    return drawn


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    print("drawn:", ", ".join(draw_all(source, FOLDER)))
