"""FLOPs counted on the meta device are those that PyTorch's counter finds in real steps, of every part and kind."""

from contextlib import contextmanager

import pytest
import torch
from helpers import tiny_recipe, write_pictures
from torch.utils.flop_counter import FlopCounterMode
from zoo_rivals import rival_recipe, tiny_vae

from aligntok.runtime.world import World, alone, current
from aligntok.training import loop
from aligntok.training.monitoring import cost
from aligntok.training.monitoring.part_log import PartLog
from aligntok.training.train_generator import train_generator
from aligntok.training.train_tokenizer import TokenizerTraining
from aligntok.zoo.train_rival import train_rival

FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _NoModules:
    """Stands in for the counter's attribution to modules, whose hooks refuse autograd.grad at an image."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 20)


@contextmanager
def both_counts():
    """{(part, step): (FLOPs per image that the run goes by, those of PyTorch's counter in the step)}."""
    original, found = loop.take_step, {}

    def no_preview(*_):
        """Which would be counted with the step."""

    def counted(objective, feed, seed, guard, log, step, observe):
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _NoModules()
        with counter:
            original(objective, feed, seed, guard, log, step, observe)
        assert log.watch.flops is not None, "not counted"
        fused = counter.get_flop_counts()["Global"].get(FUSED_BACKWARD, 0)
        # PyTorch charges it for a fifth product, the scores, which it computes again
        found[log.name, step] = (log._flops(step), (counter.get_total_flops() - fused / 5) / 4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", counted)
        patch.setattr(PartLog, "_preview", no_preview)
        yield found


def check(found: dict, steps: int, kinds: int) -> None:
    assert len(found) == steps and all(ours == theirs > 0 for ours, theirs in found.values()), found
    assert len(set(found.values())) == kinds


RUNS = {
    "looked up": ({"crop": "center"}, 7),
    "in the loop and recomputed": ({"crop": "random", "checkpointing": "full"}, 7),
    "micro-batches": ({"crop": "center", "accumulate": 2, "precision": "bf16", "checkpointing": "selective"}, 3),
}


@pytest.mark.parametrize(("changes", "kinds"), RUNS.values(), ids=RUNS)
def test_every_stage_and_the_generator(changes, kinds, pictures, tmp_path):
    steps = {"steps": 3 if kinds == 7 else 0}
    recipe = tiny_recipe(tmp_path, pictures, stage1=steps, stage2={"steps": 3}, stage3=steps | {"decoder_noise": 0.1})
    changes = dict(changes)
    recipe.tokenizer.crop = changes.pop("crop")
    recipe.data.memory_limit_gib = 2.0 if recipe.tokenizer.crop == "center" else 0.0
    recipe.generator.steps = 1
    for training in (recipe.tokenizer.training, recipe.generator.training):
        for name, value in changes.items():
            setattr(training, name, value)
    with both_counts() as found:
        TokenizerTraining(recipe).run()
        train_generator(recipe)
    check(found, steps=10 if kinds == 7 else 4, kinds=kinds)


def test_losses_that_see_a_share_or_tokens_before_the_adapter_and_lora(pictures, tmp_path):
    semantic = {"weight": 1.0, "kind": "cosine", "position": "before_adapter"}
    recipe = tiny_recipe(tmp_path, pictures, stage1={"steps": 1}, stage2={"semantic": semantic}, stage3={"steps": 0})
    recipe.tokenizer.crop, recipe.tokenizer.model.encoder.lora_rank = "random", 2
    recipe.tokenizer.losses.perceptual.kind, recipe.tokenizer.losses.perceptual_share = "st-lpips-alex", 0.3
    with both_counts() as found:
        TokenizerTraining(recipe).run()
    check(found, steps=5, kinds=3)


RIVALS = {
    "vae": ("none", {"vae": tiny_vae("vit"), "crop": "random"}),
    "va-vae": ("none", {"crop": "random"}),
    "rae": ("none", {"discriminator": "dino"}),
    "maetok": ("full", {"crop": "random"}),
    "repa-e": ("full", {"crop": "center"}),
}


@pytest.mark.parametrize("kind", RIVALS)
def test_every_rival(kind, pictures, tmp_path):
    checkpointing, changes = RIVALS[kind]
    recipe = rival_recipe(tmp_path, pictures, kind, **changes)
    recipe.rival.training.checkpointing = checkpointing
    if kind == "rae":
        recipe.rival.stage.discriminator_start = 1
    with both_counts() as found:
        train_rival(recipe)
    check(found, steps=4, kinds=3 if kind == "rae" else 2)


def test_the_head_of_dit_dh_is_counted(pictures, tmp_path):
    recipe = tiny_recipe(tmp_path, pictures, stage2={"steps": 0}, stage3={"steps": 0})
    model = recipe.generator.model
    model.head_depth, model.head_width, model.head_heads = 1, 48, 2
    recipe.generator.training.checkpointing = "full"
    TokenizerTraining(recipe).run()
    with both_counts() as found:
        train_generator(recipe)
    check(found, steps=4, kinds=1)


def test_counting_leaves_random_state_and_devices_as_they_were(tmp_path):
    recipe = tiny_recipe(tmp_path, tmp_path).tokenizer
    state = torch.get_rng_state()
    counted = cost.stage_flops(recipe, recipe.stages.stage2, 32, looked_up=True, device_type="cpu")
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_device().type == "cpu"
    assert counted.keys() == {0, 2} and counted[0] < counted[2]


def test_a_process_of_several_counts_alone(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 8)
    assert current() == World(1, 8)
    with alone():
        assert current() == World(0, 1)
    assert current() == World(1, 8)


def test_once_is_once():
    calls = []

    def work(number):
        calls.append(number)
        return number + 1

    assert [cost.once(work, 1), cost.once(work, 1), cost.once(work, 2)] == [2, 2, 3] and calls == [1, 2]
