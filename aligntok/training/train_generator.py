"""Generator training from a configuration: a diffusion transformer on the latents of a finished tokenizer.

OUTPUT/generator/config.json, model.safetensors     the averaged weights, what `aligntok sample` reads
OUTPUT/snapshots/generator-N                        the same after N steps, with generator.snapshot_every
OUTPUT/checkpoints/generator/step-N                 while it runs
OUTPUT/picture_sizes.safetensors                    with data.buckets: what the pictures' headers say
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

import torch

from aligntok.config import GeneratorTrainingConfig, Recipe
from aligntok.config.ranges import check_ranges
from aligntok.data.buckets import Bucket, told_sizes
from aligntok.data.frozen import FrozenNetwork
from aligntok.diffusion.sampler import check_sampler
from aligntok.errors import UserError
from aligntok.models.generator import Generator, Network, network_name, network_of, save_generator
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.collectives import on_main
from aligntok.runtime.devices import choose_precision
from aligntok.runtime.files import remove_unfinished
from aligntok.training import distributed
from aligntok.training.generator_inputs import Text, decisive, generator_inputs
from aligntok.training.generator_objective import GeneratorObjective
from aligntok.training.loop import train
from aligntok.training.monitoring import cost
from aligntok.training.monitoring.banner import PartFacts, generator_kernels, machine_line, part_lines
from aligntok.training.monitoring.previews import GeneratorPreview
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.recovery.checkpoint import Checkpoints, discard
from aligntok.training.recovery.course import course
from aligntok.training.sizes import check_buckets

PART = "generator"


def train_generator(recipe: Recipe, telemetry: Telemetry | None = None) -> Path:
    """Train and write a generator; returns its folder. A finished one is left as it is.

    Raises:
        UserError: no tokenizer, one without latent statistics, or inputs that do not fit; see `generator_inputs`.
    """
    with distributed.start(recipe.generator.training.device):
        return _train(recipe, telemetry or Telemetry(recipe.output, recipe.generator.training.log_every))


def _train(recipe: Recipe, telemetry: Telemetry) -> Path:
    check_ranges(recipe)
    check_buckets(recipe)
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
    start = None if config.start is None else open_start(config, config.start, tokenizer.latent_channels)
    inputs = generator_inputs(recipe, tokenizer, precision, telemetry)
    size = recipe.data.image_size
    grid = tokenizer.grid(torch.empty(1, 3, size, size, device="meta"))  # (h, w) of the latents
    torch.manual_seed(training.seed)
    model = network_of(config, tokenizer.latent_channels, grid)
    if start is not None and config.start is not None:
        start_from(model, start, config.start, inputs.text)
    model = model.to(precision.device)

    def keep(place: Path) -> None:
        """Write the averaged weights as a generator."""
        weights = distributed.gather(objective.ema.module, everywhere=False)
        on_main(lambda: save_generator(place, model, weights, config.sampler, inputs.classes, belongs, made_by))

    def snapshot(done: int) -> None:
        keep(snapshot_folder(output, done))

    belongs = tokenizer.fingerprint()
    made_by = None if inputs.text is None else inputs.text.made_by
    objective = GeneratorObjective(
        model, inputs.latents, inputs.condition, config, precision, snapshot, len(inputs.sizes or (1,))
    )
    mark = course(
        training,
        precision,
        recipe.data,
        images=inputs.count,
        image_set=inputs.identity,
        cache=inputs.cache,
        tokenizer=belongs,
        generator=decisive(config, inputs.text),
    )
    checkpoints = Checkpoints(output / "checkpoints" / PART, training, mark)
    preview = GeneratorPreview(objective, tokenizer, inputs.shown, precision)
    in_loop = (type(tokenizer), tokenizer.config) if isinstance(inputs.latents, FrozenNetwork) else None
    counted = (config, (tokenizer.latent_channels, *grid), precision.device.type, in_loop, size)
    flops = partial(cost.once, cost.generator_flops, *counted)
    mfu = telemetry.watch(PART, training, precision, config, preview, flops)
    facts = PartFacts(
        PART,
        objective.steps,
        training,
        f"{inputs.count:,} pictures of {inputs.name}{_in_sizes(inputs.sizes)}",
        inputs.source,
        {network_name(model): model, "tokenizer": tokenizer},
        generator_kernels(model.config, math.prod(grid) // model.patch_size**2, precision),
        checkpoints.fingerprint,
        output,
    )
    if inputs.sizes is not None and mfu is not None:
        mfu += f"; every size counted as {size} x {size}"
    telemetry.announce(machine_line(precision, telemetry.world), part_lines(facts, telemetry.world, mfu))
    train(PART, objective, inputs.source, training, precision.device, telemetry, checkpoints)
    keep(folder)
    on_main(checkpoints.remove)
    return folder


def _in_sizes(sizes: dict[Bucket, int] | None) -> str:
    """With data.buckets, how many pictures have which size."""
    return "" if sizes is None else f" in {told_sizes(sizes)}"


def open_start(config: GeneratorTrainingConfig, folder: str, channels: int) -> Generator:
    """The generator that training starts from, compared as far as can be before the inputs are there.

    Raises:
        UserError: no generator there, or one with another network or other channels.
    """
    given = Generator(folder)
    own = dataclasses.asdict(config.text.model if config.condition == "text" else config.model)
    other = dataclasses.asdict(given.model.config)
    indifferent = {"attention"} | ({"classes"} if own.get("classes", 0) is None else set())  # open: see `start_from`
    names = [name for name in other | own if other.get(name) != own.get(name) and name not in indifferent]
    told = [", ".join(f"{name} {values.get(name)}" for name in names) for values in (other, own)]
    _refuse_other(folder, "network", *told)
    _refuse_other(folder, "latent channels", given.latent_shape[0], channels)
    return given


def start_from(model: Network, given: Generator, folder: str, text: Text | None) -> None:
    """Give the network the weights of `open_start`'s; its latents may have another height and width.

    Raises:
        UserError: it has another number of classes or another text encoder.
    """
    if isinstance(model, LightningDiT) and isinstance(given.model, LightningDiT):
        _refuse_other(folder, "number of classes", given.model.config.classes, model.config.classes)
    _refuse_other(folder, "text encoder", given.text and given.text.fingerprint, text and text.made_by.fingerprint)
    own = {name: value for name, value in model.state_dict().items() if name == "positions"}  # a table of its grid
    model.load_state_dict(given.model.state_dict() | own)


def _refuse_other(folder: str, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise UserError(f"generator.start is {folder}, which has another {what}: {found}, expected {expected}")


def snapshot_folder(output: Path, steps: int) -> Path:
    """Where training leaves the generator after `steps` steps."""
    return output / "snapshots" / f"{PART}-{steps:08d}"
