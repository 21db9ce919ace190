"""The guard: which layer it names, what a skipped step leaves untouched, spikes, and going back."""

import json
import signal
from pathlib import Path

import pytest
import torch
from helpers import tiny_recipe, write_pictures

from aligntok.config import SpikeConfig
from aligntok.errors import UserError
from aligntok.training import feed, loop
from aligntok.training.recovery.guard import MAX_DUMPS, StopSignals
from aligntok.training.recovery.spikes import SpikeDetector
from aligntok.training.recovery.state import collect
from aligntok.training.tokenizer_objective import TokenizerObjective
from aligntok.training.train_generator import train_generator
from aligntok.training.train_tokenizer import TokenizerTraining

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, pictures) -> Path:
    """A finished tokenizer, for the generator."""
    folder = tmp_path_factory.mktemp("tokenizer")
    TokenizerTraining(tiny_recipe(folder, pictures, **only("stage1"))).run()
    return folder / "tokenizer"


def only(*stages: str) -> dict:
    """Recipe changes with which the other stages are left out."""
    return {name: {"steps": 0} for name in ("stage1", "stage2", "stage3") if name not in stages}


class Injection:
    """Calls `poison(objective, step)` before the given steps and `cure` after them; keeps the state around them."""

    def __init__(self, monkeypatch, poison, steps: range | tuple = (3,), cure=None) -> None:
        original, self.before, self.after, self.objective = loop.take_step, {}, {}, None

        def take_step(objective, feed, seed, guard, log, step, observe):
            self.objective, self.guard = objective, guard
            active = step + 1 in steps
            undo = poison(objective) if active else None
            before = {k: v.clone() for k, v in collect(objective).items()}
            original(objective, feed, seed, guard, log, step, observe)
            if active:
                self.before, self.after = before, {k: v.clone() for k, v in collect(objective).items()}
            if undo is not None:
                undo()

        monkeypatch.setattr(loop, "take_step", take_step)

    def changed(self) -> list[str]:
        """Names in the state that the last poisoned step changed (NaN equals NaN). Moments that an optimizer made for
        a first step that it then left out are zero."""
        assert self.before.keys() <= self.after.keys()
        zero = torch.zeros(())
        pairs = {k: (self.before.get(k, zero.expand(after.shape)), after) for k, after in self.after.items()}
        return [k for k, pair in pairs.items() if not torch.equal(*(x.nan_to_num(7) for x in pair))]


def poison_weight(name: str, module: str):
    def poison(objective):
        weight = dict(objective.modules()[module].named_parameters())[name]
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[(0,) * weight.ndim] = NAN

        def undo():
            with torch.no_grad():
                weight.copy_(kept)

        return undo

    return poison


def poison_output(module: str, layer: str, value: float = NAN):
    def poison(objective):
        target = objective.modules()[module].get_submodule(layer)
        return target.register_forward_hook(lambda *args: args[-1] * value).remove

    return poison


def poison_gradient(module: str, layer: str):
    def poison(objective):
        weight = objective.modules()[module].get_submodule(layer).weight
        return weight.register_hook(lambda gradient: gradient * NAN).remove

    return poison


