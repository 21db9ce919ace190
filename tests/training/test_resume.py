"""Resuming: to the bit, after a signal, after a kill, past a damaged checkpoint, on a full disk."""

import os
import random
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_recipe, write_pictures
from safetensors.torch import load_file

from aligntok.errors import UserError
from aligntok.runtime import files
from aligntok.training import loop
from aligntok.training.monitoring.telemetry import PartLog
from aligntok.training.recovery.guard import Interrupted
from aligntok.training.train_generator import train_generator
from aligntok.training.train_tokenizer import TokenizerTraining

STAGES = ("stage1", "stage2", "stage3")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 20)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.rglob("model.safetensors")):
        found |= {f"{file.parent.relative_to(folder)}/{k}": v for k, v in load_file(file).items()}
    return found


def run_all(recipe) -> dict[str, torch.Tensor]:
    TokenizerTraining(recipe).run()
    train_generator(recipe)
    return weights(Path(recipe.output))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, pictures) -> dict[str, torch.Tensor]:
    return run_all(tiny_recipe(tmp_path_factory.mktemp("straight"), pictures))


def signal_at(part: str, step: int, number: int, monkeypatch) -> None:
    """Send this process a signal when `part` logs `step`, once."""
    original = PartLog.step

    def step_then_signal(self, done, values, images):
        original(self, done, values, images)
        if (self.name, done) == (part, step):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(PartLog, "step", step_then_signal)


@pytest.mark.parametrize(
    ("part", "number"),
    [
        ("stage1", signal.SIGINT),
        ("stage2", signal.SIGTERM),
        ("stage3", signal.SIGINT),
        ("generator", signal.SIGTERM),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(part, number, pictures, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(part, 3, number, patch)
        with pytest.raises(Interrupted) as stopped:
            run_all(tiny_recipe(tmp_path, pictures))
    assert stopped.value.exit_code == 128 + number
    assert (tmp_path / "checkpoints" / part / "step-00000003").is_dir()
    resumed = run_all(tiny_recipe(tmp_path, pictures))
    assert resumed.keys() == uninterrupted.keys()
    assert [name for name in resumed if not torch.equal(resumed[name], uninterrupted[name])] == []
    assert not (tmp_path / "checkpoints" / part).exists(), "a finished part keeps no checkpoints"


def test_resuming_from_streamed_images_with_noise_is_exact_too(pictures, tmp_path, monkeypatch):
    found = {}
    for name in ("straight", "interrupted"):
        recipe = tiny_recipe(tmp_path / name, pictures, stage2={"steps": 0}, stage3={"steps": 0})
        recipe.tokenizer.crop, recipe.tokenizer.stages.stage1.decoder_noise = "random", 0.3
        if name == "interrupted":
            with monkeypatch.context() as patch:
                signal_at("stage1", 2, signal.SIGINT, patch)
                with pytest.raises(Interrupted):
                    TokenizerTraining(recipe).run()
        TokenizerTraining(recipe).run()
        found[name] = weights(tmp_path / name)
    assert all(torch.equal(found["straight"][name], found["interrupted"][name]) for name in found["straight"])


def test_only_torch_draws_random_numbers(pictures, tmp_path):
    """What else would have to be seeded at every step."""
    before = random.getstate(), np.random.get_state()
    run_all(tiny_recipe(tmp_path, pictures))
    after = random.getstate(), np.random.get_state()
    assert before[0] == after[0] and all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))


@pytest.mark.parametrize("left", [".tokenizer.0123abcd.tmp", ".discriminator.0123abcd.tmp"])
def test_what_a_kill_leaves_at_the_end_of_a_part_is_cleared_away(left, pictures, tmp_path):
    recipe = tiny_recipe(tmp_path, pictures, stage2={"steps": 0}, stage3={"steps": 0})
    TokenizerTraining(recipe).run()
    (tmp_path / "stage1" / left).mkdir()
    (tmp_path / "checkpoints" / "stage1" / "step-00000003").mkdir(parents=True)
    (tmp_path / "tokenizer").rename(tmp_path / ".tokenizer.89abcdef.old")
    TokenizerTraining(recipe).run()
    assert not list(tmp_path.rglob(".*")) and not (tmp_path / "checkpoints" / "stage1").exists()
    assert (tmp_path / "tokenizer" / "model.safetensors").is_file()


def test_records_of_a_resumed_run_are_those_of_an_uninterrupted_one(pictures, tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, pictures)
    with monkeypatch.context() as patch:
        signal_at("stage1", 2, signal.SIGINT, patch)
        with pytest.raises(Interrupted):
            TokenizerTraining(recipe).run()
    training = TokenizerTraining(recipe)
    training.run()
    taken = [(r["part"], r["step"]) for r in training.telemetry.records()]
    assert taken == [(stage, step) for stage in STAGES for step in (1, 2, 3, 4)]


def crash(message: str):
    raise RuntimeError(message)


def damaged_run(pictures, folder, monkeypatch):
    """Stop hard after step 3 with a checkpoint at every step."""
    recipe = tiny_recipe(folder, pictures)
    recipe.tokenizer.training.checkpoint_every = 1
    original = loop.run_phase
    calls = []

    def fail_late(*arguments):
        calls.append(1)
        return crash("power cut") if len(calls) > 4 else original(*arguments)  # steps 1, 2: one phase; 3: two

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_phase", fail_late)
        with pytest.raises(RuntimeError, match="power cut"):
            TokenizerTraining(recipe).run()
    return recipe, folder / "checkpoints" / "stage1"


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(pictures, uninterrupted, tmp_path, monkeypatch):
    recipe, folder = damaged_run(pictures, tmp_path, monkeypatch)
    assert [p.name for p in sorted(folder.iterdir())] == ["step-00000002", "step-00000003"]
    newest = folder / "step-00000003" / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(bytes(data))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = run_all(recipe)
    assert any("step-00000003 is damaged" in str(w.message) for w in caught)
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


def test_a_checkpoint_of_another_configuration_is_refused(pictures, tmp_path, monkeypatch):
    recipe, _ = damaged_run(pictures, tmp_path, monkeypatch)
    recipe.tokenizer.stages.stage1.learning_rate *= 2
    with pytest.raises(UserError, match="another configuration"):
        TokenizerTraining(recipe).run()


def test_a_checkpoint_of_pictures_that_can_no_longer_be_read_is_refused(tmp_path, monkeypatch):
    """They would shift the order of all others."""
    pictures = write_pictures(tmp_path / "pictures", 20)
    recipe, _ = damaged_run(pictures, tmp_path / "run", monkeypatch)
    for picture in sorted(pictures.rglob("*.png"))[:5]:  # more than are held out
        picture.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"another configuration.*images"):
        TokenizerTraining(recipe).run()


