"""The three stages: what each of them changes and what it must not touch."""

import itertools
from pathlib import Path

import pytest
import torch
from helpers import tiny_recipe, write_pictures
from safetensors.torch import load_file

from aligntok.errors import UserError
from aligntok.kernels import use_implementation
from aligntok.models.tokenizer import load_tokenizer
from aligntok.training import loop
from aligntok.training.objective import Schedule
from aligntok.training.train_tokenizer import TokenizerTraining


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures) -> TokenizerTraining:
    training = TokenizerTraining(tiny_recipe(tmp_path_factory.mktemp("run"), pictures))
    training.run()
    return training


def changed_parts(before: dict, after: dict) -> set[str]:
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_each_stage_changes_what_it_trains(run):
    states = [run.pretrained().state_dict()]
    states += [load_file(run.output / s / "tokenizer" / "model.safetensors") for s in ("stage1", "stage2", "stage3")]
    changed = [changed_parts(a, b) for a, b in itertools.pairwise(states)]
    statistics = {"latent_mean", "latent_std"}
    assert changed == [
        {"adapter", "decoder"} | statistics,
        {"encoder", "adapter", "decoder"} | statistics,
        {"decoder"},
    ]


def test_stage3_does_not_move_a_latent_bit(run):
    images = run.source.batch(0)["images"]
    before = load_tokenizer(run.output / "stage2" / "tokenizer")
    after = load_tokenizer(run.output / "stage3" / "tokenizer")
    assert torch.equal(before.encode(images), after.encode(images))
    assert not torch.equal(before.decode(before.encode(images)), after.decode(after.encode(images)))
    assert before.fingerprint() == after.fingerprint()


def test_statistics_normalise_the_training_latents(run):
    tokenizer = load_tokenizer(run.output / "tokenizer")
    latents = tokenizer.encode(torch.cat([run.source.batch(step)["images"] for step in range(4)]))
    assert latents.mean((0, 2, 3)).abs().max() < 0.05
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_values_of_every_loss_are_recorded(run):
    records = {(r["part"], r["step"]): r for r in run.telemetry.records()}
    assert {"l1", "latent_std", "gan", "gan_weight", "discriminator"} <= records["stage1", 4].keys()
    assert "gan" not in records["stage1", 2], "the adversarial loss starts after gan_start steps"
    assert records["stage2", 1]["semantic"] == pytest.approx(0, abs=1e-6), "Stage 2 starts at its snapshot"
    assert records["stage2", 4]["semantic"] > 0
    assert "semantic" not in records["stage3", 4]


def test_semantic_weight_holds_the_latents(tmp_path, pictures):
    drift = {}
    for weight in (0.1, 1000.0):
        recipe = tiny_recipe(
            tmp_path / str(weight),
            pictures,
            stage2={"steps": 12, "semantic": {"weight": weight}, "gan_start": 99, "ema_decay": None},
        )
        training = TokenizerTraining(recipe)
        training.run()
        drift[weight] = training.telemetry.records()[-5]["semantic"]
        assert training.telemetry.records()[-5]["part"] == "stage2"
    assert drift[1000.0] < 0.5 * drift[0.1]


@pytest.mark.parametrize("semantic", [{"weight": 1.0, "kind": "cosine"}, {"weight": 1.0, "position": "before_adapter"}])
def test_ablations_of_the_semantic_loss_run(tmp_path, pictures, semantic):
    recipe = tiny_recipe(tmp_path, pictures, stage2={"semantic": semantic}, stage3={"steps": 0})
    training = TokenizerTraining(recipe)
    training.run()
    assert training.telemetry.records()[-1]["semantic"] > 0


def test_random_crops_run_the_frozen_networks_in_the_loop(tmp_path, pictures):
    recipe = tiny_recipe(tmp_path, pictures)
    recipe.tokenizer.crop = "random"
    training = TokenizerTraining(recipe)
    tokenizer = training.run()
    assert tokenizer.has_statistics
    assert training._features is None


def test_the_fused_gan_loss_is_the_default_and_the_reference_agrees(tmp_path, pictures, monkeypatch):
    results = {}
    for name in ("auto", "reference"):
        with use_implementation(name):
            training = TokenizerTraining(
                tiny_recipe(tmp_path / name, pictures, stage2={"steps": 0}, stage3={"steps": 0})
            )
            training.run()
        results[name] = training.telemetry.records()[-1]
    for key in ("gan", "discriminator", "gan_weight", "l1"):
        assert results["auto"][key] == pytest.approx(results["reference"][key], rel=1e-3, abs=1e-5)


def test_non_finite_steps_are_skipped_counted_and_stop_the_run(tmp_path, pictures, monkeypatch):
    original = loop.run_phase
    said = []

    def poisoned(objective, phase, batch, guard, warn):
        if phase.name == "autoencoder" and poison:
            batch = batch | {"images": batch["images"] * float("nan")}
        return original(objective, phase, batch, guard, said.append)

    monkeypatch.setattr(loop, "run_phase", poisoned)
    recipe = tiny_recipe(tmp_path, pictures)
    recipe.tokenizer.training.nonfinite_limit = 3
    poison = True
    with pytest.raises(UserError, match=r"non-finite .* 3 in a row"):
        TokenizerTraining(recipe).run()
    assert len(said) == 2 and all("non-finite loss in phase autoencoder" in message for message in said)
    poison = False
    assert TokenizerTraining(recipe).run().has_statistics


def test_schedule():
    schedule = Schedule(steps=100, warmup_steps=10, final=0.1)
    factors = [schedule.factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11) and factors[10] == 1.0
    assert factors[100] == pytest.approx(0.1) and factors == factors[:10] + sorted(factors[10:], reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: setattr(r.data, "image_size", 40), "use 32 or 48"),
        (lambda r: setattr(r.tokenizer.training, "device", "cuda"), "sees no CUDA device"),
        (lambda r: setattr(r.tokenizer.training, "device", "tpu"), "expected auto, cpu"),
        (lambda r: setattr(r.tokenizer.training, "precision", "fp8"), "expected auto, bf16, tf32 or fp32"),
        (lambda r: [setattr(s, "steps", 0) for s in vars(r.tokenizer.stages).values()], "nothing to train"),
        (
            lambda r: setattr(r.tokenizer.model.encoder, "name", "vit_smal_patch14_dinov2"),
            "vit_small_patch14_dinov2",
        ),
    ],
)
def test_refusals(tmp_path, pictures, change, message):
    recipe = tiny_recipe(tmp_path, pictures)
    change(recipe)
    if torch.cuda.is_available() and "CUDA" in message:
        recipe.tokenizer.training.device, message = "cuda:99", "99|device"
    with pytest.raises((UserError, RuntimeError), match=message):
        TokenizerTraining(recipe).run()