def dump(folder: Path) -> dict:
    (file,) = (folder / "nonfinite").iterdir()
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("stage", "poison", "layer", "what", "phase"),
    [
        (
            "stage2",
            poison_weight("backbone.blocks.1.mlp.fc1.weight", "encoder"),
            "encoder.backbone.blocks.1.mlp.fc1.weight",
            "weight",
            "autoencoder",
        ),
        ("stage2", poison_weight("projection.weight", "adapter"), "adapter.projection.weight", "weight", "autoencoder"),
        ("stage1", poison_weight("norm_out.weight", "decoder"), "decoder.norm_out.weight", "weight", "autoencoder"),
        ("stage1", poison_output("decoder", "levels.1"), "decoder.levels.1", "output", "autoencoder"),
        ("stage3", poison_output("decoder", "levels.2.blocks.0.conv1", INF), "conv1", "output", "autoencoder"),
        ("stage1", poison_gradient("discriminator", "layers.2"), "discriminator.layers.2.weight", "gradient", "discr"),
        ("stage1", poison_gradient("decoder", "middle.0.conv2"), "decoder.middle.0.conv2.weight", "gradient", "auto"),
    ],
)
def test_a_transient_one_is_named_and_leaves_everything_as_it_was(
    stage, poison, layer, what, phase, pictures, tmp_path, monkeypatch
):
    injection = Injection(monkeypatch, poison)
    recipe = tiny_recipe(tmp_path, pictures, **only(stage))
    recipe.tokenizer.losses.lecam_weight = 1e-3
    training = TokenizerTraining(recipe)
    training.run()
    found = dump(tmp_path)
    assert layer in found["layer"] and found["what"].startswith(what) and found["phase"].startswith(phase)
    assert (found["part"], found["step"]) == (stage, 3)
    assert len(found["pictures"]) == 4 and all(rate > 0 for rate in found["learning_rates"])
    worst = [entry["norm"] for entry in found["gradient_norms"]]
    assert 0 < len(worst) <= 10 and worst[0] in ("nan", "inf")
    changed = injection.changed()
    if phase == "discr":  # the autoencoder's step was taken before
        assert changed, "the discriminator's running statistics are part of that step"
        own = [name for name in changed if "discriminator" in name or "lecam" in name]
        assert [name for name in own if "running" not in name and "num_batches" not in name] == []
    else:
        assert changed == []
    assert injection.guard.skipped == 1 and injection.guard.in_a_row == 0
    records = [r for r in training.telemetry.records() if r["part"] == stage]
    assert [r["step"] for r in records] == [1, 2, 3, 4] and "l1" in records[3], "the run goes on"


def test_the_averages_of_stage_2_do_not_count_a_skipped_step(pictures, tmp_path, monkeypatch):
    injection = Injection(monkeypatch, poison_weight("hidden.weight", "adapter"), steps=(2, 3))
    TokenizerTraining(tiny_recipe(tmp_path, pictures, **only("stage2"))).run()
    assert injection.changed() == [] and int(injection.objective.ema.n_averaged) == 2


def test_a_picture_that_is_not_finite_is_named(pictures, tmp_path, monkeypatch):
    original = feed.move

    def move(batch, device):
        batch = original(batch, device)
        batch["images"][2, 0, 5, 5] = NAN
        return batch

    monkeypatch.setattr(feed, "move", move)
    recipe = tiny_recipe(tmp_path, pictures, **only("stage1"))
    recipe.tokenizer.crop = "random"
    recipe.tokenizer.training.nonfinite_limit = 1
    with pytest.raises(UserError, match=r"batch\['images'\] \(input, rows \[2\], pictures \["):
        TokenizerTraining(recipe).run()
    found = dump(tmp_path)
    assert len(found["files"]) == 4 and all(name.endswith(".png") for name in found["files"])


def generator_recipe(folder: Path, pictures: Path, tokenizer: Path):
    recipe = tiny_recipe(folder, pictures)
    recipe.generator.tokenizer = str(tokenizer)
    recipe.generator.model.depth = 2
    return recipe


def test_logits_that_overflow_name_their_block_and_advise_qk_norm(pictures, tokenizer, tmp_path, monkeypatch):
    def poison(objective):
        layer = objective.model.blocks[1].attention.qkv
        scale = torch.ones(96)
        scale[:64] = 1e25  # q and k are finite, their product is not
        return layer.register_forward_hook(lambda *args: args[-1] * scale).remove

    injection = Injection(monkeypatch, poison, steps=range(100))
    recipe = generator_recipe(tmp_path, pictures, tokenizer)
    recipe.generator.training.nonfinite_limit = 2
    recipe.generator.gradient_clip = None
    with pytest.raises(UserError, match=r"blocks\.1\.attention \(its own computation, before .*proj") as stopped:
        train_generator(recipe)
    assert all(word in str(stopped.value) for word in ("2 in a row", "qk_norm=true", "gradient_clip", "learning rate"))
    assert injection.changed() == [] and injection.objective.ema.n_averaged == 0


