"""The short jobs of the command line: reconstruct, statistics. Each prints what it did and where it is."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from torch import Tensor

from aligntok.config import DataConfig
from aligntok.data.geometry import check_size, to_unit_range
from aligntok.data.images import load_center_crops, open_images
from aligntok.data.loading import report_skipped
from aligntok.data.sources import MemorySource
from aligntok.errors import UserError
from aligntok.evaluation.checks import require_at_least, require_writable
from aligntok.evaluation.tokenizer import decode_all, encode_all
from aligntok.models.tokenizer import StoredTokenizer, load_tokenizer
from aligntok.report import pictures
from aligntok.runtime.devices import choose_precision
from aligntok.runtime.files import check_destination, write_bytes
from aligntok.runtime.manifest import FILES
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.statistics import latent_statistics

STATISTICS_BATCH = 64


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
