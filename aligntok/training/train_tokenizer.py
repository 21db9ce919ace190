"""Tokenizer training from a configuration: the three stages one after the other, each resumable, each leaving a
tokenizer.

    OUTPUT/stage1/tokenizer, OUTPUT/stage2/tokenizer, OUTPUT/stage3/tokenizer    finished stages, with latent statistics
    OUTPUT/tokenizer                                                             the last of them: what everybody uses
    OUTPUT/checkpoints/STAGE/step-N                                              of the stage that is running

A finished stage is never run again; delete its folder to repeat it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aligntok.config import LossConfig, PerceptualConfig, Recipe, StageConfig
from aligntok.config.ranges import check_ranges
from aligntok.data.frozen import FrozenNetwork, FrozenOutput, FrozenTable, latents_in_batch, tabulate
from aligntok.data.geometry import check_size
from aligntok.data.images import ImageSet, open_images, told_before
from aligntok.data.latent_cache import LatentCache, LatentsBeside
from aligntok.data.latent_format import make_command
from aligntok.data.loading import build_source
from aligntok.data.sources import MemorySource, Source
from aligntok.errors import UserError
from aligntok.losses.perceptual import build_perceptual
from aligntok.models import lora
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.tokenizer import AlignTok, load_tokenizer
from aligntok.runtime.collectives import main_first, on_main
from aligntok.runtime.devices import choose_precision
from aligntok.runtime.files import remove_unfinished, write_folder
from aligntok.runtime.weights import load_strictly
from aligntok.runtime.world import current
from aligntok.training import distributed
from aligntok.training.loop import train
from aligntok.training.monitoring import cost
from aligntok.training.monitoring.banner import PartFacts, machine_line, part_lines, tokenizer_kernels
from aligntok.training.monitoring.previews import TokenizerPreview
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.recovery.checkpoint import Checkpoints, discard
from aligntok.training.recovery.course import FRESH, course
from aligntok.training.sizes import refuse_buckets
from aligntok.training.statistics import latent_statistics
from aligntok.training.tokenizer_objective import FrozenInputs, TokenizerObjective, frozen_inputs

STAGES = ("stage1", "stage2", "stage3")


class TokenizerTraining:
    """Images, networks and services of one run; `run()` is the whole of it.

    Args:
        recipe: everything; `recipe.output` is created.
        telemetry: None = a new one in the output folder.

    A subclass with another `objective` trains with losses of its own (examples/another_loss.py).
    """

    objective: ClassVar[type[TokenizerObjective]] = TokenizerObjective

    def __init__(self, recipe: Recipe, telemetry: Telemetry | None = None) -> None:
        self.config, self.data = recipe.tokenizer, recipe.data
        self.output = Path(recipe.output)
        training = self.config.training
        check_ranges(recipe)
        refuse_buckets(recipe.data, "a tokenizer")
        check_size(self.data.image_size, self.config.model.encoder.downsample)
        distributed.check_batches(training)
        for name in STAGES:
            stage = getattr(self.config.stages, name)
            check_stage(name, stage, self.config.losses)
            if stage.steps and (rank := self._lora_rank(stage)) is not None:
                lora.require_peft(rank)
        self.precision = choose_precision(training.device, training.precision)
        self.telemetry = telemetry or Telemetry(self.output, training.log_every)
        with self.telemetry.bar("image index") as update:
            everything = open_images(self.data.path, self.data.max_images, update, self.telemetry.say)
        self.images, self.held_out = everything.split(self.data.held_out)
        self._source: Source | None = None
        self._features: FrozenTable | None = None

    def _lora_rank(self, stage: StageConfig) -> int | None:
        """Of the LoRA that a stage trains in the encoder's place."""
        return self.config.model.encoder.lora_rank if "encoder" in stage.trains else None

    def run(self) -> AlignTok:
        """All stages that are not finished yet; returns the tokenizer of the last one, on the training device."""
        tokenizer: AlignTok | None = None
        on_main(lambda: remove_unfinished(self.output, "tokenizer".__eq__))
        for stage in STAGES:
            if getattr(self.config.stages, stage).steps:
                tokenizer = self.run_stage(stage, getattr(self.config.stages, stage), tokenizer)
        if tokenizer is None:
            raise UserError("all three stages have 0 steps: nothing to train")
        on_main(lambda: tokenizer.save(self.output / "tokenizer"))
        return tokenizer

    def run_stage(self, name: str, stage: StageConfig, start: AlignTok | None) -> AlignTok:
        """Train one stage from `start` (None = the pretrained encoder with a new adapter and decoder)."""
        folder = self.output / name
        on_main(lambda: remove_unfinished(folder, ("tokenizer", "discriminator").__contains__))
        if self._finished(name):
            on_main(lambda: discard(self.output / "checkpoints" / name))  # a kill came between
            self.telemetry.say(f"{name}: already finished, read from {folder}")
            finished = load_tokenizer(folder / "tokenizer")
            assert isinstance(finished, AlignTok)
            return finished.to(self.precision.device)
        tokenizer = self._begin(start)
        discriminator = self._discriminator(folder)
        source, frozen, cache = self._inputs(name, stage, tokenizer, pretrained=start is None)
        before = tokenizer.fingerprint()
        if (rank := self._lora_rank(stage)) is not None:
            lora.add(tokenizer.encoder, rank)
        sharded = distributed.is_sharded(self.config.training.parallel)
        objective = self.objective(
            copy.deepcopy(tokenizer) if sharded else tokenizer,
            discriminator,
            self._perceptual(),
            self.config.losses,
            stage,
            frozen,
            self.precision,
            self.config.training,
            self.config.betas,
        )
        checkpoints = Checkpoints(
            self.output / "checkpoints" / name,
            self.config.training,
            course(
                self.config.training,
                self.precision,
                self.data,
                images=source.order.count,
                image_set=self.identity,
                crop=self.config.crop,
                betas=self.config.betas,
                model=self.config.model,
                losses=self.config.losses,
                stage=dataclasses.replace(stage, latents=None),  # `cache` says which, wherever it lies
                accumulate=self.config.training.accumulate,  # BatchNorm and the adaptive weight are per micro-batch
                start=before if start is not None else self.origin(tokenizer),
                cache=cache,
            ),
        )
        self._announce(name, objective, source, checkpoints)
        train(
            name,
            objective,
            source,
            self.config.training,
            self.precision.device,
            self.telemetry,
            checkpoints,
        )
        objective.finish()
        if sharded:
            tokenizer.load_state_dict(distributed.gather(objective.tokenizer))
        lora.merge(tokenizer.encoder)
        tokenizer.eval().requires_grad_(False)
        if stage.trains != ("decoder",):
            self._compute_statistics(tokenizer)
        elif tokenizer.fingerprint() != before:
            raise AssertionError("decoder-only training changed the encoder, the adapter or the latent statistics")
        on_main(lambda: self._finish(folder, tokenizer, discriminator, checkpoints))
        return tokenizer

    def _announce(self, name: str, objective: TokenizerObjective, source: Source, checkpoints: Checkpoints) -> None:
        """Say what starts, and prepare its telemetry."""
        training, size = self.config.training, self.data.image_size
        shown = self.held_out if len(self.held_out) else self.images
        preview = TokenizerPreview(objective, shown, size, self.precision)
        looked_up = not any(isinstance(output, FrozenNetwork) for output in vars(objective.frozen).values())
        counted = (self.config, objective.stage, size, looked_up, self.precision.device.type)
        flops = partial(cost.once, cost.stage_flops, *counted)
        mfu = self.telemetry.watch(name, training, self.precision, self.config, preview, flops)
        networks = dict(objective.tokenizer.named_children())
        if "discriminator" in objective.modules():
            networks["discriminator"] = objective.discriminator
        if objective.perceptual is not None:
            networks["perceptual"] = objective.perceptual
        facts = PartFacts(
            name,
            objective.steps,
            training,
            f"{len(self.images):,} pictures of {self.images.name}",
            source,
            networks,
            tokenizer_kernels(
                self.config.losses, objective.stage, objective.tokenizer.encoder, size, self.precision.device
            ),
            checkpoints.fingerprint,
            self.output,
        )
        world = self.telemetry.world
        self.telemetry.announce(machine_line(self.precision, world), part_lines(facts, world, mfu))

    def prepare(self) -> None:
        """Read the images and compute what the stages look up, before the first of them needs it."""
        if isinstance(self.source, MemorySource) and not self._finished("stage1"):
            assert self.features is not None

    def _finished(self, name: str) -> bool:
        return on_main(lambda: (self.output / name / "tokenizer" / "config.json").is_file())

    @property
    def source(self) -> Source:
        """Training batches: from memory where the crops repeat and fit, else streamed."""
        if self._source is None:
            self._source = self._batches_of(self.images, self.config.crop)
        return self._source

    def _batches_of(self, images: ImageSet, crop: str) -> Source:
        training, telemetry = self.config.training, self.telemetry
        device, services = self.precision.device, (telemetry.say, telemetry.bar)
        return build_source(
            images, self.data, crop, training.batch_size, training.seed, *services, current(), device=device
        )

    @property
    def features(self) -> FrozenTable:
        """Tokens of the pretrained encoder for every crop, which the stage that starts from it reads."""
        if self._features is None:
            encoder, source = self.pretrained().encoder, self.source
            assert isinstance(source, MemorySource)  # or nobody looks them up
            with self.telemetry.bar("encoder features") as update:
                self._features = tabulate(encoder, source, self.precision, torch.bfloat16, update)
        return self._features

    @cached_property
    def identity(self) -> str:
        """What the training images are, wherever they lie."""
        return self.images.identity()

    def origin(self, tokenizer: AlignTok) -> str:
        """What Stage 1 starts from: the encoder's weights where they are given. Weights that are drawn do not count:

        they follow from the seed, another kind of processor rounds them otherwise, and a checkpoint replaces them.
        """
        drawn = self.config.model.encoder.weights == "random"
        return FRESH if drawn else f"{FRESH} {tokenizer.fingerprint(('encoder',))}"

    def _begin(self, start: AlignTok | None) -> AlignTok:
        return self.pretrained() if start is None else copy.deepcopy(start)

    def pretrained(self) -> AlignTok:
        """The pretrained encoder with a new, seeded adapter and decoder: where Stage 1 starts."""
        torch.manual_seed(self.config.training.seed)
        with main_first():
            tokenizer = AlignTok(self.config.model)
        return tokenizer.to(self.precision.device).eval()

    def _inputs(
        self, name: str, stage: StageConfig, tokenizer: AlignTok, pretrained: bool
    ) -> tuple[Source, FrozenInputs, str | None]:
        """(batches, outputs of frozen networks for them, fingerprint of the latent cache behind them).

        `pretrained` tells that the tokenizer's encoder is still as it was before all stages.
        """
        if stage.latents is None:
            return self.source, self._frozen_inputs(stage, tokenizer, pretrained), None
        if stage.trains != ("decoder",):
            raise UserError(
                f"tokenizer.stages.{name}.latents is given, but the stage trains {', '.join(stage.trains)}: only "
                f"decoder-only training (Stage 3) can use a latent cache; set it to null"
            )
        finished = [stage for stage in STAGES if self._finished(stage)]
        if not finished:
            raise UserError(
                f"tokenizer.stages.{name}.latents is given, but no stage before it has been trained: latents need a "
                f"trained adapter and their statistics"
            )
        start = self.output / finished[-1] / "tokenizer"
        command = make_command(start, self.data.path, stage.latents, self.data.image_size)
        cache = LatentCache(stage.latents, tokenizer.fingerprint(), command)
        cache.check_data(self.data)
        images = open_images(self.data.path, say=told_before)
        cache.check_images(images)
        numbers = cache.training_numbers(self.data)
        source = self._batches_of(images.subset(numbers.tolist()), "center")
        frozen = FrozenInputs(latents=lambda batch: tokenizer.denormalise(latents_in_batch(batch)))
        return LatentsBeside(source, cache, numbers), frozen, cache.fingerprint

    def _frozen_inputs(self, stage: StageConfig, tokenizer: AlignTok, pretrained: bool) -> FrozenInputs:
        def freeze(network: Callable[[Tensor], Tensor], what: str) -> FrozenOutput:
            """A table where the crops repeat, the network in the loop where they do not."""
            source = self.source
            if not isinstance(source, MemorySource):
                return FrozenNetwork(network, self.precision)
            if pretrained and network is tokenizer.encoder:
                return self.features
            dtype = torch.bfloat16 if network is tokenizer.encoder else torch.float32
            with self.telemetry.bar(what) as update:
                return tabulate(network, source, self.precision, dtype, update)

        tied = stage.semantic.weight > 0
        snapshot = copy.deepcopy(tokenizer).eval().requires_grad_(False) if tied else None
        return frozen_inputs(stage, tokenizer, snapshot, freeze)

    def _perceptual(self) -> nn.Module | None:
        return training_perceptual(self.config.losses.perceptual, self.precision.device)

    def _discriminator(self, folder: Path) -> PatchDiscriminator:
        """New, or the one that the stage before has left (VA-VAE carries it over)."""
        torch.manual_seed(self.config.training.seed + 1)
        discriminator = PatchDiscriminator(self.config.losses.discriminator)
        earlier = [self.output / stage / "discriminator" / "model.safetensors" for stage in STAGES]
        own = folder.name if folder.name in STAGES else "stage2"  # a branch starts where Stage 2 starts
        for file in reversed(earlier[: STAGES.index(own)]):
            if file.is_file():
                load_strictly(discriminator, load_file(file), file)
                break
        return discriminator.to(self.precision.device)

    def _compute_statistics(self, tokenizer: AlignTok) -> None:
        wanted = min(self.config.statistics_images, len(self.images))
        with self.telemetry.bar("latent statistics") as update:
            tokenizer.set_statistics(*latent_statistics(tokenizer, self.source, wanted, self.precision, update))

    def _finish(self, folder: Path, tokenizer: AlignTok, discriminator: nn.Module, checkpoints: Checkpoints) -> None:
        write_folder(folder / "discriminator", {"model": discriminator.state_dict()}, {})
        tokenizer.save(folder / "tokenizer")  # last: its presence means that the stage is finished
        checkpoints.remove()


