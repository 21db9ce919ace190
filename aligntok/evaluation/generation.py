"""A generator: draw samples through its tokenizer, and measure their distance to real images in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from aligntok.config import SamplerConfig
from aligntok.data.geometry import check_size, to_unit_range
from aligntok.diffusion.sampler import integrate
from aligntok.errors import UserError
from aligntok.evaluation.asked import Asked, check_asked, condition_of
from aligntok.evaluation.distances import feature_distances
from aligntok.evaluation.features import FeatureExtractor, extract
from aligntok.evaluation.tokenizer import BATCH, Measured, decode_all
from aligntok.models.generator import Generator
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.runtime.devices import Precision
from aligntok.runtime.world import World

SAMPLING_BATCH = 128


def check_pair(generator: Generator, tokenizer: StoredTokenizer) -> None:
    """Raise UserError unless the generator was trained on this tokenizer's latents (a refined decoder does
    not matter)."""
    if generator.tokenizer_fingerprint != tokenizer.fingerprint():
        raise UserError(
            f"this generator was trained on the latents of another tokenizer (fingerprint "
            f"{generator.tokenizer_fingerprint}, this one has {tokenizer.fingerprint()}): give its own"
        )


def draw(
    generator: Generator,
    tokenizer: StoredTokenizer,
    asked: Asked,
    sampler: SamplerConfig,
    precision: Precision,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Images [n, 3, H, W] float32 in [-1, 1] for labels [n] or captions; picture i depends on the seed, i and what is
    asked for there alone.

    Args:
        size: (height, width) in pixels; None = as in training.
    """
    images: list[Tensor] = []
    for batch in stream_draw(generator, tokenizer, asked, sampler, precision, seed, size=size):
        images += batch
        if progress is not None:
            progress(len(images), len(asked))
    return torch.stack(images)


@torch.no_grad()
def stream_draw(
    generator: Generator,
    tokenizer: StoredTokenizer,
    asked: Asked,
    sampler: SamplerConfig,
    precision: Precision,
    seed: int = 0,
    world: World | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[Tensor]:
    """The images of `draw` in batches [B, 3, H, W]; memory holds one of them.

    Of several processes each makes every size-th batch, from its rank on; None = this one makes all.
    """
    check_pair(generator, tokenizer)
    check_asked(generator, asked)
    shape, world = drawn_shape(generator, tokenizer, size), world or World()
    model, source = generator.model.to(precision.device), torch.Generator().manual_seed(seed)
    for number, (start, stop) in enumerate(batches_of(len(asked))):
        noise = torch.randn(stop - start, *shape, generator=source)  # also of batches that others make
        if number % world.size != world.rank:
            continue
        condition = condition_of(generator, asked, start, stop).to(precision.device)
        with precision.autocast():
            latents = integrate(model, noise.to(precision.device), condition, sampler)
        yield decode_all(tokenizer, latents.cpu(), precision)


def batches_of(count: int) -> list[tuple[int, int]]:
    """(first, behind the last) of every batch that `stream_draw` makes of so many pictures, in order."""
    return [(start, min(start + SAMPLING_BATCH, count)) for start in range(0, count, SAMPLING_BATCH)]


def drawn_shape(generator: Generator, tokenizer: StoredTokenizer, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Shape (d, h, w) of the latents of pictures of a size (height, width) in pixels; None = as in training.

    Raises:
        UserError: a side that the tokenizer does not divide.
    """
    if size is None:
        return generator.latent_shape
    for side in size:
        check_size(side, tokenizer.downsample, "size")
    height, width = (side // tokenizer.downsample for side in size)
    return generator.latent_shape[0], height, width


def choose_labels(policy: str, count: int, classes: int, seed: int = 0) -> Tensor:
    """Labels [count] by the policy "random" (uniform, independent) or "balanced" (as equally often as can be)."""
    if policy == "random":
        return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
    if policy == "balanced":
        return torch.arange(count) % classes
    raise UserError(f"labels are {policy!r}, expected random or balanced")


class Spoken(Protocol):
    """`aligntok.evaluation.words.Words`, as far as it is needed here."""

    def asked(self, numbers: Tensor) -> Asked:
        """What is said of images by their numbers."""

    def fit(self, features: Tensor) -> None:
        """Take note of the features of all images."""


@dataclass
class Reference:
    """Real images that generated ones are compared with: their features and labels."""

    features: Tensor  # [n, dimension]
    labels: Tensor  # [n]
    asked: Callable[[Tensor], Asked] | None = None  # numbers of images -> what to ask for; None = their labels

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, extractor: FeatureExtractor, words: Spoken | None = None) -> Reference:
        """From uint8 images [n, 3, H, W], labels [n] and, for a generator that reads them, the images' captions."""
        features = extract(extractor, (to_unit_range(batch) for batch in images.split(BATCH)))
        if words is None:
            return cls(features, labels)
        words.fit(features)
        return cls(features, labels, words.asked)


def evaluate_generation(
    generator: Generator,
    tokenizer: StoredTokenizer,
    reference: Reference,
    count: int,
    guidance: float,
    extractor: FeatureExtractor,
    precision: Precision,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """gFD and gKD of `count` samples; what they are asked to show is what is said of images drawn from the reference.

    `extra` holds the samples' "features" [count, dimension], "labels" [count] and "order" [count], the images' numbers.
    """
    sampler = replace(generator.sampler, guidance=guidance)
    order = torch.randint(len(reference.labels), (count,), generator=torch.Generator().manual_seed(seed))
    labels = reference.labels[order]
    asked = labels if reference.asked is None else reference.asked(order)
    samples = draw(generator, tokenizer, asked, sampler, precision, seed, progress)
    made = extract(extractor, samples.split(BATCH))
    values, protocol = feature_distances(reference.features, made, extractor, prefix="g", seed=seed)
    what = "labels" if reference.asked is None else "captions"
    protocol = f"{protocol}; {describe(sampler)}; {what} as in the reference, seed {seed}"
    return Measured(values, protocol, {"features": made, "labels": labels, "order": order})


def describe(sampler: SamplerConfig) -> str:
    """One line: solver, evaluations, time shift, guidance."""
    text = f"{sampler.solver}, {sampler.steps} network evaluations, time shift {sampler.time_shift:g}"
    text += f", down to {sampler.end:g} before the shift" if sampler.end else ""
    if sampler.guidance == 1.0:
        return f"{text}, no guidance"
    channels = "all channels" if sampler.guidance_channels is None else f"first {sampler.guidance_channels} channels"
    low, high = sampler.guidance_interval
    return f"{text}, guidance {sampler.guidance:g} on {channels} for t in [{low:g}, {high:g}]"
