"""The short jobs of the command line: sample, reconstruct, statistics. Each prints what it did and where it is."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from aligntok.config import DataConfig
from aligntok.data.geometry import check_size, to_unit_range
from aligntok.data.images import load_center_crops, open_images
from aligntok.data.loading import report_skipped
from aligntok.data.sources import MemorySource
from aligntok.errors import UserError
from aligntok.evaluation.checks import require_at_least, require_writable
from aligntok.evaluation.generation import check_pair, describe, draw
from aligntok.evaluation.tokenizer import decode_all, encode_all
from aligntok.models.generator import Generator
from aligntok.models.tokenizer import StoredTokenizer, load_tokenizer
from aligntok.report import pictures
from aligntok.runtime.devices import choose_precision
from aligntok.runtime.files import check_destination, write_bytes
from aligntok.runtime.manifest import FILES
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.statistics import latent_statistics

STATISTICS_BATCH = 64


def sample(
    generator: str,
    tokenizer: str,
    output: str,
    labels: list[str | int] | int | str | None,
    per_class: int,
    steps: int | None,
    guidance: float | None,
    guidance_channels: int | None,
    seed: int,
    separate: bool,
    device: str,
) -> None:
    """`aligntok sample`; the options are those of aligntok.config.options.SampleConfig."""
    require_at_least(1, per_class=per_class)
    require_writable(output=output)
    folder = Path(output).with_suffix("")
    if separate and (folder == Path(output) or folder.is_file()):
        raise UserError(
            f"--separate true writes single pictures into the folder {folder}, which is a file: give --output a name "
            "that ends in .png, and that no file has without it"
        )
    precision = choose_precision(device)
    network, tok = Generator(generator), load_tokenizer(tokenizer).to(precision.device)
    check_pair(network, tok)
    wanted = class_numbers(labels, network.classes)
    overrides: dict[str, Any] = {"steps": steps, "guidance": guidance, "guidance_channels": guidance_channels}
    sampler = replace(network.sampler, **{k: v for k, v in overrides.items() if v is not None})
    telemetry = Telemetry(Path(output).parent, log_every=1)
    with telemetry.bar("sampling") as update:
        drawn = draw(network, tok, torch.tensor(wanted).repeat_interleave(per_class), sampler, precision, seed, update)
    rows = list(drawn.split(per_class))
    write_bytes(output, pictures.grid(rows, [network.classes[i] for i in wanted]))
    if separate:
        written: Counter[str] = Counter()  # by class: one that is named twice has twice as many pictures
        for index, image in enumerate(drawn):
            name = network.classes[wanted[index // per_class]]
            write_bytes(folder / f"{name}-{written[name]:04d}.png", pictures.strip(image[None], gap=0))
            written[name] += 1
        telemetry.say(f"{len(drawn)} pictures in {folder}")
    telemetry.say(f"{output}: {len(drawn)} pictures; {describe(sampler)}, seed {seed}")


def class_numbers(labels: list[str | int] | int | str | None, classes: list[str]) -> list[int]:
    """Class numbers of names or numbers given as text; None = every class.

    Raises:
        UserError: an unknown name or a number out of range.
    """
    if labels is None or labels == []:
        return list(range(len(classes)))
    numbers = []
    for label in map(str, labels if isinstance(labels, list) else [labels]):
        if label in classes:
            numbers.append(classes.index(label))
        elif label.isdecimal() and int(label) < len(classes):
            numbers.append(int(label))
        else:
            raise UserError(f"no class {label!r}: expected 0..{len(classes) - 1} or one of {', '.join(classes)}")
    return numbers


def reconstruct(tokenizer: str, images: str, output: str, image_size: int, count: int, device: str) -> None:
    """`aligntok reconstruct`; the options are those of aligntok.config.options.ReconstructConfig."""
    require_at_least(1, count=count)
    require_writable(output=output)
    precision = choose_precision(device)
    tok = load_tokenizer(tokenizer).to(precision.device)
    pixels, _ = _load(images, count, image_size, tok)
    restored = decode_all(tok, encode_all(tok, pixels, precision), precision)
    columns = min(count, 16)
    rows = [
        part
        for pair in zip(to_unit_range(pixels).split(columns), restored.split(columns), strict=True)
        for part in pair
    ]
    write_bytes(output, pictures.grid(rows, ["original", "reconstruction"] * (len(rows) // 2)))
    Console(stderr=True).print(f"{output}: {len(pixels)} originals, each above its reconstruction", highlight=False)


def statistics(tokenizer: str, images: str, image_size: int, count: int, device: str) -> None:
    """`aligntok statistics`; completes the tokenizer folder in place."""
    require_at_least(1, count=count)
    precision = choose_precision(device)
    tok = load_tokenizer(tokenizer, require_statistics=False).to(precision.device)
    check_destination(tokenizer, FILES)
    if not os.access(Path(tokenizer).resolve().parent, os.W_OK | os.X_OK):
        raise UserError(f"{tokenizer} cannot be completed: the folder it lies in is not writable; copy it")
    pixels, labels = _load(images, count, image_size, tok)
    source = MemorySource(pixels, labels, min(STATISTICS_BATCH, len(pixels)), seed=0, flip=DataConfig().flip)
    tok.set_statistics(*latent_statistics(tok, source, len(pixels), precision))
    tok.save(tokenizer)
    print(f"{tokenizer}: latent statistics of {len(pixels)} images stored")


def _load(path: str, count: int, size: int, tokenizer: StoredTokenizer) -> tuple[Tensor, Tensor]:
    check_size(size, tokenizer.downsample, "image_size")
    telemetry = Telemetry(".", log_every=1)
    images = open_images(path, count, say=telemetry.say)
    with telemetry.bar("reading images") as update:
        pixels, labels = load_center_crops(images, size, update)
    report_skipped(images, telemetry.say)
    return pixels, labels
