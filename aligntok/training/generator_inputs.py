"""What a generator is trained on: latents from images or from a cache, and what is said of the pictures.

With captions the batches have their features beside the latents. With a latent cache and a text cache no image is
opened, no caption read and neither encoder run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aligntok.config import GeneratorTrainingConfig, LightningDiTConfig, Recipe, TextEncoderConfig
from aligntok.data.bucket_sources import BucketsInMemory
from aligntok.data.buckets import Bucket
from aligntok.data.captions import read_captions
from aligntok.data.frozen import FrozenNetwork, FrozenOutput, latents_in_batch, tabulate, tabulate_buckets
from aligntok.data.images import ImageSet, limit_numbers, open_images, split_numbers
from aligntok.data.latent_cache import CachedLatentSource, LatentCache
from aligntok.data.latent_format import make_command
from aligntok.data.loading import build_bucket_source, build_source
from aligntok.data.sources import MemorySource, Source
from aligntok.data.text_beside import TextBeside, pictures_of
from aligntok.data.text_cache import TextCache
from aligntok.data.text_features import TextFeatures, encode_captions
from aligntok.data.text_format import make_command as make_text_command
from aligntok.errors import UserError
from aligntok.models.generator import TextSource
from aligntok.models.text_encoder import TextEncoder
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.runtime.devices import Precision
from aligntok.runtime.world import current
from aligntok.training.conditions import ByCaption, ByLabel, Conditioning
from aligntok.training.monitoring.previews import CLASSES, PER_CLASS, Shown, captions_shown, classes_shown
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.sizes import sort_pictures, table_for

# Of the configuration, to the course of training; see `course`. `condition` and `text`: see `decisive`
INDIFFERENT = ("tokenizer", "sampler", "training", "latents", "snapshot_every", "start", "condition", "text")


@dataclass
class Text:
    """Captions of a set's pictures, as features."""

    features: TextFeatures
    made_by: TextSource
    captions: Callable[[Tensor], list[str]]  # what the captions of rows [n] say


@dataclass
class GeneratorInputs:
    """Where batches come from and what the network is told of them."""

    source: Source
    latents: FrozenOutput
    condition: Conditioning
    shown: Shown  # in previews
    classes: list[str]  # [] with captions
    name: str  # of the image set
    count: int  # images
    identity: str  # what they are, wherever they lie
    cache: str | None = None  # fingerprint of the latent cache
    text: Text | None = None
    sizes: dict[Bucket, int] | None = None  # with data.buckets: how many of them have which size


def generator_inputs(
    recipe: Recipe, tokenizer: StoredTokenizer, precision: Precision, telemetry: Telemetry
) -> GeneratorInputs:
    """The inputs that a recipe asks for; fills in the number of classes where it leaves that open.

    Raises:
        UserError: labels beyond generator.model.classes; no captions, or features of another encoder; caches that do
            not belong to the tokenizer or to the data; with data.buckets, see `table_for`.
    """
    if recipe.generator.latents is not None:
        return _from_cache(recipe, tokenizer, recipe.generator.latents, precision, telemetry)
    return _from_images(recipe, tokenizer, precision, telemetry)


def _from_images(
    recipe: Recipe, tokenizer: StoredTokenizer, precision: Precision, telemetry: Telemetry
) -> GeneratorInputs:
    data, training = recipe.data, recipe.generator.training
    table = None
    if data.buckets != "none":  # of text to image alone
        table = table_for(data, tokenizer, recipe.generator.text.model.patch_size)
    cached = recipe.generator.condition == "text" and recipe.generator.text.features is not None  # of the whole set
    every = open_images(data.path, None if cached else data.max_images, say=telemetry.say)
    numbers = limit_numbers(len(every), data.max_images)
    numbers = numbers[split_numbers(len(numbers), data.held_out)[0]]
    text = _text(recipe, every, precision, telemetry)
    if text is not None:
        numbers = _captioned(numbers, text.features)
    images = every.subset(numbers.tolist())
    services = (training.batch_size, training.seed, telemetry.say, telemetry.bar, current())
    source: Source
    if table is None:
        source, sizes = build_source(images, data, "center", *services, device=precision.device), None
    else:
        numbers, images, buckets = sort_pictures(images, numbers, table, telemetry)
        source = build_bucket_source(images, buckets, data, *services)
        sizes = source.sizes
    latents = _latents(tokenizer, source, precision, telemetry)
    count = source.order.count
    if text is not None:
        source = TextBeside(source, text.features, pictures_of(source, images, numbers), training.seed)
    told = _told(recipe.generator, images.classes, text, numbers, precision)
    return GeneratorInputs(source, latents, *told, images.name, count, images.identity(), text=text, sizes=sizes)


def _latents(tokenizer: StoredTokenizer, source: Source, precision: Precision, telemetry: Telemetry) -> FrozenOutput:
    """Of pictures in memory computed now, of others in the loop."""
    if not isinstance(source, MemorySource | BucketsInMemory):
        return FrozenNetwork(tokenizer.encode, precision)
    with telemetry.bar("latents") as update:
        if isinstance(source, BucketsInMemory):
            return tabulate_buckets(tokenizer.encode, source, precision, update)
        return tabulate(tokenizer.encode, source, precision, progress=update)


