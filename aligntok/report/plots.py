"""Plots of a run as SVG bytes: loss curves, the trade-off between understanding and reconstruction, time per
part.

Ink is `currentColor`, so that a plot set inline takes the text colour of a light or a dark page; the colours
of the parts are mid-tones that keep a contrast above 3:1 on both. Text stays text. The same input gives the
same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from aligntok.errors import UserError
from aligntok.report.svg import INK, new_figure, style, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {  # by part of the run; the same in every plot
    "stage1": "#b7791f",
    "stage2": "#2f7fc1",
    "stage2_w_sp_0": "#cc5548",
    "stage3": "#2a9270",
    "generator": "#8a68c8",
}
OTHER = "#808792"
NAMES = {
    "features": "Encoder features",
    "encoder": "Encoder features",
    "stage1": "Stage 1",
    "stage2": "Stage 2",
    "stage2_w_sp_0": "Stage 2, w_sp = 0",
    "stage3": "Stage 3",
    "latents": "Latents",
    "generator": "Generator",
    "sampling": "Sampling",
    "evaluation": "Evaluation",
}
TOKENIZER_PARTS = ("stage1", "stage2", "stage3")  # drawn one after the other on one axis of steps

Record = Mapping[str, Any]


class Plot(NamedTuple):
    """A finished plot: what it shows in a few words, the SVG, and the same in words for who cannot see it."""

    title: str
    svg: bytes
    alt: str


class Panel(NamedTuple):
    """One small plot of the training records: `key` names the value, `parts` where it comes from."""

    title: str
    key: str
    parts: tuple[str, ...]


PANELS = (
    Panel("L1", "l1", TOKENIZER_PARTS),
    Panel("Perceptual distance", "perceptual", TOKENIZER_PARTS),
    Panel("PSNR [dB]", "psnr", TOKENIZER_PARTS),
    Panel("Adversarial loss of the decoder", "gan", TOKENIZER_PARTS),
    Panel("Discriminator loss", "discriminator", TOKENIZER_PARTS),
    Panel("Distance to the Stage-1 latents", "semantic", TOKENIZER_PARTS),
    Panel("Latent standard deviation", "latent_std", TOKENIZER_PARTS),
    Panel("Generator: velocity error", "mse", ("generator",)),
    Panel("Generator: direction error", "direction", ("generator",)),
)


def name_of(part: str) -> str:
    """How a part of the run is called in print."""
    return NAMES.get(part, part.replace("_", " ").capitalize())


def duration(seconds: float) -> str:
    """48 s, 3 min 12 s, 2 h 05 min."""
    total = round(seconds)
    if total < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over a tenth of the curve, at least four points, with its start unbiased."""
    decay = 1 - 1 / max(4.0, len(values) / 10)
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(mean / weight)
    return result


def loss_curves(records: Sequence[Record]) -> list[Plot]:
    """One small plot per loss that the records hold, see `PANELS`; the stages share one axis of steps.

    A record is a dictionary with "part", "step" (counted within the part) and values. Points that are missing
    or not finite are left out. An ablation branch of Stage 2 starts where Stage 2 does and is dashed.
    """
    for record in records:
        if not {"part", "step"} <= record.keys():
            raise UserError(f"training records: expected the keys 'part' and 'step', got {sorted(record)}")
    plots = [_loss_curve(panel, records) for panel in PANELS]
    return [plot for plot in plots if plot is not None]


def _series(records: Sequence[Record], part: str, key: str) -> tuple[list[float], list[float]]:
    steps, values = [], []
    for record in records:
        value = record.get(key)
        if record["part"] == part and isinstance(value, (int, float)) and math.isfinite(value):
            steps.append(float(record["step"]))
            values.append(float(value))
    return steps, values


def _loss_curve(panel: Panel, records: Sequence[Record]) -> Plot | None:
    series = {part: _series(records, part, panel.key) for part in panel.parts}
    series = {part: xy for part, xy in series.items() if len(xy[0]) > 1}
    if not series or not any(any(values) for _, values in series.values()):
        return None
    with style():
        figure, axes = new_figure(4.0, 2.45)
        start, shown, words = 0.0, [], []
        for part, (steps, values) in series.items():
            branch = _series(records, f"{part}_w_sp_0", panel.key)
            for name, (xs, ys), line in (
                (part, (steps, values), "-"),
                (f"{part}_w_sp_0", branch, (0, (4, 2))),
            ):
                if len(xs) > 1:
                    shown += _curve(axes, [start + x for x in xs], ys, COLORS.get(name, OTHER), line)
                    words.append(f"{name_of(name)}: {smooth(ys)[0]:.3g} to {smooth(ys)[-1]:.3g}")
            _mark_part(axes, part, start, start + steps[-1], sum(xy[0][-1] for xy in series.values()))
            start += steps[-1]
        if min(shown) > 0 and max(shown) > 4 * min(shown):  # a smaller range reads better on a linear axis
            _log_axis(axes)
        axes.set_xlim(0, start)
        axes.set_xlabel("step")
        return Plot(panel.title, to_svg(figure), f"{panel.title} over {start:.0f} steps. {'; '.join(words)}.")


