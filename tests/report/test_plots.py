"""Plots: well-formed SVG that can share a page, the right curves, the same bytes every time."""

import math
import xml.etree.ElementTree as ET

import matplotlib
import pytest

from aligntok.errors import UserError
from aligntok.report import plots
from aligntok.report.svg import INK

SVG = "{http://www.w3.org/2000/svg}"


def words(plot: plots.Plot) -> set[str]:
    """Every text of a plot."""
    return {"".join(node.itertext()).strip() for node in ET.fromstring(plot.svg).iter(f"{SVG}text")}


def training_records(parts: dict[str, int], **values: float) -> list[dict]:
    return [
        {"part": part, "step": step, "seconds": 0.1 * step, **{k: v / step for k, v in values.items()}}
        for part, steps in parts.items()
        for step in range(10, steps + 1, 10)
    ]


STAGES = training_records({"stage1": 200, "stage2": 100, "stage3": 100}, l1=5.0, perceptual=8.0)


def test_smoothing_keeps_constants_length_and_the_first_value():
    assert plots.smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    noisy = [1 + (-1) ** i for i in range(400)]
    smoothed = plots.smooth(noisy)
    assert len(smoothed) == 400 and smoothed[0] == noisy[0]
    assert max(abs(value - 1) for value in smoothed[200:]) < 0.05


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.3, "9.3 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (192, "3 min 12 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds, text):
    assert plots.duration(seconds) == text


def test_one_plot_per_loss_that_the_records_hold():
    records = STAGES + training_records({"generator": 100}, mse=3.0, loss=3.0)
    curves = plots.loss_curves(records)
    assert [plot.title for plot in curves] == ["L1", "Perceptual distance", "Generator: velocity error"]
    assert {"Stage 1", "Stage 2", "Stage 3", "step"} <= words(curves[0])
    assert curves[0].alt.startswith("L1 over 400 steps. Stage 1: 0.5 to ")
    assert plots.loss_curves([]) == []


def test_stages_follow_one_another_and_the_ablation_branch_lies_over_stage_2():
    branch = training_records({"stage2_w_sp_0": 100}, l1=2.0, perceptual=8.0)
    plain, branched = plots.loss_curves(STAGES)[0], plots.loss_curves(STAGES + branch)[0]
    assert "over 400 steps" in plain.alt and "over 400 steps" in branched.alt
    assert plots.COLORS["stage2_w_sp_0"] in branched.svg.decode()
    assert plots.COLORS["stage2_w_sp_0"] not in plain.svg.decode()
    assert "stroke-dasharray" in branched.svg.decode()


def test_losses_that_change_sign_or_are_missing_or_not_finite_do_not_break_a_plot():
    records = [
        {"part": "stage1", "step": step, "gan": math.sin(step), "l1": math.nan if step % 20 else 0.1 * step}
        for step in range(10, 200, 10)
    ] + [{"part": "stage2", "step": 10, "gan": 0.1}]
    titles = [plot.title for plot in plots.loss_curves(records)]
    assert titles == ["L1", "Adversarial loss of the decoder"]
    assert plots.loss_curves([{"part": "stage1", "step": s, "gan": 0.0} for s in (10, 20)]) == []


def test_wide_positive_ranges_are_logarithmic():
    wide = training_records({"stage1": 400}, l1=10.0)
    narrow = [{"part": "stage1", "step": s, "l1": 1 + s / 1000} for s in range(10, 200, 10)]
    assert {"0.1", "0.5"} <= words(plots.loss_curves(wide)[0])
    assert "1.1" not in words(plots.loss_curves(wide)[0])
    assert any(word.startswith("1.") for word in words(plots.loss_curves(narrow)[0]))


def test_trade_off_names_every_point_and_the_encoder():
    points = [
        plots.Point("Stage 1", 16.9, 0.477, 0.015, plots.COLORS["stage1"]),
        plots.Point("Stage 2, w_sp = 0", 19.7, 0.439, 0.016),
    ]
    plot = plots.trade_off(points, 0.571)
    assert {"Stage 1", "Stage 2, w_sp = 0", "encoder features"} <= words(plot)
    assert "19.70 dB, accuracy 0.439" in plot.alt
    assert "encoder features" not in words(plots.trade_off(points))
    with pytest.raises(UserError, match="no point"):
        plots.trade_off([])


def test_time_bars_show_each_part_with_its_duration():
    plot = plots.time_bars({"features": 9.3, "stage1": 192.0, "my_own_part": 0.0})
    assert {"Encoder features", "9.3 s", "Stage 1", "3 min 12 s", "My own part", "0.0 s"} <= words(plot)
    for wrong in ({}, {"stage1": math.nan}, {"stage1": -1.0}):
        with pytest.raises(UserError, match="time per part"):
            plots.time_bars(wrong)


def every_plot() -> list[plots.Plot]:
    point = plots.Point("Stage 1", 16.9, 0.477, 0.015)
    return [*plots.loss_curves(STAGES), plots.trade_off([point]), plots.time_bars({"stage1": 3.0})]


def test_svg_is_well_formed_follows_the_page_and_needs_nothing_else():
    for plot in every_plot():
        text = plot.svg.decode()
        assert ET.fromstring(text).tag == f"{SVG}svg"
        assert "currentColor" in text and INK not in text
        assert text.count("http") == 1  # its own namespace
        assert "<image" not in text and "<script" not in text and "<style" in text


def test_identifiers_are_used_and_do_not_collide_on_one_page():
    seen: set[str] = set()
    for plot in every_plot():
        root = ET.fromstring(plot.svg)
        ids = [node.get("id") for node in root.iter() if node.get("id")]
        assert len(ids) == len(set(ids)) and not seen & set(ids)
        text = plot.svg.decode()
        assert all(f"#{name}" in text for name in ids)
        references = {node.get("href")[1:] for node in root.iter() if node.get("href")}
        assert references <= set(ids)
        seen |= set(ids)


def test_same_input_gives_the_same_bytes_whatever_the_users_settings():
    first = [plot.svg for plot in every_plot()]
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "lines.linewidth": 9}):
        assert [plot.svg for plot in every_plot()] == first
        assert matplotlib.rcParams["font.size"] == 20


def test_records_without_a_part_are_refused():
    with pytest.raises(UserError, match="expected the keys 'part' and 'step', got \\['l1'\\]"):
        plots.loss_curves([{"l1": 0.1}])