def _from_cache(
    recipe: Recipe, tokenizer: StoredTokenizer, latents: str, precision: Precision, telemetry: Telemetry
) -> GeneratorInputs:
    """From a latent cache alone: no image is opened and no encoder run, but for captions that are not cached."""
    config, data, training = recipe.generator, recipe.data, recipe.generator.training
    folder = config.tokenizer or Path(recipe.output) / "tokenizer"
    cache = LatentCache(latents, tokenizer.fingerprint(), make_command(folder, data.path, latents, data.image_size))
    cache.check_data(data)
    every = None
    if config.condition == "text" and config.text.features is None:
        every = open_images(data.path, say=telemetry.say)
        cache.check_images(every)
    text = _text(recipe, every, precision, telemetry, cache.origin.images)
    numbers = cache.training_numbers(data)
    if text is not None:
        numbers = _captioned(numbers, text.features)
    source: Source = CachedLatentSource(cache, numbers, training.batch_size, training.seed, data.flip, world=current())
    if text is not None:
        source = TextBeside(source, text.features, None, training.seed)
    origin = cache.origin
    told = _told(config, origin.classes, text, numbers, precision)
    known = (origin.image_set, len(numbers), origin.images)
    return GeneratorInputs(source, latents_in_batch, *told, *known, cache.fingerprint, text)


def _captioned(numbers: Tensor, text: TextFeatures) -> Tensor:
    """Of the pictures with these numbers those that have a caption.

    Raises:
        UserError: none.
    """
    kept = numbers[text.starts[numbers + 1] > text.starts[numbers]]
    if not len(kept):
        raise UserError(f"none of the {len(numbers)} pictures to train on has a caption: add some, or hold out less")
    return kept


def _text(
    recipe: Recipe, images: ImageSet | None, precision: Precision, telemetry: Telemetry, image_set: str | None = None
) -> Text | None:
    """The captions' features, from a text cache or encoded now; None where classes are asked for.

    Args:
        images: the whole set, where it is open.
        image_set: images_fingerprint() of the set, where it is not.
    """
    config, data = recipe.generator.text, recipe.data
    if recipe.generator.condition != "text":
        return None
    command = make_text_command(data.path, config.features or "FOLDER", data.captions, config.encoder)
    if config.features is not None:
        cache = TextCache(config.features, config.encoder, command)
        given = images if images is not None else image_set
        assert given is not None
        cache.check_images(given)
        check_width(config.encoder, cache.width)
        return Text(cache, TextSource(config.encoder, cache.encoder_fingerprint), cache.captions)
    assert images is not None  # opened for their captions
    captions = read_captions(images, data.captions, telemetry.say)
    encoder = TextEncoder(config.encoder, precision)
    check_width(config.encoder, encoder.width)
    with telemetry.bar("captions") as update:
        features = encode_captions(captions, encoder, update, telemetry.say, data.memory_limit_gib, command)
    flat = captions.flat()
    made_by = TextSource(config.encoder, encoder.fingerprint())
    return Text(features, made_by, lambda rows: [flat[row] for row in rows.tolist()])


def check_width(config: TextEncoderConfig, found: int) -> None:
    """UserError where the encoder's features are not as wide as the recipe says, from which plans are made."""
    if config.width != found:
        raise UserError(
            f"text.encoder.width is {config.width}, but the features of {config.name} are {found} wide: "
            f"set generator.text.encoder.width={found}"
        )


def _told(
    config: GeneratorTrainingConfig, classes: list[str], text: Text | None, numbers: Tensor, precision: Precision
) -> tuple[Conditioning, Shown, list[str]]:
    """What the network is told of a batch, what previews show, and the names of the classes."""
    if text is None:
        check_classes(config.model, classes)
        assert config.model.classes is not None  # filled in just now
        shown = classes_shown(classes, config.model.classes)
        return ByLabel(config.model.classes, config.model.label_dropout), shown, classes
    empty, length = text.features.empty
    by_caption = ByCaption(empty.to(precision.device), length, config.text.dropout)
    return by_caption, _shown_captions(text, numbers), []


def _shown_captions(text: Text, numbers: Tensor) -> Shown:
    """Some of the pictures' captions, the same at every preview."""
    count = min(CLASSES, len(numbers))
    chosen = numbers[torch.arange(count) * len(numbers) // count]
    rows = text.features.starts[chosen]  # the first caption of each
    names = text.captions(rows)
    features, lengths = text.features.features(rows.repeat_interleave(PER_CLASS))
    return captions_shown(names, features, lengths, *text.features.empty)


def check_classes(model: LightningDiTConfig, classes: list[str]) -> None:
    """Fill in the number of classes from the images where the recipe leaves it open."""
    if model.classes is None:
        model.classes = len(classes)
    if len(classes) > model.classes:
        raise UserError(
            f"the images have {len(classes)} classes, but generator.model.classes is {model.classes}: "
            f"raise it, or leave it at null"
        )


def decisive(config: GeneratorTrainingConfig, text: Text | None) -> dict[str, object]:
    """Of the configuration what decides the course of training, captions and their encoder by what they are."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in INDIFFERENT}
    if config.start is not None:
        values["start_weights"] = str(Path(config.start) / "model.safetensors")  # known by their content
    if text is None:
        return values
    of_text = dataclasses.asdict(config.text)
    kept = {key: of_text[key] for key in ("model", "dropout")}
    del values["model"]
    return values | {"condition": "text", "text": kept | {"features": text.features.fingerprint}}
