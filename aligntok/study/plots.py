"""Plots of a study as PNG: curves with their spread over seeds, and what probes read against what comes back."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from aligntok.report.svg import style
from aligntok.study.measure import Point
from aligntok.study.results import PROBE, PSNR, Metric, Results
from aligntok.study.rows import ABLATIONS, COMPARED, NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {  # by row; AlignTok in blues
    "vae": "#808792",
    "va_vae": "#b7791f",
    "va_vae_vit": "#cc5548",
    "rae": "#2a9270",
    "flux": "#d45fa0",
    "maetok": "#9a9a2e",
    "repa_e": "#7a5230",
    "aligntok_d16": "#8fb8dd",
    "aligntok": "#2f7fc1",
    "aligntok_d64": "#1c4f7c",
}
# One for each ablation
ABLATED = ("#7b4fc9", "#c2410c", "#0f766e", "#a21caf", "#4d7c0f", "#1d4ed8", "#b45309", "#475569")
MARKERS = "s^vDP*Xh"
FEW = 3  # rows that make a trade-off
INK = "#1b1d21"


def convergence(results: Results, metric: Metric) -> bytes | None:
    """A metric against the generator's training steps; None where no generator was measured underway."""

    def wanted(point: Point) -> bool:
        return point.sampling == results.plain.sampling and point.guidance == 1.0

    return _curves(results, metric, wanted, lambda point: point.trained, "training steps of the generator")


def sampling(results: Results, metric: Metric) -> bytes | None:
    """A metric against the network evaluations per sample; None where only one number of them was measured."""

    def wanted(point: Point) -> bool:
        return point.trained == results.plain.trained and point.guidance == 1.0

    return _curves(results, metric, wanted, lambda point: point.sampling, "network evaluations per sample", log=True)


def _curves(
    results: Results,
    metric: Metric,
    wanted: Callable[[Point], bool],
    place: Callable[[Point], int],
    label: str,
    log: bool = False,
) -> bytes | None:
    """Mean over seeds as a line, lowest to highest as a band."""
    with style():
        figure, axes = _figure(8.0, 3.8)
        ticks: set[int] = set()
        for name in results.rows(COMPARED):
            points = [p for p in results.points(name) if wanted(p) and results.curve(name, p, metric)]
            values = [results.curve(name, point, metric) for point in points]
            if len(points) < 2:
                continue
            x = [place(point) for point in points]
            ticks.update(x)
            axes.plot(x, [statistics.fmean(v) for v in values], "o-", color=COLORS[name], label=NAMES[name], ms=3.5)
            axes.fill_between(
                x, [min(v) for v in values], [max(v) for v in values], color=COLORS[name], alpha=0.13, lw=0
            )
        if not axes.lines:
            return None
        if log:
            _log_axis(axes, sorted(ticks))
        axes.set_xlabel(label)
        axes.set_ylabel(f"{metric.name},\nno guidance")
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _png(figure)


def _log_axis(axes: Axes, ticks: list[int]) -> None:
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())


def trade_off(results: Results) -> bytes | None:
    """Probe accuracy of the latents against PSNR, mean and deviation over seeds of every row; None for few rows."""
    with style():
        figure, axes = _figure(7.4, 4.0)
        rows = results.rows(COMPARED | ABLATIONS)
        if len(rows) < FEW:
            return None
        for name in rows:
            x, y = results.all_of(name, PSNR), results.all_of(name, PROBE)
            place = list(ABLATIONS).index(name) if name in ABLATIONS else 0
            color, marker = (COLORS[name], "o") if name in COLORS else (ABLATED[place], MARKERS[place])
            means = statistics.fmean(x), statistics.fmean(y), _deviation(y), _deviation(x)
            axes.errorbar(*means, fmt=marker, color=color, ms=5, elinewidth=0.8, label=NAMES[name])
        axes.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.set_xlabel(f"{PSNR.name} of held-out pictures")
        axes.set_ylabel("linear probe of the pooled latents")
        return _png(figure)


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({key: INK for key in ("text.color", "axes.edgecolor", "axes.labelcolor")})
    matplotlib.rcParams.update({"xtick.color": INK, "ytick.color": INK, "grid.color": INK})
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
