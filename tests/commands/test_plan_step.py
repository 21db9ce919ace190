"""`plan --step` through the real command: what it prints, what it writes, what it refuses."""

import io
import json
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
from helpers import tiny_config

from aligntok.cli import main
from aligntok.commands import plan_step
from aligntok.commands.plan import PlanConfig
from aligntok.config import LightningDiTConfig, Recipe, RivalConfig
from aligntok.training.monitoring.ledger.kinds import GROUPS
from benchmarks import bench_training_step
from benchmarks.results import Measurement, table


def _small_recipe() -> Recipe:
    recipe = Recipe()
    recipe.data.image_size = 32
    recipe.tokenizer.model = tiny_config()
    recipe.tokenizer.losses.perceptual.kind = "none"
    recipe.tokenizer.training.batch_size = 8
    recipe.generator.model = LightningDiTConfig(size="custom", depth=1, width=32, heads=2)
    recipe.generator.training.batch_size = 8
    return recipe


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("aligntok.cli.parse_recipe", lambda *_, **__: _small_recipe())


def _told(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_it_prints_predictions_and_writes_them(small, tmp_path, capsys):
    file = tmp_path / "step.json"
    assert main(["plan", "--step", "--gpus", "2", "--gpu", "h200", "--json", str(file)]) == 0
    printed = _told(capsys)
    assert "stage1: PREDICTED ledger of one step on 2 x h200, ddp, 4 images on each, bf16" in printed
    assert "generator: PREDICTED ledger of one step on 2 x h200, ddp, 4 images on each, bf16" in printed
    assert "none was measured" in printed and "NVIDIA H200 data sheet" in printed and "(--all: all)" in printed
    found = json.loads(file.read_text())
    assert found["prediction"] is True and found["gpu"] == "h200" and found["measured"] is None
    assert [ledger["part"] for ledger in found["ledgers"]] == ["stage1", "stage2", "stage3", "generator"]
    for ledger in found["ledgers"]:
        names = [variant["variant"] for variant in ledger["variants"]]
        assert names[:2] == ["eager reference", "compiled reference"] and names[-1] == "with fp8 products"
        for variant in ledger["variants"]:
            assert set(variant["groups"]) <= set(GROUPS)
            assert sum(line["device_ms"] for line in variant["lines"]) == pytest.approx(variant["device_ms"], rel=0.01)
            assert variant["images_per_second"] == pytest.approx(8e3 / variant["step_ms"], rel=1e-3)
            peak = ledger["gpus"] * 989e12
            assert variant["mfu"] == pytest.approx(ledger["flops"] / variant["step_ms"] * 1e3 / peak, rel=1e-3)
            assert variant["exposed_ms"] > 0


def test_all_prints_every_line(small, capsys):
    arguments = ["plan", "--step", "--parts", "generator", "--gpus", "1"]
    assert main(arguments) == 0
    short = capsys.readouterr().out
    assert main([*arguments, "--all"]) == 0
    long = capsys.readouterr().out
    assert "all lines of `fused eager`" in long and long.count("\n") > short.count("\n") + 50


def test_b1_is_the_same_in_every_run():
    recipe = Recipe()
    recipe.generator.model = LightningDiTConfig(size="B", classes=1000)
    recipe.generator.training.batch_size = 4
    options = PlanConfig(gpus=[1], step=True)
    first, second = (plan_step.step_plan(recipe, options, ("generator",)) for _ in range(2))
    assert first == second
    assert first["ledgers"][0]["flops"] == pytest.approx(4 * 3 * 46.0e9, rel=0.01)  # 2.98 times the forward pass


def _timed_paths() -> str:
    """Three paths of a training step, as its benchmark prints them."""
    times = {"reference": 0.120, "reference, compiled": 0.080, "fused": 0.060}
    paths = {name: SimpleNamespace(samples=[seconds] * 3) for name, seconds in times.items()}
    with redirect_stdout(io.StringIO()) as printed:
        bench_training_step.report(paths, images=32, flops=22.8e12, rate=7e14)
    return printed.getvalue()


def _measured(tmp_path, **changes) -> str:
    """A gpu_check file with a training step and one operator, as the benchmarks print them."""
    ours = Measurement("B=128 N=256 D=1152 bfloat16", "both", "ours", [1e-3], share=0.8)
    eager = Measurement(ours.case, "both", "eager", [4e-3], share=0.2)
    step = (
        "NVIDIA H100 80GB HBM3, CUDA 13.0\n"
        "loss: reference 1.900000; fused 1.900001\n"
        "LightningDiT-XL/1, 256 tokens, batch 32: 22776 GFLOP a step\n"
        "bf16 autocast; measured matmul rate: 700000 GFLOP/s\n"
        f"{_timed_paths()}"
        "the reference's 399 matrix products alone: 0.0400 s, 80% of the matmul rate, 67% of the step: fused\n"
    )
    parts = [
        {"name": "training step XL/1", "status": 0, "output": step},
        {"name": "bench_adaln", "status": 0, "output": table([[eager, ours]])},
        {"name": "bench_swiglu", "status": 1, "output": table([[eager, ours]])},
        {"name": "tests", "status": "not reached", "output": ""},
    ]
    data = {"device": "NVIDIA H100 80GB HBM3", "torch": "2", "date": "2026-01-02", "parts": parts, **changes}
    file = tmp_path / "gpu_check_nvidia_h100.json"
    file.write_text(json.dumps(data))
    return str(file)


def test_measured_numbers_take_the_place_of_assumed_ones(small, tmp_path, capsys):
    file, told = tmp_path / "step.json", _measured(tmp_path, assumptions={"kernel_us": 2})
    assert main(["plan", "--step", "--parts", "generator", "--gpus", "1", "--measured", told, "--json", str(file)]) == 0
    printed = _told(capsys)
    assert "measured on NVIDIA H100 80GB HBM3, 2026-01-02" in printed
    assert (
        "LightningDiT-XL/1, 256 tokens, batch 32: reference 120.0 ms; reference, compiled 80.0 ms; fused 60.0 ms"
        in printed
    )
    assert "still assumed: convolution_share, attention_share" in printed
    found = json.loads(file.read_text())
    rows = {row["name"]: row for row in found["assumptions"]}
    assert rows["product_share"]["value"] == pytest.approx(0.8 * 700 / 989)
    assert rows["kernel_us"]["value"] == 2 and rows["adaln"]["value"] == 0.8
    assert "swiglu" not in rows  # its benchmark failed
    assert rows["view_us"]["source"].endswith("not measured")
    assert found["measured"]["device"] == "NVIDIA H100 80GB HBM3" and "kernel_us" not in found["measured"]["missing"]


def test_a_file_that_measured_nothing_of_use_leaves_everything_assumed(small, tmp_path, capsys):
    nothing = _measured(tmp_path, parts=[])
    assert main(["plan", "--step", "--parts", "generator", "--gpus", "1", "--measured", nothing]) == 0
    assert "still assumed: product_share, convolution_share" in _told(capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ("[]", "has no device and parts"),
        ('{"device": "x", "parts": [{"name": "y"}]}', "a part without name and output"),
        ('{"device": "x", "parts": [], "assumptions": {"speed": 3}}', "assumptions.speed is 3"),
        ('{"device": "x", "parts": [], "assumptions": {"view_us": -1}}', "assumptions.view_us is -1"),
        ('{"device": "x", "parts": [], "assumptions": 5}', "expected names with numbers"),
    ],
)
def test_what_is_no_file_of_measurements_is_refused_in_one_line(content, message, small, tmp_path, capsys):
    file = tmp_path / "measured.json"
    if content is not None:
        file.write_text(content)
    assert main(["plan", "--step", "--measured", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(file) in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "--gpu", "v100"], "h100-sxm"),
        (["--step", "--gpus", "0"], "expected positive numbers"),
        (["--step", "--gpus", "3", "--config", "quickstart"], "expected a multiple of the 3 processes"),
        (["--all"], "give --step too"),
        (["--measured", "x.json"], "give --step too"),
    ],
)
def test_bad_options_end_with_one_line(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_rival_is_refused(monkeypatch, capsys):
    recipe = _small_recipe()
    recipe.rival = RivalConfig(kind="vae")
    recipe.rival.stage.steps = 1
    monkeypatch.setattr("aligntok.cli.parse_recipe", lambda *_, **__: recipe)
    assert main(["plan", "--step", "--parts", "rival"]) == 2
    assert "not rivals" in capsys.readouterr().err
