"""Both sides of a comparison of generated with real images, as streams: samples drawn or stored, and a reference.

Under torchrun all processes draw; the first has all samples, in the order and with the bits of a single process, and is
the only one that reads and measures anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligntok.config import SamplerConfig
from aligntok.data.images import open_images
from aligntok.diffusion.sampler import check_sampler
from aligntok.errors import UserError
from aligntok.evaluation.adm import read_samples, sample_shape, write_sample_batches
from aligntok.evaluation.asked import check_asked
from aligntok.evaluation.crops import crops_with_bar
from aligntok.evaluation.features import EfficientNetLite0, FeatureExtractor, to_uint8
from aligntok.evaluation.generated import (
    KEPT_REFERENCE,
    ImageFeatures,
    check_images,
    check_moments,
    check_statistics,
    compare_with_batch,
    compare_with_set,
    require_enough,
)
from aligntok.evaluation.generation import batches_of, check_pair, choose_labels, describe, stream_draw
from aligntok.evaluation.inception import Inception
from aligntok.evaluation.reference import ReferenceBatch, read_reference
from aligntok.evaluation.tokenizer import Measured, told_left_out
from aligntok.models.generator import Generator
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime import collectives
from aligntok.runtime.devices import Precision
from aligntok.runtime.world import current
from aligntok.training.monitoring.telemetry import Telemetry


class DrawnSamples:
    """Samples that a generator is about to make."""

    def __init__(
        self,
        generator: str,
        tokenizer: str,
        overrides: dict[str, Any],
        labels: str,
        count: int,
        seed: int,
        precision: Precision,
        telemetry: Telemetry,
    ) -> None:
        require_enough(count, "samples (--count)")
        self.network, self.tokenizer = Generator(generator), load_tokenizer(tokenizer).to(precision.device)
        check_pair(self.network, self.tokenizer)
        check_asked(self.network, torch.zeros(count, dtype=torch.int64))
        self.sampler: SamplerConfig = replace(self.network.sampler, **overrides)
        check_sampler(self.sampler, self.network.latent_shape[0])
        self.count, self.seed, self.precision, self.telemetry = count, seed, precision, telemetry
        self.labels = choose_labels(labels, count, len(self.network.classes), seed)
        height, width = (self.tokenizer.downsample * side for side in self.network.latent_shape[1:])
        self.size = _square(height, width, generator)
        self.protocol = (
            f"{describe(self.sampler)}; {labels} labels of {len(self.network.classes)} classes, seed {seed}; "
            f"{precision}, saved as 8-bit"
        )

    def batches(self, title: str) -> Iterator[Tensor]:
        """uint8 [B, 3, H, W], drawn as they are asked for; nothing but in the first process, which gets the others'."""
        world, done = current(), 0
        made = stream_draw(self.network, self.tokenizer, self.labels, self.sampler, self.precision, self.seed, world)
        shapes = [(stop - start, 3, self.size, self.size) for start, stop in batches_of(self.count)]
        with self.telemetry.bar(f"drawing, {title}") as update:
            for images in collectives.in_turns(map(to_uint8, made), shapes, torch.uint8):
                yield images
                done += len(images)
                update(done, self.count)

    def hand_over(self) -> None:
        """Draw what the first process waits for; the part of every other one."""
        for images in self.batches("for the first process"):
            raise AssertionError(f"{len(images)} images are left in process {current().rank}")

    def store(self, path: str) -> StoredSamples:
        """Draw all of them into a file, which is complete and safe before anything is measured."""
        write_sample_batches(path, self.batches("writing"), self.count)
        self.telemetry.say(f"{path}: {self.count} samples")
        stored = StoredSamples(path, self.telemetry)
        stored.protocol = f"{self.protocol}; {stored.protocol}"
        return stored


class StoredSamples:
    """Samples in an .npz file."""

    def __init__(self, path: str, telemetry: Telemetry) -> None:
        self.path, self.telemetry = path, telemetry
        self.count, height, width = sample_shape(path)
        self.size = _square(height, width, path)
        self.protocol = f"{self.count} of {path}"

    def batches(self, title: str) -> Iterator[Tensor]:
        """uint8 [B, 3, H, W], read as they are asked for."""
        done = 0
        with self.telemetry.bar(title) as update:
            for images in read_samples(self.path):
                yield images
                done += len(images)
                update(done, self.count)


class RealImages:
    """Real images, or moments of some; everything about them is checked and measured before samples are."""

    def __init__(
        self, given: str, size: int, inception: Inception | None, precision: Precision, telemetry: Telemetry
    ) -> None:
        self.given, self.size, self.telemetry = given, size, telemetry
        self.batch: ReferenceBatch | None = None
        self.extractors: list[FeatureExtractor] = []
        if given.endswith(".npz"):
            self._open_file(inception)
        else:
            self.set = open_images(_no_other_file(given), say=telemetry.say)
        if self.batch is None:
            self.extractors = [EfficientNetLite0().to(precision.device)]
        self.features: ImageFeatures | None = None
        if self.batch is None or self.batch.images:
            self.features = ImageFeatures(inception, self.extractors, KEPT_REFERENCE).add_all(self.images())
            require_enough(self.features.count, "reference images")
        if self.batch is not None and self.features is not None:
            check_moments(self.batch, self.features)
        self.count = 0 if self.features is None else self.features.count

    def _open_file(self, inception: Inception | None) -> None:
        """An .npz of images, moments or both; what is wrong with it is said here, before anything is measured."""
        self.batch = read_reference(self.given)
        if self.batch is None:
            count, height, width = sample_shape(self.given)
            check_images(count, (height, width), self.size)
            self.telemetry.say(f"reference: {self.given}, {count} images without moments, measured like a folder's")
            return
        check_statistics(self.batch, inception)
        if self.batch.size is not None:
            check_images(self.batch.images, self.batch.size, self.size)
        self.telemetry.say(f"reference: {self.given}, sha256 {self.batch.sha256}")
        if self.batch.left_out:
            self.telemetry.say(told_left_out(self.batch.left_out))

    def images(self) -> Iterator[Tensor]:
        """uint8 batches [B, 3, H, W], from the first one on; none of a file of moments."""
        if self.given.endswith(".npz"):
            if self.batch is None or self.batch.images:
                yield from StoredSamples(self.given, self.telemetry).batches("reference")
            return
        with crops_with_bar(self.set, self.size, "reference", self.telemetry) as batches:
            yield from (pixels for pixels, _ in batches)

    def compare(self, made: ImageFeatures, seed: int) -> dict[str, Measured]:
        """Every number between these and the generated images."""
        if self.batch is not None:
            return compare_with_batch(made, self.batch, self.features)
        assert self.features is not None  # only moments come without images
        return compare_with_set(made, self.features, seed)


def _no_other_file(given: str) -> str:
    """`given`, unless it is a file that can be no reference."""
    path = Path(given)
    if path.is_file() and path.suffix != ".tar":
        raise UserError(
            f"{given} is a {path.suffix or 'plain'} file, expected a folder or .tar of images, or an .npz of images "
            "(arr_0) or moments (mu, sigma); numpy.savez writes one, of what torch-fidelity has stored for example"
        )
    return given


def _square(height: int, width: int, what: str) -> int:
    if height != width:
        raise UserError(f"{what} has images of {width}x{height} px, expected square ones like centre crops")
    return height