def check_stage(name: str, stage: StageConfig, losses: LossConfig) -> None:
    """Raise UserError for a stage that trains nothing, a part twice, or without what its adversarial loss needs."""
    key, trains = f"tokenizer.stages.{name}.trains", list(stage.trains)
    if stage.steps and (not trains or len(set(trains)) < len(trains)):
        raise UserError(f"{key} is {trains}, expected some of encoder, adapter and decoder, each once")
    if "decoder" not in trains and stage.gan_start < stage.steps and losses.gan_weight > 0:
        raise UserError(
            f"{key} is {trains}, but the adversarial loss is weighed by gradients at the decoder's last layer: "
            f"add decoder, or set tokenizer.stages.{name}.gan_start to {stage.steps} for none"
        )


def training_perceptual(config: PerceptualConfig, device: torch.device) -> nn.Module | None:
    """The perceptual loss as training uses it, or None where the configuration has none."""
    if config.kind == "none":
        return None
    with main_first():
        perceptual = build_perceptual(config)
    return perceptual.to(device).to(memory_format=torch.channels_last)


def train_tokenizer(recipe: Recipe) -> AlignTok:
    """`aligntok train-tokenizer`: see the module docstring."""
    with distributed.start(recipe.tokenizer.training.device):
        training = TokenizerTraining(recipe)
        tokenizer = training.run()
        training.telemetry.say(f"tokenizer: {training.output / 'tokenizer'}")
    return tokenizer
