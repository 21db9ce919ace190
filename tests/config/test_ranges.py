"""Values that no run can have: refused in one line, before anything is read; a field without a range has a reason."""

import dataclasses
import math
import re
from typing import get_type_hints

import pytest
from helpers import tiny_recipe

from aligntok.cli import main
from aligntok.config import (
    AlignmentConfig,
    DataConfig,
    DecoderConfig,
    DinoDiscriminatorConfig,
    EncoderConfig,
    EvaluationConfig,
    MAETokLossConfig,
    RAEConfig,
    Recipe,
    SamplerConfig,
    SpikeConfig,
    TextEncoderConfig,
)
from aligntok.config.from_dict import from_dict
from aligntok.config.ranges import RANGES, check_ranges
from aligntok.config.recipes import read_recipe, recipe_path, shipped
from aligntok.errors import UserError

# Numbers that may be anything, or that are checked where it is known what they must fit
FREE = {
    (DataConfig, "image_size"): "a multiple of the tokenizer's downsampling: geometry.check_size",
    (DataConfig, "held_out"): "leaves images to train on: ImageSet.split",
    (EncoderConfig, "layer"): "a block of the network, from the end too: Encoder",
    (TextEncoderConfig, "layer"): "a layer of the model, from the end too: TextEncoder",
    (EncoderConfig, "lora_rank"): "lora.add, where the encoder trains",
    (DecoderConfig, "attention_levels"): "levels that are not there have no attention",
    (SamplerConfig, "guidance"): "check_sampler",
    (EvaluationConfig, "guidance"): "check_sampler",
    (AlignmentConfig, "cosine_margin"): "any is one",
    (AlignmentConfig, "distance_margin"): "any is one",
    (RAEConfig, "image_size"): "that of the images: building.check_size",
    (DinoDiscriminatorConfig, "taps"): "blocks of the network: DinoDiscriminator",
    (MAETokLossConfig, "mask_share"): "two shares in order: MAETokObjective",
}


def numbers(config) -> set[tuple[type, str]]:
    """Class and name of every field that holds numbers, in a configuration and those inside it."""
    found = set()
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            found |= numbers(value)
        elif {"int", "float"} & set(re.findall(r"\w+", str(hint))):
            found.add((type(config), name))
    return found


def test_every_number_has_its_range_or_a_reason():
    recipe = Recipe()
    recipe.generator.training.spike = SpikeConfig()
    found = numbers(recipe)
    assert len(found) > 100
    assert {(kind, name) for kind, name in found if name not in RANGES.get(kind, {})} == FREE.keys()


def test_every_range_is_that_of_a_field():
    for kind, ranges in RANGES.items():
        assert ranges.keys() <= {field.name for field in dataclasses.fields(kind)}, kind


@pytest.mark.parametrize("name", ["defaults", *shipped()])
def test_defaults_and_shipped_recipes_are_within(name):
    check_ranges(Recipe() if name == "defaults" else from_dict(Recipe, read_recipe(recipe_path(name))))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("tokenizer.training.batch_size", 0, "at least 1 image"),
        ("tokenizer.training.batch_size", -4, "at least 1 image"),
        ("generator.training.seed", -1, "a number from 0 to 2147483647"),
        ("generator.training.seed", 2**31, "a number from 0 to 2147483647"),
        ("rival.training.checkpoint_every", 0, "at least 1 step"),
        ("tokenizer.training.profile", -1, "at least 0"),
        ("tokenizer.losses.perceptual_share", 0.0, "more than 0 and at most 1"),
        ("tokenizer.losses.lecam_decay", 1.0, "at least 0 and less than 1"),
        ("tokenizer.stages.stage2.learning_rate", math.nan, "at least 0"),
        ("tokenizer.model.decoder.channel_multipliers", (1, 0), "at least 1"),
        ("generator.betas", (0.9, 1.0), "at least 0 and less than 1"),
        ("generator.sampler.guidance_interval", (0.0, 1.5), "a number from 0 to 1"),
        ("tokenizer.crop", "middle", "random or center"),
        ("tokenizer.losses.gan", "wgan", "hinge or non_saturating"),
        ("tokenizer.stages.stage3.trains", ("decoder", "head"), "encoder, adapter or decoder"),
        ("generator.flow.time_sampling", "normal", "logit_normal or uniform"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(field, value, expected):
    recipe = Recipe()
    *way, last = field.split(".")
    part = recipe
    for name in way:
        part = getattr(part, name)
    setattr(part, last, value)
    with pytest.raises(UserError) as refused:
        check_ranges(recipe)
    assert str(refused.value).startswith(f"{field} is ") and str(refused.value).endswith(f", expected {expected}")


def test_an_empty_list_is_refused():
    recipe = Recipe()
    recipe.rival.vae.networks.channel_multipliers = ()
    with pytest.raises(UserError, match=r"^rival\.vae\.networks\.channel_multipliers is empty"):
        check_ranges(recipe)


@pytest.mark.parametrize("command", ["train-tokenizer", "train-generator", "train-rival", "plan"])
def test_commands_refuse_before_they_read_or_write(command, tmp_path, capsys, monkeypatch):
    recipe = tiny_recipe(tmp_path / "run", tmp_path / "absent")
    recipe.generator.training.batch_size = -4
    monkeypatch.setattr("aligntok.cli.parse_recipe", lambda *_, **__: recipe)
    assert main([command]) == 2
    error = "aligntok: error: generator.training.batch_size is -4, expected at least 1 image\n"
    assert capsys.readouterr().err == error and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trains": ()}, r"stage1\.trains is \[\], expected some of encoder, adapter and decoder, each once"),
        ({"trains": ("decoder", "decoder")}, "each once"),
        ({"trains": ("adapter",)}, r"add decoder, or set tokenizer\.stages\.stage1\.gan_start to 4 for none"),
    ],
)
def test_stages_that_cannot_train_are_refused(changes, told, tmp_path, capsys, monkeypatch):
    recipe = tiny_recipe(tmp_path / "run", tmp_path / "absent", stage1=changes)
    monkeypatch.setattr("aligntok.cli.parse_recipe", lambda *_, **__: recipe)
    for command in (["train-tokenizer"], ["train-tokenizer", "--dry-run"]):
        assert main(command) == 2
        with pytest.raises(UserError, match=told):
            raise UserError(capsys.readouterr().err)
