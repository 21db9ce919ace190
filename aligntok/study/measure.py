"""What the study measures of a row, each number once: it is kept in the row's folder and not measured again.

measures.json: "tokenizers" by stage ("final" for a row's own): reconstruction, probe, fingerprint of the latents;
"generations" by point: (training steps, sampling steps, guidance); "protocols" by kind.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aligntok.config import DataConfig, PerceptualConfig
from aligntok.data.images import load_center_crops, open_images
from aligntok.devices import Precision
from aligntok.evaluation.features import EfficientNetLite0, to_uint8
from aligntok.evaluation.generation import Reference, draw, evaluate_generation
from aligntok.evaluation.tokenizer import Measured, encode_all, evaluate_probe, evaluate_reconstruction
from aligntok.files import write_bytes
from aligntok.losses.perceptual import build_perceptual
from aligntok.models.tokenizer import StoredTokenizer, load_tokenizer
from aligntok.study.rows import Row
from aligntok.training.train_generator import Generator

SHOWN = 10  # held-out pictures of a row in the report
PICTURES = "pictures.safetensors"


@dataclass(frozen=True)
class Point:
    """One setting at which a generator is measured."""

    trained: int  # steps
    sampling: int  # network evaluations
    guidance: float

    def __str__(self) -> str:
        return f"{self.trained}/{self.sampling}/{self.guidance:g}"

    @classmethod
    def parse(cls, text: str) -> Point:
        trained, sampling, guidance = text.split("/")
        return cls(int(trained), int(sampling), float(guidance))


class Measures:
    """The numbers of one row in its folder."""

    def __init__(self, row: Row) -> None:
        self.file = row.folder / "measures.json"
        empty: dict[str, Any] = {"tokenizers": {}, "generations": {}, "protocols": {}}
        self.values: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else empty

    def save(self) -> None:
        write_bytes(self.file, json.dumps(self.values, indent=1).encode())


class Bench:
    """Images, networks and precision that all rows are measured with."""

    def __init__(self, data: DataConfig, precision: Precision, samples: int) -> None:
        self.precision, self.samples = precision, samples
        images = open_images(data.path, data.max_images)
        self.held_out, _ = load_center_crops(images.split(data.held_out)[1], data.image_size)
        self.images, self.labels = load_center_crops(images, data.image_size)
        self.extractor = EfficientNetLite0().to(precision.device)
        self.perceptual = build_perceptual(PerceptualConfig(kind="st-lpips-alex")).to(precision.device)
        self._reference: Reference | None = None

    @property
    def reference(self) -> Reference:
        """Features of all images, computed when the first generator is measured."""
        if self._reference is None:
            self._reference = Reference.of(self.images, self.labels, self.extractor)
        return self._reference

    def measure_tokenizer(self, row: Row, stage: str, folder: Path) -> None:
        """Reconstruction and probe of the tokenizer in `folder`; `stage` is "final" or the name of a stage."""
        measures = Measures(row)
        if stage in measures.values["tokenizers"]:
            return
        tokenizer = load_tokenizer(folder).to(self.precision.device)
        reconstruction = evaluate_reconstruction(
            tokenizer, self.held_out, self.precision, self.perceptual, self.extractor
        )
        found = {"reconstruction": reconstruction, "probe": self._probe(tokenizer)}
        measures.values["tokenizers"][stage] = {name: measured.values for name, measured in found.items()} | {
            "fingerprint": tokenizer.fingerprint(),
            "channels": tokenizer.latent_channels,
        }
        measures.values["protocols"] |= {name: measured.protocol for name, measured in found.items()}
        measures.save()
        if stage == "final":
            keep_pictures(row, reconstructions=reconstruction.extra["reconstructions"][:SHOWN])

    def _probe(self, tokenizer: StoredTokenizer) -> Measured:
        latents = encode_all(tokenizer, self.images, self.precision)
        probe = evaluate_probe(latents, self.labels)
        assert probe is not None, "the embedded images have twelve classes"
        return probe

    def measure_generator(self, row: Row, folder: Path, point: Point) -> None:
        """gFD and gKD of the generator in `folder` through the row's tokenizer."""
        measures = Measures(row)
        if str(point) in measures.values["generations"]:
            return
        generator, tokenizer = self._pair(row, folder)
        generator.sampler = replace(generator.sampler, steps=point.sampling)
        measured = evaluate_generation(
            generator,
            tokenizer,
            self.reference,
            self.samples,
            point.guidance,
            self.extractor,
            self.precision,
            seed=row.seed,
        )
        measures.values["generations"][str(point)] = measured.values
        measures.values["protocols"]["generation"] = measured.protocol
        measures.save()

    def draw_classes(self, row: Row, folder: Path, guidance: float) -> None:
        """One sample of every class, kept for the report."""
        if "samples" in pictures_of(row):
            return
        generator, tokenizer = self._pair(row, folder)
        sampler = replace(generator.sampler, guidance=guidance)
        labels = torch.arange(len(generator.classes))
        keep_pictures(row, samples=draw(generator, tokenizer, labels, sampler, self.precision, seed=row.seed))

    def _pair(self, row: Row, folder: Path) -> tuple[Generator, StoredTokenizer]:
        return Generator(folder), load_tokenizer(row.folder / "tokenizer").to(self.precision.device)


def keep_pictures(row: Row, **pictures: Tensor) -> None:
    """Add pictures [n, 3, H, W] in [-1, 1] to the row's file, as bytes."""
    kept = pictures_of(row) | {name: to_uint8(images).cpu().contiguous() for name, images in pictures.items()}
    unfinished = row.folder / f".{PICTURES}.tmp"
    save_file(kept, unfinished)
    unfinished.replace(row.folder / PICTURES)


def pictures_of(row: Row) -> dict[str, Tensor]:
    """uint8 pictures [n, 3, H, W] of a row by name; empty before the first measurement."""
    file = row.folder / PICTURES
    return load_file(file) if file.is_file() else {}
