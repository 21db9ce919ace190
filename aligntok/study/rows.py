"""Rows of the study: one recipe of configs/study for one seed, in a folder of its own."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from aligntok.config import Recipe
from aligntok.config.from_dict import from_dict
from aligntok.config.recipes import merge, read_recipe, recipe_path
from aligntok.errors import UserError
from aligntok.runtime.files import read_document, unfinished_folder, write_bytes
from aligntok.training.train_tokenizer import STAGES

COMPARED = {  # recipe: name in print
    "vae": "VAE",
    "va_vae": "VA-VAE, CNN",
    "va_vae_vit": "VA-VAE, ViT",
    "rae": "RAE",
    "flux": "FLUX autoencoder",
    "maetok": "MAETok",
    "repa_e": "REPA-E",
    "aligntok_d16": "AlignTok, d = 16",
    "aligntok": "AlignTok, d = 32",
    "aligntok_d64": "AlignTok, d = 64",
}
ABLATIONS = {  # against "aligntok"
    "stage1_only": "Stage 1 only",
    "w_sp_5": "w_sp = 5",
    "w_sp_0": "w_sp = 0",
    "before_adapter": "L_sp before the adapter",
    "cosine": "cosine L_sp",
    "lora": "LoRA on the encoder",
    "random_encoder": "random encoder",
    "three_stages": "with Stage 3",
}
NAMES = COMPARED | ABLATIONS
TEXT = ("vae", "va_vae", "flux", "aligntok")  # the rows of a study with captions: the paper's rivals there, and the VAE
GENERATOR_OF_TEXT = "text"  # the recipe whose generator they have
STAGE_BY_STAGE = "three_stages"  # the row whose stages are measured one by one
STUDY = "study.json"  # in the study's folder


@cache
def values_of(name: str) -> dict[str, Any]:
    """Values of the recipe configs/study/NAME.yaml with its bases; to be read only."""
    return read_recipe(recipe_path(f"study/{name}"))


@dataclass(frozen=True)
class Row:
    """One tokenizer with its generator, for one seed."""

    name: str
    seed: int
    output: Path  # of the whole study
    budget: int = 1  # factor on the recipes' numbers of steps
    text: bool = False  # whether its generator reads captions

    @property
    def folder(self) -> Path:
        return self.output / self.name / f"seed-{self.seed}"

    @property
    def is_rival(self) -> bool:
        """Whether `train_rival` trains it."""
        return "rival" in values_of(self.name)

    def recipe(self) -> Recipe:
        """The row's recipe, with its seed, folder and budget."""
        values = values_of(self.name)
        if self.text:
            values = merge(values, {"generator": values_of(GENERATOR_OF_TEXT)["generator"]})
        recipe: Recipe = from_dict(Recipe, values)
        _lengthen(recipe, self.budget)
        recipe.output = str(self.folder)
        for training in (recipe.tokenizer.training, recipe.generator.training, recipe.rival.training):
            training.seed = self.seed
        return recipe


def _lengthen(recipe: Recipe, budget: int) -> None:
    """Multiply all numbers of steps; adversarial losses keep their share of them."""
    stages = recipe.tokenizer.stages
    for stage in (stages.stage1, stages.stage2, stages.stage3, recipe.rival.stage):
        stage.steps *= budget
        stage.gan_start *= budget
    recipe.generator.steps *= budget
    recipe.generator.snapshot_every *= budget


def remember(output: Path, budget: int, samples: int, text: bool = False) -> None:
    """Write down what all numbers in the folder depend on; UserError where they were taken with something else."""
    asked = {"budget": budget, "samples": samples} | ({"text": True} if text else {})
    known = {"budget": 1, "samples": samples} | _known(output)
    if any(output.glob("*/seed-*")) and known != asked:
        told = [", ".join(f"{key} {value}" for key, value in values.items()) for values in (known, asked)]
        raise UserError(
            f"{output} holds a study of {told[0]}, and {told[1]} was asked for: give another --output, or the same"
        )
    write_bytes(output / STUDY, json.dumps(asked).encode())


def known_budget(output: Path) -> int:
    """The factor that the rows of a folder were trained with."""
    return _known(output).get("budget", 1)


def reads_captions(output: Path) -> bool:
    """Whether the generators of a folder do."""
    return bool(_known(output).get("text", False))


def _known(output: Path) -> dict[str, int]:
    return read_document(output / STUDY)


def choose(names: list[str] | None, text: bool = False) -> list[str]:
    """Names of the rows to run, in the order of the tables; None = all. UserError for an unknown one, or for none."""
    every = TEXT if text else tuple(NAMES)
    if names is not None and not names:
        raise UserError(f"--only names no row: leave it out for all, or name some of {', '.join(every)}")
    unknown = [name for name in names or [] if name not in every]
    if unknown:
        raise UserError(f"no row {', '.join(unknown)} in the study; its rows are {', '.join(every)}")
    return [name for name in every if names is None or name in names]


def borrow_stages(row: Row, others: list[Row]) -> None:
    """Copy finished stages from rows that take the same course up to them: most ablations share Stage 1."""
    for stage in STAGES:
        place = row.folder / stage
        if (place / "tokenizer" / "config.json").is_file():
            continue
        for other in others:
            given = other.folder / stage
            if (given / "tokenizer" / "config.json").is_file() and _course(row, stage) == _course(other, stage):
                copy_folder(given / "discriminator", place / "discriminator")
                copy_folder(given / "tokenizer", place / "tokenizer")  # last: it says that the stage is finished
                break


def _course(row: Row, stage: str) -> dict[str, Any]:
    """All that decides how a row's tokenizer comes out of `stage`."""
    recipe = row.recipe()
    values = dataclasses.asdict(recipe.tokenizer)
    stages = values.pop("stages")
    until = STAGES[: STAGES.index(stage) + 1]
    if until == ("stage1",):
        del values["model"]["encoder"]["lora_rank"]  # the encoder is frozen
    return values | {"stages": {name: stages[name] for name in until}, "data": dataclasses.asdict(recipe.data)}


def copy_folder(source: Path, destination: Path) -> None:
    """Copy the files of a folder; the copy is complete or absent."""
    with unfinished_folder(destination) as unfinished:
        for file in source.iterdir():
            (unfinished / file.name).write_bytes(file.read_bytes())