def test_qk_norm_is_not_advised_where_it_is_on(pictures, tokenizer, tmp_path, monkeypatch):
    Injection(monkeypatch, poison_weight("final.linear.weight", "model"), steps=range(100))
    recipe = generator_recipe(tmp_path, pictures, tokenizer)
    recipe.generator.training.nonfinite_limit, recipe.generator.model.qk_norm = 2, True
    with pytest.raises(UserError, match=r"model\.final\.linear\.weight \(weight\).*learning rate") as stopped:
        train_generator(recipe)
    assert "qk_norm=" not in str(stopped.value) and "gradient_clip" not in str(stopped.value)


def test_there_are_not_many_dumps(pictures, tmp_path, monkeypatch):
    Injection(monkeypatch, poison_weight("conv_in.weight", "decoder"), steps=range(100))
    stage = {"steps": MAX_DUMPS + 3, "gan_start": 99}
    recipe = tiny_recipe(tmp_path, pictures, **{**only("stage1"), "stage1": stage})
    recipe.tokenizer.training.nonfinite_limit = 99
    TokenizerTraining(recipe).run()
    assert len(list((tmp_path / "nonfinite").iterdir())) == MAX_DUMPS


def test_a_failing_discriminator_counts_although_the_autoencoder_steps(pictures, tmp_path, monkeypatch):
    Injection(monkeypatch, poison_gradient("discriminator", "layers.0"), steps=range(100))
    recipe = tiny_recipe(tmp_path, pictures, **only("stage1"))
    recipe.tokenizer.training.nonfinite_limit = 2
    with pytest.raises(UserError, match=r"in phase discriminator of step 4.* 2 in a row"):
        TokenizerTraining(recipe).run()


def test_what_a_second_pass_does_not_show_is_said_so(pictures, tmp_path, monkeypatch):
    original, calls = TokenizerObjective._reconstruction_loss, []

    def once(self, batch):
        loss, values = original(self, batch)
        calls.append(1)
        return loss * (NAN if len(calls) == 2 else 1), values

    monkeypatch.setattr(TokenizerObjective, "_reconstruction_loss", once)
    TokenizerTraining(tiny_recipe(tmp_path, pictures, **only("stage1"))).run()
    found = dump(tmp_path)
    assert found["step"] == 2 and found["non_finite"] == "loss" and found["values"]["loss"] == "nan"
    assert found["what"] == "gradient", "the loss was sound the second time, the gradients of the first time are there"


# spikes


def judged(losses, parts=("l1",), **config) -> list[int]:
    detector = SpikeDetector(SpikeConfig(window=16, **config))
    return [index for index, loss in enumerate(losses) if detector.judge(loss, list(parts))]


def test_spikes_are_what_stands_out():
    torch.manual_seed(0)
    losses = (1 + 0.05 * torch.randn(300)).tolist()
    assert judged(losses) == []
    losses[100], losses[200] = 1.6, 3.0
    assert judged(losses) == [100, 200]
    assert judged(losses, factor=15) == [200]


def test_neither_a_trend_nor_the_first_losses_are_spikes():
    assert judged([10 * 0.99**step for step in range(200)]) == []
    assert judged([1.0] * 15 + [9.0]) == []
    assert judged([1.0] * 20 + [1.1] * 20) == [], "a loss that hardly moves may"


def test_a_lasting_rise_is_reported_once_and_becomes_the_norm():
    assert judged([1.0] * 20 + [3.0] * 40 + [9.0]) == [20, 60]


def test_a_loss_of_other_parts_is_judged_anew():
    detector = SpikeDetector(SpikeConfig(window=4))
    for _ in range(4):
        assert detector.judge(1.0, ["l1"]) is None
    assert detector.judge(50.0, ["gan", "l1"]) is None


def test_the_detector_goes_on_from_its_state():
    torch.manual_seed(0)
    losses = (1 + 0.2 * torch.randn(80)).abs().tolist()
    straight, resumed = (SpikeDetector(SpikeConfig(window=8, factor=1.0)) for _ in range(2))
    expected = [straight.judge(loss, ["l1"]) for loss in losses]
    for index, loss in enumerate(losses):
        if index % 7 == 0:
            resumed.load_state(json.loads(json.dumps(resumed.state())))
        assert resumed.judge(loss, ["l1"]) == expected[index]
    assert any(expected)


