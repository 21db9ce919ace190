"""The plan: what is predicted on the meta device is what a CPU allocates, and what the formulas of the field say."""

import json

import pytest
import torch
from helpers import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from aligntok.cli import main, take_dry_run, take_plan_options
from aligntok.commands import plan
from aligntok.config import (
    DiscriminatorConfig,
    GeneratorTrainingConfig,
    LightningDiTConfig,
    LossConfig,
    PerceptualConfig,
    Recipe,
    SemanticConfig,
    StageConfig,
    TokenizerTrainingConfig,
    TrainingConfig,
)
from aligntok.config.parsing import parse_recipe
from aligntok.errors import UserError
from aligntok.kernels import assume_device
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.tokenizer import AlignTok
from aligntok.runtime.autocast import MetaAutocast
from aligntok.runtime.devices import choose_precision
from aligntok.training.conditions import by_label
from aligntok.training.generator_objective import GeneratorObjective
from aligntok.training.monitoring import cost, meta_device

LATENTS = (8, 16, 16)


def _generator(precision: str) -> GeneratorTrainingConfig:
    model = LightningDiTConfig(size="custom", depth=3, width=96, heads=2, classes=5, qk_norm=True)
    return GeneratorTrainingConfig(model=model, training=TrainingConfig(precision=precision))


def _stage2(precision: str) -> tuple[TokenizerTrainingConfig, StageConfig]:
    losses = LossConfig(perceptual=PerceptualConfig(kind="none"), discriminator=DiscriminatorConfig(8, 1))
    config = TokenizerTrainingConfig(model=tiny_config(), losses=losses, training=TrainingConfig(precision=precision))
    return config, StageConfig(("encoder", "adapter", "decoder"), steps=1, semantic=SemanticConfig(weight=1.0))