@pytest.mark.parametrize("part", ["stage1", "generator"])
def test_images_are_known_by_what_they_are_and_not_by_where_they_lie(
    part, pictures, uninterrupted, tmp_path, monkeypatch
):
    """Another spelling, a link, a copy on another disk: the same run goes on. Other images of the same names: not."""
    with monkeypatch.context() as patch:
        signal_at(part, 2, signal.SIGINT, patch)
        with pytest.raises(Interrupted):
            run_all(tiny_recipe(tmp_path / "run", pictures))
    copy, link, other = tmp_path / "scratch/job-1", tmp_path / "link", tmp_path / "other"
    shutil.copytree(pictures, copy)
    shutil.copytree(pictures, other)
    link.symlink_to(copy)
    picture = next(other.rglob("*.png"))
    picture.write_bytes(picture.read_bytes() + b"more")
    with pytest.raises(UserError, match="another configuration or other images: image_set was"):
        run_all(tiny_recipe(tmp_path / "run", other))
    monkeypatch.chdir(tmp_path)
    for name, spelled in (("a", "link"), ("b", "scratch/../scratch/job-1/"), ("c", str(copy))):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        resumed = run_all(tiny_recipe(tmp_path / name, Path(spelled)))
        assert all(torch.equal(resumed[key], uninterrupted[key]) for key in uninterrupted)


def test_weights_that_the_checkpoint_replaces_need_not_be_drawn_alike(pictures, uninterrupted, tmp_path, monkeypatch):
    """Another kind of processor rounds them otherwise in the last bit."""
    recipe, _ = damaged_run(pictures, tmp_path, monkeypatch)
    drawn = TokenizerTraining.pretrained

    def elsewhere(self):
        tokenizer = drawn(self)
        with torch.no_grad():
            for parameter in (*tokenizer.adapter.parameters(), *tokenizer.decoder.parameters()):
                parameter.copy_(torch.nextafter(parameter, torch.tensor(torch.inf)))
        return tokenizer

    monkeypatch.setattr(TokenizerTraining, "pretrained", elsewhere)
    resumed = run_all(recipe)
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


def test_a_full_disk_leaves_the_previous_checkpoint(pictures, tmp_path, monkeypatch):
    recipe, folder = damaged_run(pictures, tmp_path, monkeypatch)
    before = {p.name for p in folder.iterdir()}

    def no_space(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_flush", no_space)
        with pytest.raises(UserError, match=r"No space left on device.*untouched"):
            TokenizerTraining(recipe).run()
    assert {p.name for p in folder.iterdir()} == before
    TokenizerTraining(recipe).run()


def test_a_finished_stage_is_not_run_again(pictures, tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, pictures)
    TokenizerTraining(recipe).run()
    monkeypatch.setattr(loop, "run_phase", lambda *_: crash("trained again"))
    TokenizerTraining(recipe).run()