def _curve(axes: Axes, steps: list[float], values: list[float], color: str, line: object) -> list[float]:
    """Draw raw (faint) and smoothed; return the smoothed values."""
    smoothed = smooth(values)
    axes.plot(steps, values, color=color, alpha=0.28, linewidth=0.7)
    axes.plot(steps, smoothed, color=color, linewidth=1.6, linestyle=line, solid_capstyle="round")
    return smoothed


def _mark_part(axes: Axes, part: str, start: float, end: float, total: float) -> None:
    """Name the part above its share of the axis, and draw a hairline where it starts."""
    if start > 0:
        axes.axvline(start, color=INK, alpha=0.25, linewidth=0.6)
    if end - start > 0.12 * total:  # narrower shares have no room for the name; the colour says it
        transform = axes.get_xaxis_transform()
        middle = (start + end) / 2
        axes.text(
            middle,
            1.03,
            name_of(part),
            transform=transform,
            ha="center",
            color=COLORS.get(part, OTHER),
            size=8.5,
        )


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 60 else (1,)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


class Point(NamedTuple):
    """One tokenizer in the trade-off plot."""

    label: str
    psnr: float
    accuracy: float
    deviation: float
    color: str = OTHER


def trade_off(points: Sequence[Point], encoder_accuracy: float | None = None) -> Plot:
    """Linear-probe accuracy of the latents against PSNR; bars are one standard deviation."""
    if not points:
        raise UserError("trade-off plot: no point has both a PSNR and a probe accuracy")
    with style():
        figure, axes = new_figure(4.7, 3.0)
        axes.margins(x=0.18, y=0.22)
        for point in points:
            axes.errorbar(
                point.psnr,
                point.accuracy,
                point.deviation,
                fmt="o",
                color=point.color,
                markersize=6,
                elinewidth=1.0,
            )
        low, high = axes.get_xlim()
        for point in points:
            left = point.psnr > (low + high) / 2
            axes.annotate(
                point.label, (point.psnr, point.accuracy), (-8 if left else 8, 5), textcoords="offset points",
                ha="right" if left else "left", color=point.color, size=9,
            )  # fmt: skip
        if encoder_accuracy is not None:
            axes.axhline(encoder_accuracy, color=INK, alpha=0.55, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(
                "encoder features", (1, encoder_accuracy), (-2, 4), xycoords=axes.get_yaxis_transform(),
                textcoords="offset points", ha="right", color=INK, alpha=0.75, size=8.5,
            )  # fmt: skip
        axes.set_xlabel("PSNR of the reconstructions [dB]")
        words = "; ".join(f"{p.label}: {p.psnr:.2f} dB, accuracy {p.accuracy:.3f}" for p in points)
        return Plot("Linear-probe accuracy of the latents", to_svg(figure), f"Linear probe against PSNR. {words}.")


def time_bars(times: Mapping[str, float]) -> Plot:
    """Horizontal bars of the seconds that each part took, in the order in which the parts ran."""
    if not times or not all(math.isfinite(seconds) and seconds >= 0 for seconds in times.values()):
        raise UserError(f"time per part: expected a non-negative number of seconds for each part, got {dict(times)}")
    with style():
        figure, axes = new_figure(4.7, 0.2 + 0.28 * len(times))
        rows = list(range(len(times)))
        colors = [COLORS.get(part, OTHER) for part in times]
        axes.barh(rows, list(times.values()), color=colors, height=0.56)
        for row, seconds in zip(rows, times.values(), strict=True):
            axes.annotate(
                duration(seconds),
                (seconds, row),
                (5, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                size=8.5,
            )
        axes.set_yticks(rows, [name_of(part) for part in times], size=9)
        axes.invert_yaxis()
        axes.set_xlim(0, max(times.values()) * 1.28 or 1)
        axes.set_xticks([])
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        words = "; ".join(f"{name_of(part)}: {duration(seconds)}" for part, seconds in times.items())
        return Plot("Time per part", to_svg(figure), f"Time per part. {words}.")