def _allocated(objective, batch) -> int:
    """Highest sum of what PyTorch's allocator reports during the first step without its optimizers, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        for phase in objective.phases(0):
            phase.loss(batch)[0].backward()
    live = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_generators_memory_is_what_a_cpu_allocates(precision):
    config = _generator(precision)
    predicted = cost.generator_cost(config, LATENTS, micro_batch=8, device_type="cpu")
    model = LightningDiT(config.model, LATENTS[0], LATENTS[1:])
    objective = GeneratorObjective(
        model, lambda b: b["latents"], by_label(model), config, choose_precision("cpu", precision)
    )
    measured = _allocated(objective, meta_device.make_batch(torch.randn(8, *LATENTS), classes=5))
    assert predicted.activations + predicted.gradients == pytest.approx(measured, rel=0.1)
    assert predicted.activations > 5 * predicted.gradients, "the sizes must tell activations from gradients"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_2s_memory_is_what_a_cpu_allocates(precision):
    config, stage = _stage2(precision)
    predicted = cost.tokenizer_cost(config, stage, image_size=64, micro_batch=48, device_type="cpu")
    networks = AlignTok(config.model), PatchDiscriminator(config.losses.discriminator), None, AlignTok(config.model)
    objective = meta_device.stage_objective(config, stage, *networks, choose_precision("cpu", precision))
    measured = _allocated(objective, meta_device.make_batch(torch.rand(48, 3, 64, 64) * 2 - 1, classes=1))
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # Convolutions of bf16 then unfold their input into a workspace, which no prediction has
        assert predicted.activations + predicted.gradients < measured
    else:
        assert predicted.activations + predicted.gradients == pytest.approx(measured, rel=0.1)
    assert predicted.activations > 5 * predicted.gradients


def test_states_are_what_the_optimizers_hold():
    config = _generator("fp32")
    counted = cost.generator_cost(config, LATENTS, micro_batch=2, device_type="cpu")
    model = LightningDiT(config.model, LATENTS[0], LATENTS[1:])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.parameters == {"LightningDiT": (trained, model.positions.numel())}
    assert counted.trained == counted.gradients == 4 * trained
    assert 8 * trained <= counted.optimizer <= 8 * trained + 8 * len(list(model.parameters()))
    assert counted.averages == 4 * (trained + model.positions.numel())


def test_flops_are_those_of_pytorchs_counter():
    config = _generator("fp32")
    counted = cost.generator_cost(config, LATENTS, micro_batch=2, device_type="cpu")
    model = LightningDiT(config.model, LATENTS[0], LATENTS[1:])
    objective = GeneratorObjective(
        model, lambda b: b["latents"], by_label(model), config, choose_precision("cpu", "fp32")
    )
    [phase] = objective.phases(0)
    with FlopCounterMode(display=False) as counter:
        phase.loss(meta_device.make_batch(torch.randn(2, *LATENTS), classes=5))[0].backward()
    assert counted.flops == counter.get_total_flops()


def test_a_gpu_is_charged_the_same_flops_and_less_memory():
    config = _generator("bf16")
    on_cpu, on_gpu = (cost.generator_cost(config, LATENTS, 4, device_type=kind) for kind in ("cpu", "cuda"))
    assert on_gpu.flops == pytest.approx(on_cpu.flops, rel=1e-3)
    assert on_gpu.activations < on_cpu.activations  # no scores of attention


def test_checkpointing_saves_memory_and_full_costs_a_forward_pass():
    none, selective, full = (cost.generator_cost(_generator("bf16"), LATENTS, 4, mode) for mode in plan.CHECKPOINTING)
    assert full.activations < selective.activations < none.activations
    assert selective.flops == none.flops
    assert full.flops == pytest.approx(none.flops * 4 / 3, rel=0.1)


def test_lightning_dit_xl_is_the_published_arithmetic():
    model = LightningDiTConfig(size="XL", classes=1000)
    assert cost.generator_forward_flops(GeneratorTrainingConfig(model=model), (32, 16, 16)) / 1e9 == pytest.approx(
        237.3, abs=0.1
    )


def test_meta_autocast_casts_as_autocast_does():
    linear, norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = linear(torch.ones(2, 4)).dtype
    linear, norm, x = linear.to("meta"), norm.to("meta"), torch.ones(2, 4, device="meta")
    with MetaAutocast(torch.bfloat16):
        assert linear(x).dtype == expected == torch.bfloat16
        assert norm(linear(x)).dtype == torch.bfloat16
        with assume_device("cuda"):
            assert norm(linear(x)).dtype == torch.float32
    with MetaAutocast(None):
        assert linear(x).dtype == torch.float32
    assert linear(x).dtype == torch.float32


def _counted(**values) -> cost.Cost:
    sizes = {"parameters": {}, "trained": 80, "frozen": 5, "gradients": 80, "optimizer": 160, "averages": 80}
    sizes |= {"largest_unit": 10, "micro_batch": 4, "activations": 100, "saved": 90, "flops": 1000}
    return cost.Cost(**sizes | values)


def test_memory_per_gpu():
    alone = plan.memory(_counted(), 1, "ddp")
    assert (alone["total"], alone["sent"]) == (5 + 80 + 80 + 160 + 80 + 100, 0)
    replicated = plan.memory(_counted(), 8, "ddp")
    assert replicated["total"] == alone["total"] and replicated["sent"] == 2 * 80 * 7 // 8
    sharded = plan.memory(_counted(), 8, "fsdp")
    assert sharded["total"] == 5 + (80 + 80 + 160 + 80) // 8 + 3 * 10 + 100
    assert sharded["sent"] == 3 * 80 * 7 // 8


def test_a_straight_line_between_two_counts():
    ends = [_counted(), _counted(micro_batch=12, activations=300, flops=3000)]
    middle = plan._between(ends, 8)
    assert (middle.activations, middle.flops, middle.micro_batch) == (200, 2000, 8)
    config = _generator("bf16")
    low, middle, high = (cost.generator_cost(config, LATENTS, size) for size in (4, 8, 16))
    assert plan._between([low, high], 8).activations == pytest.approx(middle.activations, rel=0.02)
    assert plan._between([low, high], 8).activations >= middle.activations


def _small_recipe() -> Recipe:
    recipe = Recipe()
    recipe.data.image_size = 32
    recipe.tokenizer.model = tiny_config()
    recipe.tokenizer.losses.perceptual.kind = "none"
    recipe.generator.model = LightningDiTConfig(size="custom", depth=1, width=32, heads=2)
    return recipe


def test_plan_prints_predictions_and_writes_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aligntok.cli.parse_recipe", lambda *_, **__: _small_recipe())
    file = tmp_path / "plan.json"
    assert main(["plan", "--gpus", "1", "2", "--gpu", "a100-80gb", "--mfu", "0.3", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "PREDICTED on a100-80gb at 30% of its peak" in printed and "nothing here was measured" in " ".join(
        printed.split()
    )
    found = json.loads(file.read_text())
    assert found["prediction"] is True
    parts = {(row["part"], row["gpus"], row["parallel"], row["checkpointing"]) for row in found["rows"]}
    assert len(parts) == len(found["rows"]) == 3 * 3 + 3 * 3
    one, two = (row for row in found["rows"] if row["part"] == "stage2" and row["parallel"] != "fsdp")
    assert two["micro_batch"] * 2 == one["micro_batch"] == 256
    assert two["images_per_second"] == pytest.approx(2 * one["images_per_second"], rel=1e-3)
    flops = found["parts"]["stage2"]["step_flops_per_image"]
    assert one["images_per_second"] == pytest.approx(0.3 * 312e12 / flops, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mfu", "40"], "expected a share of the peak"),
        (["--gpus", "0"], "expected positive numbers"),
        (["--gpus", "3", "--config", "quickstart"], "expected a multiple of the 3 processes"),
        (["--gpus", "many"], "invalid int value"),
        (["--gpu", "v100"], "a100-80gb"),
        (["--config", "quickstart", "--data.image_size", "70"], "the nearest is 64 or 80"),
    ],
)
def test_bad_options_end_with_one_line(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_plan_options_are_taken_from_among_the_recipes():
    options, rest = take_plan_options(["--config", "x", "--gpus", "1", "8", "--data.path", "y", "--mfu=0.5"])
    assert options == {"gpus": [1, 8], "mfu": 0.5} and rest == ["--config", "x", "--data.path", "y"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "x"], (False, ["--config", "x"])),
        (["--dry-run", "--config", "x"], (True, ["--config", "x"])),
        (["--config", "x", "--dry_run", "true"], (True, ["--config", "x"])),
        (["--dry_run=false", "--a", "true"], (False, ["--a", "true"])),
        (["--dry-run", "false", "--a", "b"], (False, ["--a", "b"])),
    ],
)
def test_dry_run_is_taken_in_every_spelling(arguments, expected):
    assert take_dry_run(arguments) == expected


def test_dry_run_refuses_what_does_not_fit():
    arguments = ["--config", "quickstart", "--tokenizer.model.decoder.channel_multipliers", "[1,2,4]"]
    with pytest.raises(UserError, match="enlarges 4x"):
        plan.dry_run(parse_recipe("train-tokenizer", arguments), ("stage1",))
