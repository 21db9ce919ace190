"""What the study measures of a row, each number once: it is kept in the row's folder and not measured again.

measures.json: "tokenizers" by stage ("final" for a row's own): reconstruction, probe, alignment to the pretrained
encoder, cost, fingerprint of the latents; "generations" by point: (training steps, sampling steps, guidance);
"perfect": what a perfect generator would have through the row's decoder; "protocols" by kind; "guidance of the
pictures"; "machine": what the last of them was measured on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from aligntok.config import EvaluationConfig, PerceptualConfig, Recipe
from aligntok.data.images import load_center_crops, open_images, told_before
from aligntok.errors import UserError
from aligntok.evaluation.distances import feature_distances
from aligntok.evaluation.features import EfficientNetLite0, extract, to_uint8
from aligntok.evaluation.generation import Reference, draw, evaluate_generation
from aligntok.evaluation.probe import train_classifier
from aligntok.evaluation.probes import measure_alignment
from aligntok.evaluation.tokenizer import (
    BATCH,
    Measured,
    decode_all,
    encode_all,
    evaluate_probe,
    evaluate_reconstruction,
    pooled_tokens,
)
from aligntok.evaluation.words import Words
from aligntok.losses.perceptual import build_perceptual
from aligntok.models.encoder import Encoder
from aligntok.models.generator import Generator
from aligntok.models.tokenizer import StoredTokenizer, load_tokenizer
from aligntok.runtime.devices import Precision
from aligntok.runtime.files import read_document, write_bytes
from aligntok.runtime.machine import processor
from aligntok.study.rows import Row

Latents = Callable[[], Tensor]  # normalised latents [n, d, h, w] of all images, computed when first asked for

KINDS = ("reconstruction", "probe", "alignment", "cost")  # of a tokenizer's numbers
SHOWN = 10  # held-out pictures of a row in the report
OWN = 400  # reconstructions that samples are compared with, drawn once for each seed
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


class Reconstructed(NamedTuple):
    """Features [n, C] of what a tokenizer makes of real images: those that samples are compared with, and others."""

    reference: Tensor
    others: Tensor
    order: Tensor  # numbers of the images of both, in this order


class Measures:
    """The numbers of one row in its folder."""

    def __init__(self, row: Row) -> None:
        self.file = row.folder / "measures.json"
        empty: dict[str, Any] = {"tokenizers": {}, "generations": {}, "protocols": {}}
        self.values: dict[str, Any] = empty | read_document(self.file)

    def save(self) -> None:
        """Write the file, with what the last numbers were taken on."""
        self.values["machine"] = {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        write_bytes(self.file, json.dumps(self.values, indent=1).encode())


def fingerprint(row: Row) -> str | None:
    """Of a measured row's latents; None before it is measured."""
    return Measures(row).values["tokenizers"].get("final", {}).get("fingerprint")


