"""Figures of a benchmark: table, remarks on lost and refused cases, CSV, plot."""

import csv
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Measurement:
    """Seconds per call, or the reason why there are none."""

    case: str
    phase: str
    provider: str
    samples: list[float] = field(default_factory=list)
    refusal: str | None = None
    peak_bytes: int | None = None  # allocated beyond the inputs; known on a GPU
    share: float | None = None  # of the machine's measured bandwidth or matmul rate, whichever binds

    def quantile(self, share: float) -> float:
        """The sample below which `share` of all samples lie."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.samples)


Rows = Sequence[Sequence[Measurement]]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _cell(result: Measurement, baseline: Measurement) -> str:
    if result.refusal:
        return "refused"
    cell = f"{_time(result.median)} ({_time(result.quantile(0.2))} .. {_time(result.quantile(0.8))})"
    if result is not baseline and baseline.samples:
        cell += f" **{baseline.median / result.median:.2f}x**"
    if result.share is not None:
        cell += f", {result.share:.0%} of peak"
    if result.peak_bytes is not None:
        cell += f", {result.peak_bytes / 2**20:.0f} MiB"
    return cell


def table(rows: Rows) -> str:
    """A Markdown table: one row per case and phase, one column per provider, ratios against the first."""
    names = list(dict.fromkeys(result.provider for row in rows for result in row))
    lines = [
        "| case | phase | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for row in rows:
        found = {result.provider: _cell(result, row[0]) for result in row}
        cells = [found.get(name, "") for name in names]
        lines.append(f"| {row[0].case} | {row[0].phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def remarks(rows: Rows, ours: str) -> list[str]:
    """Refused providers with the reason, and every case that `ours` loses against any other column."""
    lines = []
    for row in rows:
        own = next((result for result in row if result.provider == ours), None)
        for result in row:
            if result.refusal:
                lines.append(f"refused: {result.provider} at {result.case}, {result.phase}: {result.refusal}")
            elif own and own.samples and result is not own and result.median < own.median:
                ratio = result.median / own.median
                lines.append(f"losing: {ours} at {row[0].case}, {row[0].phase}: {ratio:.2f}x against {result.provider}")
    return lines


def write_csv(path: Path, rows: Rows) -> None:
    """Write one line per case, phase and provider, times in microseconds."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    names = ["case", "phase", "provider", "median_us", "q20_us", "q80_us", "samples", "share", "peak_bytes", "refusal"]
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for result in (result for row in rows for result in row):
            times = [result.median, result.quantile(0.2), result.quantile(0.8)] if result.samples else [None] * 3
            cells = [f"{seconds * 1e6:.3f}" if seconds is not None else "" for seconds in times]
            share = "" if result.share is None else f"{result.share:.4f}"
            head = [result.case, result.phase, result.provider]
            rest = [share, "" if result.peak_bytes is None else result.peak_bytes, result.refusal or ""]
            writer.writerow([*head, *cells, len(result.samples), *rest])
    os.replace(unfinished, path)


def plot(path: Path, rows: Rows, title: str) -> None:
    """Bars of speed relative to the first provider, losing ones below the line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(result.provider for row in rows for result in row))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.22 * len(rows) * len(names)), layout="constrained")
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        found = [next((r for r in row if r.provider == name and r.samples), None) for row in rows]
        ratios = [row[0].median / r.median if r and row[0].samples else 0.0 for row, r in zip(rows, found, strict=True)]
        places = [number + index * height for number in range(len(rows))]
        axes.barh(places, ratios, height, label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    labels = [f"{row[0].case} ({row[0].phase})" for row in rows]
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(rows))], labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"speed relative to {names[0]} (longer is faster)")
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
