"""`aligntok quickstart`: the whole method at small size, from images to a page of pictures.

Every part leaves its result under OUTPUT and is not run again: features and three stages of the tokenizer, the
generator, and with `evaluation.ablation` a Stage-2 branch without semantic preservation. Evaluation and page come
last and are made anew each time.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligntok.config import PerceptualConfig, Recipe, SemanticConfig
from aligntok.data.captions import read_captions
from aligntok.data.geometry import to_unit_range
from aligntok.data.images import load_center_crops, open_images, told_before
from aligntok.diffusion.sampler import check_sampler
from aligntok.errors import UserError
from aligntok.evaluation.asked import Asked
from aligntok.evaluation.features import EfficientNetLite0
from aligntok.evaluation.generation import Reference, draw, evaluate_generation
from aligntok.evaluation.probe import FOLDS, can_be_probed
from aligntok.evaluation.tokenizer import encode_all, encoder_probe, evaluate_probe, evaluate_reconstruction
from aligntok.evaluation.words import Words, check_distinct
from aligntok.losses.perceptual import build_perceptual
from aligntok.models.generator import Generator
from aligntok.models.text_encoder import TextEncoder
from aligntok.models.tokenizer import AlignTok, load_tokenizer
from aligntok.report.pictures import contact_sheet
from aligntok.report.quickstart_page import build_page
from aligntok.runtime.clock import Clock
from aligntok.runtime.files import write_bytes
from aligntok.runtime.machine import processor
from aligntok.training.generator_inputs import check_width
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.train_generator import train_generator
from aligntok.training.train_tokenizer import STAGES, TokenizerTraining

ABLATION = "stage2_w_sp_0"
LEAST = 4  # pictures of a feature distance: its kernel distance is taken on halves, of two members or more
SHOWN = 16  # held-out pictures on the page
SAMPLES_PER_CLASS = 8


@dataclass
class Results:
    """What the page is made of; see aligntok.report.quickstart_page.build_page."""

    numbers: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)


def quickstart(recipe: Recipe, command: str) -> Path:
    """Run what is left to run and write OUTPUT/report.html and overview.png; returns the first."""
    output = Path(recipe.output)
    telemetry = Telemetry(output, recipe.tokenizer.training.log_every)
    clock = Clock(output / "times.json")
    training = TokenizerTraining(recipe, telemetry)
    check_evaluation(recipe, training)
    stages = run_tokenizer(training, recipe, clock)
    of_classes = recipe.generator.condition == "class"
    generator_recipe = unconditional(recipe) if of_classes and len(training.images.classes) == 1 else recipe
    with clock.part("generator"):
        generator = Generator(train_generator(generator_recipe, telemetry))
    with clock.part("evaluation"):
        results = evaluate(training, stages, generator, recipe, telemetry)
    results.numbers |= facts(training, recipe, command, clock)
    names = training.images.classes
    if generator.text is not None:
        names = results.numbers["prompts"] = list(recipe.evaluation.prompts)
    write_bytes(output / "results.json", json.dumps(results.numbers, indent=1).encode())
    write_bytes(output / "overview.png", overview(results, names))
    page = build_page(results.numbers, results.pictures, telemetry.records()).write(output / "report.html")
    telemetry.say(f"done in {sum(clock.seconds.values()) / 60:.1f} minutes: open {page}")
    return page


def check_evaluation(recipe: Recipe, training: TokenizerTraining) -> None:
    """Raise UserError now for what would end the evaluation, and with it the run, after all training."""
    shown, samples = len(training.held_out) or len(training.images), recipe.evaluation.samples
    if samples < LEAST:
        raise UserError(f"evaluation.samples is {samples}, expected at least {LEAST}: a feature distance needs as many")
    if shown < LEAST:
        raise UserError(
            f"data.held_out is {recipe.data.held_out:g} of {len(training.images) + len(training.held_out)} pictures, "
            f"which gives {shown} to evaluate on, expected at least {LEAST}: hold out more or none (0), or add pictures"
        )
    sampler = replace(recipe.generator.sampler, guidance=recipe.evaluation.guidance)
    check_sampler(sampler, recipe.tokenizer.model.adapter.latent_channels)
    if recipe.generator.condition == "text":
        encoder = recipe.generator.text.encoder
        check_width(encoder, TextEncoder(encoder, training.precision).width)
        images = open_images(recipe.data.path, recipe.data.max_images, say=told_before)
        read = read_captions(images, recipe.data.captions, say=told_before)
        check_distinct([texts[0] for texts in read.texts if texts])


def overview(results: Results, classes: list[str]) -> bytes:
    """One PNG: held-out pictures after every stage above samples of every class or prompt."""
    names = {"originals": "Original", "stage1": "Stage 1", "stage2": "Stage 2", "stage3": "Stage 3"}
    rows = {names[key]: results.pictures[key] for key in names if key in results.pictures}
    samples = results.pictures.get("samples_guided", results.pictures["samples"])
    return contact_sheet(rows, samples, classes)


def run_tokenizer(training: TokenizerTraining, recipe: Recipe, clock: Clock) -> dict[str, AlignTok]:
    """The tokenizer after each stage, and after the ablation branch if it is asked for."""
    with clock.part("features"):
        training.prepare()
    stages: dict[str, AlignTok] = {}
    previous = None
    for name in STAGES:
        stage = getattr(recipe.tokenizer.stages, name)
        if stage.steps:
            with clock.part(name):
                previous = stages[name] = training.run_stage(name, stage, previous)
    assert previous is not None
    previous.save(training.output / "tokenizer")
    if recipe.evaluation.ablation and "stage1" in stages:
        with clock.part(ABLATION):
            branch = replace(recipe.tokenizer.stages.stage2, semantic=SemanticConfig(weight=0.0))
            stages[ABLATION] = training.run_stage(ABLATION, branch, stages["stage1"])
    return stages


def unconditional(recipe: Recipe) -> Recipe:
    """The recipe for pictures of a single class, where label dropout has nothing to drop."""
    model = replace(recipe.generator.model, label_dropout=0.0)
    return replace(recipe, generator=replace(recipe.generator, model=model))


def evaluate(
    training: TokenizerTraining,
    stages: dict[str, AlignTok],
    generator: Generator,
    recipe: Recipe,
    telemetry: Telemetry,
) -> Results:
    """Held-out reconstructions and probes of every stage, samples with and without guidance, with their protocols."""
    size, precision, results = recipe.data.image_size, training.precision, Results()
    held_out, _ = load_center_crops(training.held_out if len(training.held_out) else training.images, size)
    images = open_images(recipe.data.path, recipe.data.max_images, say=told_before)
    words = None if generator.text is None else Words(images, recipe, precision)
    everything, labels = load_center_crops(images, size) if words is None else (words.crops, words.labels)
    training.images.skipped.update(images.skipped)  # a run that had finished its training before read none of them
    probing = can_be_probed(labels)
    if not probing and len(images.classes) > 1:
        telemetry.say(f"no linear probe: it needs two classes of at least {FOLDS} pictures each")
    extractor = EfficientNetLite0().to(precision.device)
    perceptual = build_perceptual(PerceptualConfig(kind="st-lpips-alex")).to(precision.device)
    protocols: dict[str, str] = {}
    reconstruction, probes, probed = {}, {}, {}
    results.pictures["originals"] = to_unit_range(held_out[:SHOWN])
    with telemetry.bar("evaluation") as update:
        for index, (name, tokenizer) in enumerate(stages.items()):
            measured = evaluate_reconstruction(tokenizer, held_out, precision, perceptual, extractor)
            reconstruction[name], protocols["reconstruction"] = measured.values, measured.protocol
            results.pictures[name] = measured.extra["reconstructions"][:SHOWN]
            results.pictures[f"latents_{name}"] = measured.extra["latents"][:SHOWN]
            if probing and tokenizer.fingerprint() not in probed:  # a refined decoder leaves the latents as they are
                probed[tokenizer.fingerprint()] = evaluate_probe(encode_all(tokenizer, everything, precision), labels)
            probe = probed.get(tokenizer.fingerprint())
            if probe is not None:
                probes[name], protocols["probe"] = probe.values, probe.protocol
            update(index + 1, len(stages))
    original = training.pretrained()
    encoder = encoder_probe(original, everything, labels, precision) if probing else None
    if encoder is not None:
        probes = {"encoder": encoder.values, **probes}
    with torch.no_grad():
        tokens = original.encoder(results.pictures["originals"].to(precision.device))
    results.pictures["encoder_tokens"] = tokens.float().cpu()
    reference = Reference.of(everything, labels, extractor, words)
    generation = _generation(generator, reference, words, recipe, extractor, training, results, telemetry)
    protocols["generation"] = generation.pop("protocol")
    results.numbers = {
        "reconstruction": reconstruction,
        "probe": probes,
        "generation": generation,
        "protocols": protocols,
        "latents_unchanged": stages[STAGES[-1]].fingerprint() == stages["stage2"].fingerprint()
        if {"stage2", "stage3"} <= set(stages)
        else None,
    }
    return results


def _generation(
    generator: Generator,
    reference: Reference,
    words: Words | None,
    recipe: Recipe,
    extractor: EfficientNetLite0,
    training: TokenizerTraining,
    results: Results,
    telemetry: Telemetry,
) -> dict[str, Any]:
    tokenizer = load_tokenizer(training.output / "tokenizer").to(training.precision.device)
    precision = training.precision
    table: dict[str, Any] = {}
    asked: Asked = torch.arange(len(generator.classes)).repeat_interleave(SAMPLES_PER_CLASS)
    if words is not None:
        asked = words.several(recipe.evaluation.prompts, SAMPLES_PER_CLASS)
    scales = {"samples": 1.0, "samples_guided": recipe.evaluation.guidance}
    if len(generator.classes) == 1 or recipe.evaluation.guidance == 1.0:  # which is none
        del scales["samples_guided"]
    for picture, guidance in scales.items():
        name = "no guidance" if guidance == 1.0 else f"guidance {guidance:g}"
        with telemetry.bar(f"samples, {name}") as update:
            measured = evaluate_generation(
                generator,
                tokenizer,
                reference,
                recipe.evaluation.samples,
                guidance,
                extractor,
                precision,
                progress=update,
            )
        table[name], table["protocol"] = measured.values, measured.protocol
        if words is not None:
            table[name]["caption found of 10"], told = words.found(measured.extra["features"], measured.extra["order"])
            table["protocol"] += f"; {told}"
        sampler = replace(generator.sampler, guidance=guidance)
        results.pictures[picture] = draw(generator, tokenizer, asked, sampler, precision, seed=1)
    return table


def facts(training: TokenizerTraining, recipe: Recipe, command: str, clock: Clock) -> dict[str, Any]:
    """Machine, data and settings for the page."""
    everything = training.images
    return {
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "device": str(training.precision.device),
            "precision": training.precision.name,
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        },
        "times": {name: round(seconds, 1) for name, seconds in clock.seconds.items()},
        "classes": everything.classes,
        "config": dataclasses.asdict(recipe),
        "skipped_images": [f"{name}: {reason}" for name, reason in everything.skipped.items()],
        "command": command,
        "encoder": training.pretrained().encoder.source,
        "dataset": {
            "name": everything.name,
            "images": len(everything) + len(training.held_out),
            "held_out": len(training.held_out),
            "licence": "MIT, Copyright (c) Microsoft Corporation" if recipe.data.path == "embedded" else "your own",
        },
    }
