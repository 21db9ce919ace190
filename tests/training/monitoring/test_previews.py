"""Previews show what a part has learned, cost no bit of it, and never stop it."""

import io
from pathlib import Path

import pytest
import torch
from helpers import tiny_recipe, write_pictures
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from aligntok.config import Recipe
from aligntok.runtime import files
from aligntok.training.monitoring import telemetry as telemetry_module
from aligntok.training.monitoring.part_log import PartLog
from aligntok.training.monitoring.previews import undisturbed
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.train_generator import train_generator
from aligntok.training.train_tokenizer import TokenizerTraining

PARTS = ("stage1", "stage2", "stage3", "generator")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 20)


def run(recipe: Recipe) -> str:
    """The whole run; returns what it said."""
    said = io.StringIO()
    telemetry = Telemetry(recipe.output, 1, Console(file=said))
    TokenizerTraining(recipe, telemetry).run()
    train_generator(recipe, telemetry)
    return said.getvalue()


def observed(folder: Path, pictures: Path, preview_every: int, profile: int) -> Recipe:
    recipe = tiny_recipe(folder, pictures, stage1={"steps": 5})
    recipe.generator.steps = 7
    for training in (recipe.tokenizer.training, recipe.generator.training):
        training.preview_every, training.precision = preview_every, "bf16"
    recipe.generator.training.profile = profile
    return recipe


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.rglob("model.safetensors")):
        found |= {f"{file.parent.relative_to(folder)}/{k}": v for k, v in load_file(file).items()}
    return found


@pytest.fixture(scope="module")
def watched_run(pictures, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("watched")
    return folder, run(observed(folder, pictures, preview_every=2, profile=1))


def test_watching_leaves_every_weight_as_it_would_have_been(watched_run, pictures, tmp_path, monkeypatch):
    """Previews, counting and profiling against none of them: discriminators, averages and all."""
    monkeypatch.setattr(telemetry_module, "_try_to_count", lambda flops: (None, ""))
    run(observed(tmp_path, pictures, preview_every=0, profile=0))
    plain, watched = weights(tmp_path), weights(watched_run[0])
    assert plain.keys() == watched.keys() and len(plain) > 100
    assert [name for name in plain if not torch.equal(plain[name], watched[name])] == []
    assert not (tmp_path / "previews").exists() and not (tmp_path / "profile").exists()


def test_sheets_are_written_where_they_are_due_and_at_the_end(watched_run):
    names = {p.name for p in (watched_run[0] / "previews").iterdir()}
    due = {"stage1": (2, 4, 5), "stage2": (2, 4), "stage3": (2, 4), "generator": (2, 4, 6, 7)}
    assert names == {f"{part}-{step:08d}.png" for part in PARTS for step in due[part]}
    assert [p.name for p in (watched_run[0] / "profile").iterdir()] == ["generator.json.gz"]


def test_sheets_change_as_training_goes(watched_run):
    for part in PARTS:
        early, late = (watched_run[0] / "previews" / f"{part}-{step:08d}.png" for step in (2, 4))
        assert Image.open(early).size == Image.open(late).size and early.read_bytes() != late.read_bytes()


def test_mfu_is_known_in_every_part(watched_run, pictures, tmp_path):
    records = Telemetry(watched_run[0], 1).records()
    for part in PARTS:
        last = [r for r in records if r["part"] == part][-1]
        assert 0 < last["mfu"] < 10, "of a tiny network on whatever runs beside it"


def test_a_preview_that_fails_is_a_warning(pictures, tmp_path, monkeypatch):
    original = files._flush

    def full(path):
        if path.parent.name == "previews":
            raise OSError(28, "No space left on device")
        original(path)

    monkeypatch.setattr(files, "_flush", full)
    recipe = tiny_recipe(tmp_path, pictures, stage2={"steps": 0}, stage3={"steps": 0})
    recipe.tokenizer.training.preview_every = 2
    said = io.StringIO()
    TokenizerTraining(recipe, Telemetry(tmp_path, 1, Console(file=said))).run()
    assert said.getvalue().count("No space left on device") == 2 and "training goes on" in said.getvalue()
    assert (tmp_path / "tokenizer" / "config.json").is_file()


def test_a_resumed_generator_may_be_watched_otherwise(watched_run, pictures, tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, pictures)
    recipe.generator.tokenizer = str(watched_run[0] / "tokenizer")
    recipe.generator.training.checkpoint_every = 2
    step = PartLog.step

    def fail(self, done, *arguments):
        step(self, done, *arguments)
        if done == 3:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(PartLog, "step", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            train_generator(recipe)
    training = recipe.generator.training
    training.log_every, training.preview_every, training.checkpoint_every = 4, 0, 3
    said = io.StringIO()
    train_generator(recipe, Telemetry(tmp_path, 1, Console(file=said)))
    assert "generator: resumed at step 2 of 4" in said.getvalue()


def test_undisturbed_restores_modes_and_random_state():
    network = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    network[1].eval()
    state, average = torch.get_rng_state(), network[1][0].running_mean.clone()
    with pytest.raises(ZeroDivisionError), undisturbed(torch.device("cpu"), network):
        assert not any(module.training for module in network.modules())
        assert not network(torch.randn(4, 3)).requires_grad
        raise ZeroDivisionError
    assert [module.training for module in network.modules()] == [True, True, False, False]
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(average, network[1][0].running_mean)
