"""Generator training from a configuration: LightningDiT on the latents of a finished tokenizer.

OUTPUT/generator/config.json, model.safetensors     the averaged weights, what `aligntok sample` reads
OUTPUT/snapshots/generator-N                        the same after N steps, with generator.snapshot_every
OUTPUT/checkpoints/generator/step-N                 while it runs
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from aligntok.config import LightningDiTConfig, Recipe
from aligntok.config.ranges import check_ranges
from aligntok.data.frozen import FrozenNetwork, FrozenOutput, latents_in_batch, tabulate
from aligntok.data.images import open_images
from aligntok.data.latent_cache import CachedLatentSource, LatentCache
from aligntok.data.latent_format import make_command
from aligntok.data.loading import build_source
from aligntok.data.sources import MemorySource, Source
from aligntok.diffusion.sampler import check_sampler
from aligntok.errors import UserError
from aligntok.models.generator import generator_class, save_generator
from aligntok.models.tokenizer import StoredTokenizer, load_tokenizer
from aligntok.runtime.collectives import on_main
from aligntok.runtime.devices import Precision, choose_precision
from aligntok.runtime.files import remove_unfinished
from aligntok.runtime.world import current
from aligntok.training import distributed
from aligntok.training.generator_objective import GeneratorObjective
from aligntok.training.loop import train
from aligntok.training.monitoring import cost
from aligntok.training.monitoring.banner import PartFacts, generator_kernels, machine_line, part_lines
from aligntok.training.monitoring.previews import GeneratorPreview
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.recovery.checkpoint import Checkpoints, discard
from aligntok.training.recovery.course import course

PART = "generator"
# Of the configuration, to the course of training; see `course`
INDIFFERENT = ("tokenizer", "sampler", "training", "latents", "snapshot_every")


def train_generator(recipe: Recipe, telemetry: Telemetry | None = None) -> Path:
    """Train and write a generator; returns its folder. A finished one is left as it is.

    Raises:
        UserError: no tokenizer, one without latent statistics, labels beyond generator.model.classes, a latent cache
            that does not belong to the tokenizer or to data.
    """
    with distributed.start(recipe.generator.training.device):
        return _train(recipe, telemetry or Telemetry(recipe.output, recipe.generator.training.log_every))


def _train(recipe: Recipe, telemetry: Telemetry) -> Path:
    check_ranges(recipe)
    config, output = recipe.generator, Path(recipe.output)
    distributed.check_batches(config.training)
    training, folder = config.training, output / PART
    on_main(lambda: remove_unfinished(output, PART.__eq__))
    if on_main(lambda: (folder / "config.json").is_file()):
        on_main(lambda: discard(output / "checkpoints" / PART))  # still there where a kill came between the two
        telemetry.say(f"{PART}: already finished, read from {folder}")
        return folder
    precision = choose_precision(training.device, training.precision)
    tokenizer = load_tokenizer(config.tokenizer or output / "tokenizer").to(precision.device).requires_grad_(False)
    check_sampler(config.sampler, tokenizer.latent_channels)  # training does not need it, and would be in vain
    inputs = _inputs(recipe, tokenizer, precision, telemetry)
    check_classes(config.model, inputs.classes)
    size = recipe.data.image_size
    grid = tokenizer.grid(torch.empty(1, 3, size, size, device="meta"))  # (h, w) of the latents
    torch.manual_seed(training.seed)
    network = generator_class(config.model)
    model = network(config.model, tokenizer.latent_channels, grid).to(precision.device)

    def keep(place: Path) -> None:
        """Write the averaged weights as a generator."""
        weights = distributed.gather(objective.ema.module)
        on_main(lambda: save_generator(place, model, weights, config.sampler, inputs.classes, belongs))

    def snapshot(done: int) -> None:
        keep(snapshot_folder(output, done))

    belongs = tokenizer.fingerprint()
    objective = GeneratorObjective(model, inputs.latents, config, precision, snapshot)
    decisive = {key: value for key, value in dataclasses.asdict(config).items() if key not in INDIFFERENT}
    mark = course(
        training,
        precision,
        recipe.data,
        images=inputs.count,
        image_set=inputs.identity,
        cache=inputs.cache,
        tokenizer=belongs,
        generator=decisive,
    )
    checkpoints = Checkpoints(output / "checkpoints" / PART, training, mark)
    preview = GeneratorPreview(objective, tokenizer, inputs.classes, precision)
    in_loop = (type(tokenizer), tokenizer.config) if isinstance(inputs.latents, FrozenNetwork) else None
    counted = (config, (tokenizer.latent_channels, *grid), precision.device.type, in_loop, size)
    flops = partial(cost.once, cost.generator_flops, *counted)
    mfu = telemetry.watch(PART, training, precision, config, preview, flops)
    facts = PartFacts(
        PART,
        objective.steps,
        training,
        f"{inputs.count:,} pictures of {inputs.name}",
        inputs.source,
        {"LightningDiT": model, "tokenizer": tokenizer},
        generator_kernels(config.model, model.positions.shape[1], precision),
        checkpoints.fingerprint,
        output,
    )
    telemetry.announce(machine_line(precision, telemetry.world), part_lines(facts, telemetry.world, mfu))
    train(PART, objective, inputs.source, training, precision.device, telemetry, checkpoints)
    keep(folder)
    on_main(checkpoints.remove)
    return folder


def snapshot_folder(output: Path, steps: int) -> Path:
    """Where training leaves the generator after `steps` steps."""
    return output / "snapshots" / f"{PART}-{steps:08d}"


@dataclass
class _Inputs:
    """What a generator is trained on."""

    source: Source
    latents: FrozenOutput
    classes: list[str]
    name: str  # of the image set
    count: int  # images
    identity: str  # what they are, wherever they lie
    cache: str | None = None  # fingerprint of the latent cache


def _inputs(recipe: Recipe, tokenizer: StoredTokenizer, precision: Precision, telemetry: Telemetry) -> _Inputs:
    data, training = recipe.data, recipe.generator.training
    if recipe.generator.latents is not None:
        return _cached_inputs(recipe, tokenizer, recipe.generator.latents)
    images, _ = open_images(data.path, data.max_images, say=telemetry.say).split(data.held_out)
    source = build_source(
        images,
        data,
        "center",
        training.batch_size,
        training.seed,
        telemetry.say,
        telemetry.bar,
        current(),
        device=precision.device,
    )
    latents: FrozenOutput = FrozenNetwork(tokenizer.encode, precision)
    if isinstance(source, MemorySource):
        with telemetry.bar("latents") as update:
            latents = tabulate(tokenizer.encode, source, precision, progress=update)
    return _Inputs(source, latents, images.classes, images.name, source.order.count, images.identity())


def _cached_inputs(recipe: Recipe, tokenizer: StoredTokenizer, latents: str) -> _Inputs:
    """From a latent cache alone: no image is opened and no encoder run."""
    config, data, training = recipe.generator, recipe.data, recipe.generator.training
    folder = config.tokenizer or Path(recipe.output) / "tokenizer"
    command = make_command(folder, data.path, latents, data.image_size)
    cache = LatentCache(latents, tokenizer.fingerprint(), command)
    cache.check_data(data)
    numbers = cache.training_numbers(data)
    source = CachedLatentSource(cache, numbers, training.batch_size, training.seed, data.flip, world=current())
    origin = cache.origin
    known = (origin.classes, origin.image_set, len(numbers), origin.images)
    return _Inputs(source, latents_in_batch, *known, cache.fingerprint)


def check_classes(model: LightningDiTConfig, classes: list[str]) -> None:
    """Fill in the number of classes from the images where the recipe leaves it open."""
    if model.classes is None:
        model.classes = len(classes)
    if len(classes) > model.classes:
        raise UserError(
            f"the images have {len(classes)} classes, but generator.model.classes is {model.classes}: "
            f"raise it, or leave it at null"
        )