class Bench:
    """Images, networks and precision that all rows are measured with."""

    def __init__(self, recipe: Recipe, precision: Precision, samples: int) -> None:
        self.precision, self.samples = precision, samples
        data, self.encoder = recipe.data, recipe.tokenizer.model.encoder
        images = open_images(data.path, data.max_images, say=told_before)
        self.words = Words(images, recipe, precision) if recipe.generator.condition == "text" else None
        self.held_out, _ = load_center_crops(images.split(data.held_out)[1], data.image_size)
        if self.words is None:
            self.images, self.labels = load_center_crops(images, data.image_size)
        else:
            self.images, self.labels = self.words.crops, self.words.labels
        if samples > len(self.images) // 3:
            raise UserError(
                f"samples is {samples}: expected at most {len(self.images) // 3}, a third of the pictures, since as "
                "many reconstructions play the perfect generator"
            )
        self.extractor = EfficientNetLite0().to(precision.device)
        self.perceptual = build_perceptual(PerceptualConfig(kind="st-lpips-alex")).to(precision.device)
        self._reference: Reference | None = None
        self._tokens: Tensor | None = None
        self._classify: Callable[[Tensor], Tensor] | None = None
        self._own: tuple[Row, Reconstructed] | None = None

    @property
    def reference(self) -> Reference:
        """Features of all images, computed when the first generator is measured."""
        if self._reference is None:
            self._reference = Reference.of(self.images, self.labels, self.extractor, self.words)
        return self._reference

    @property
    def tokens(self) -> Tensor:
        """Pooled tokens [n, C] of the pretrained encoder for all images: what latents are aligned to."""
        if self._tokens is None:
            encoder = Encoder(self.encoder).to(self.precision.device).eval().requires_grad_(False)
            self._tokens = pooled_tokens(encoder, self.images, self.precision)
        return self._tokens

    def measure_tokenizer(self, row: Row, stage: str, folder: Path) -> None:
        """What is missing of a tokenizer's numbers; `stage` is "final" or the name of the stage that wrote `folder`."""
        measures = Measures(row)
        known = measures.values["tokenizers"].setdefault(stage, {})
        if set(KINDS) <= known.keys():
            return
        tokenizer = load_tokenizer(folder).to(self.precision.device)
        known |= {"fingerprint": tokenizer.fingerprint(), "channels": tokenizer.latent_channels}
        latents = cache(lambda: encode_all(tokenizer, self.images, self.precision))
        for kind, measure in zip(KINDS, (self._reconstruction, self._probe, self._alignment, self._cost), strict=True):
            if kind in known:
                continue
            measured = measure(tokenizer, latents)
            known[kind], measures.values["protocols"][kind] = measured.values, measured.protocol
            if stage == "final" and "reconstructions" in measured.extra:
                keep_pictures(row, reconstructions=measured.extra["reconstructions"][:SHOWN])
        measures.save()

    def _reconstruction(self, tokenizer: StoredTokenizer, latents: Latents) -> Measured:
        return evaluate_reconstruction(tokenizer, self.held_out, self.precision, self.perceptual, self.extractor)

    def _probe(self, tokenizer: StoredTokenizer, latents: Latents) -> Measured:
        probe = evaluate_probe(latents(), self.labels)
        assert probe is not None, "the images have several classes"
        return probe

    def _alignment(self, tokenizer: StoredTokenizer, latents: Latents) -> Measured:
        of = f"{self.encoder.name}, block {self.encoder.layer}"
        return measure_alignment(latents().mean(dim=(2, 3)), self.tokens, of)

    @torch.no_grad()
    def _cost(self, tokenizer: StoredTokenizer, latents: Latents) -> Measured:
        """Parameters in millions, and GFLOPs of one image's convolutions and matrix products."""
        image = torch.zeros(1, *self.images.shape[1:], device=self.precision.device)
        with FlopCounterMode(display=False) as encoding:
            encoded = tokenizer.encode(image)
        with FlopCounterMode(display=False) as decoding:
            tokenizer.decode(encoded)
        decoder = sum(p.numel() for p in tokenizer.decoder.parameters()) / 1e6
        values = {
            "encoder parameters [M]": sum(p.numel() for p in tokenizer.parameters()) / 1e6 - decoder,
            "decoder parameters [M]": decoder,
            "encode [GFLOP]": encoding.get_total_flops() / 1e9,
            "decode [GFLOP]": decoding.get_total_flops() / 1e9,
        }
        return Measured(values, "convolutions and matrix products of one image, counted by PyTorch")

    def measure_generator(self, row: Row, folder: Path, point: Point, closely: bool = False) -> None:
        """gFD and gKD of the generator in `folder` through the row's tokenizer.

        With `closely` also how well it learned the row's latents: gFD and gKD of the same samples against the
        tokenizer's own reconstructions of real images, and the share of samples whose class a linear classifier on the
        extractor's features of real images recognises. `measure_perfect` has what to hold them against.
        """
        measures = Measures(row)
        known = measures.values["generations"].setdefault(str(point), {})
        if known and (not closely or "recognised" in known):
            return
        generator, tokenizer = self._pair(row, folder)
        generator.sampler = replace(generator.sampler, steps=point.sampling)
        what = (generator, tokenizer, self.reference, self.samples, point.guidance, self.extractor, self.precision)
        measured = evaluate_generation(*what, seed=row.seed)
        known |= measured.values
        measures.values["protocols"].setdefault("generation", measured.protocol)  # a row's first point is the tables'
        if closely:
            learned = self._learned(row, tokenizer, measured)
            known |= learned.values
            measures.values["protocols"]["own reconstructions"] = learned.protocol
        measures.save()

    def _learned(self, row: Row, tokenizer: StoredTokenizer, drawn: Measured) -> Measured:
        made = drawn.extra["features"]
        reference = self._reconstructed(row, tokenizer).reference
        values, protocol = feature_distances(reference, made, self.extractor, prefix="own g", seed=row.seed)
        values["recognised"] = self._recognised(made, drawn.extra["labels"])
        protocol = f"reference: the tokenizer's own reconstructions; {protocol}"
        if self.words is not None:
            values["found"], told = self.words.found(made, drawn.extra["order"])
            protocol += f"; {told}"
        return Measured(values, protocol)

    def measure_perfect(self, row: Row) -> None:
        """The numbers of `measure_generator`, `closely`, with reconstructions of other real images as samples.

        That is a generator that has learned the latents perfectly, seen through the row's decoder.
        """
        measures = Measures(row)
        if "perfect" in measures.values:
            return
        tokenizer = load_tokenizer(row.folder / "tokenizer").to(self.precision.device)
        own = self._reconstructed(row, tokenizer)
        values, protocol = feature_distances(own.reference, own.others, self.extractor, prefix="own g", seed=row.seed)
        every = torch.cat((own.reference, own.others))
        values["recognised"] = self._recognised(every, self.labels[own.order])
        if self.words is not None:
            values["found"], _ = self.words.found(every, own.order)
        measures.values["perfect"], measures.values["protocols"]["perfect generator"] = values, protocol
        measures.save()

    def _reconstructed(self, row: Row, tokenizer: StoredTokenizer) -> Reconstructed:
        """Of OWN real images or fewer, and as many others as there are samples; kept until the next row."""
        if self._own is None or self._own[0] != row:
            others = self.samples
            count = min(OWN, len(self.images) - others)
            order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(row.seed))
            chosen = order[: count + others]
            latents = encode_all(tokenizer, self.images[chosen], self.precision)
            made = extract(self.extractor, decode_all(tokenizer, latents, self.precision).split(BATCH))
            self._own = row, Reconstructed(made[:count], made[count:], chosen)
        return self._own[1]

    def _recognised(self, features: Tensor, labels: Tensor) -> float:
        """Share of features [n, C] whose class a classifier trained on real images finds."""
        if self._classify is None:
            self._classify = train_classifier(self.reference.features.double(), self.labels, int(self.labels.max()) + 1)
        return (self._classify(features.double()) == labels).double().mean().item()

    def draw_sheet(self, row: Row, folder: Path, guidance: float) -> None:
        """One sample of every class or of every prompt, kept for the report; another guidance draws them anew."""
        measures, drawn_with = Measures(row), "guidance of the pictures"
        if "samples" in pictures_of(row) and measures.values.get(drawn_with, guidance) == guidance:
            return
        generator, tokenizer = self._pair(row, folder)
        sampler = replace(generator.sampler, guidance=guidance)
        asked = (
            torch.arange(len(generator.classes))
            if self.words is None
            else self.words.several(EvaluationConfig().prompts)
        )
        keep_pictures(row, samples=draw(generator, tokenizer, asked, sampler, self.precision, seed=row.seed))
        measures.values[drawn_with] = guidance
        measures.save()

    def _pair(self, row: Row, folder: Path) -> tuple[Generator, StoredTokenizer]:
        return Generator(folder), load_tokenizer(row.folder / "tokenizer").to(self.precision.device)


def keep_pictures(row: Row, **pictures: Tensor) -> None:
    """Add pictures [n, 3, H, W] in [-1, 1] to the row's file, as bytes."""
    kept = pictures_of(row) | {name: to_uint8(images).cpu().contiguous() for name, images in pictures.items()}
    write_bytes(row.folder / PICTURES, save(kept))


def pictures_of(row: Row) -> dict[str, Tensor]:
    """uint8 pictures [n, 3, H, W] of a row by name; empty before the first measurement."""
    file = row.folder / PICTURES
    return load_file(file) if file.is_file() else {}