def spiky(recipe, monkeypatch, bad: set[int]):
    """Losses jump wherever the batches of the given positions are seen; returns the positions in order."""
    original, positions = TokenizerObjective._reconstruction_loss, []

    class Source:
        def __init__(self, source):
            self.source = source

        def batch(self, position):
            positions.append(position)
            return self.source.batch(position)

    def loss(self, batch):
        value, values = original(self, batch)
        return value * (100 if positions[-1] in bad else 1), values

    monkeypatch.setattr(TokenizerObjective, "_reconstruction_loss", loss)
    take_step = loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda o, s, *rest: take_step(o, Source(s), *rest))
    return positions


def spike_recipe(folder, pictures, **spike):
    stage = {"steps": 12, "gan_start": 99, "learning_rate": 1e-5}
    recipe = tiny_recipe(folder, pictures, **{**only("stage1"), "stage1": stage})
    recipe.tokenizer.training.checkpoint_every = 3
    recipe.tokenizer.training.spike = SpikeConfig(window=4, factor=20.0, **spike)
    return recipe


def test_a_spike_is_reported_and_the_step_taken(pictures, tmp_path, monkeypatch, capsys):
    recipe = spike_recipe(tmp_path, pictures)
    positions = spiky(recipe, monkeypatch, {7})
    TokenizerTraining(recipe).run()
    assert positions == list(range(12))
    assert "is a spike" in " ".join(capsys.readouterr().err.split())


def test_rewinding_leaves_out_the_batches_since_the_checkpoint(pictures, tmp_path, monkeypatch):
    recipe = spike_recipe(tmp_path, pictures, rewind=True)
    positions = spiky(recipe, monkeypatch, {7, 13})
    training = TokenizerTraining(recipe)
    training.run()
    # spike in step 8 (position 7): back to step 6, on with 8; position 13 is step 12: back to step 9, on with 14
    assert positions == [*range(8), *range(8, 14), *range(14, 17)]
    records = training.telemetry.records()
    assert [r["step"] for r in records] == list(range(1, 13)), "each step once"
    assert max(r["loss"] for r in records) < 10 * min(r["loss"] for r in records)


def test_a_run_that_is_stopped_after_rewinding_goes_on_alike(pictures, tmp_path, monkeypatch):
    runs = {}
    for name in ("straight", "stopped"):
        recipe = spike_recipe(tmp_path / name, pictures, rewind=True)
        with monkeypatch.context() as patch:
            positions = spiky(recipe, patch, {7, 13})
            if name == "stopped":
                step_once, stop = loop.take_step, {5, 10}

                def crash_once(o, feed, seed, guard, log, step, *rest, stop=stop, step_once=step_once):
                    step_once(o, feed, seed, guard, log, step, *rest)
                    if step in stop:
                        stop.discard(step)
                        raise RuntimeError("power cut")

                patch.setattr(loop, "take_step", crash_once)
                for _ in range(2):
                    with pytest.raises(RuntimeError, match="power cut"):
                        TokenizerTraining(recipe).run()
            training = TokenizerTraining(recipe)
            training.run()
            assert positions[-1] == 16
        runs[name] = [r["loss"] for r in training.telemetry.records()]
    assert len(runs["straight"]) == 12 and runs["straight"] == runs["stopped"]


def test_spikes_without_end_stop_the_run(pictures, tmp_path, monkeypatch):
    recipe = spike_recipe(tmp_path, pictures, rewind=True, max_rewinds=2)
    spiky(recipe, monkeypatch, set(range(7, 99)))
    with pytest.raises(UserError, match=r"gone back to step 6 2 times and spikes again.*learning rate"):
        TokenizerTraining(recipe).run()


def test_a_spike_before_the_first_checkpoint_goes_back_to_the_start(pictures, tmp_path, monkeypatch):
    recipe = spike_recipe(tmp_path, pictures, rewind=True)
    recipe.tokenizer.training.checkpoint_every = 100
    positions = spiky(recipe, monkeypatch, {5})
    TokenizerTraining(recipe).run()
    assert positions == [*range(6), *range(6, 18)]


def test_a_handler_from_outside_of_python_gives_way_to_the_default(monkeypatch):
    handlers = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.append((number, handler)))  # None: not ours
    with StopSignals():
        handlers.clear()
    assert handlers == [(signal.SIGINT, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_DFL)]
