"""Training objectives on the meta device, whose tensors have shapes, dtypes and strides, but no numbers and no memory.

A full-size model is built there in seconds on any machine, with a batch for it, and takes real steps, which others
count (aligntok.training.monitoring.cost) or write down (aligntok.training.monitoring.ledger). Operators are chosen as
on the device type that is asked about.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aligntok.config import (
    GeneratorTrainingConfig,
    StageConfig,
    TokenizerTrainingConfig,
    TrainingConfig,
)
from aligntok.data.frozen import FrozenNetwork, FrozenOutput
from aligntok.data.sources import Batch
from aligntok.kernels import assume_device
from aligntok.losses.perceptual import build_perceptual
from aligntok.models import lora
from aligntok.models.blocks import prepare
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.generator import network_name, network_of
from aligntok.models.tokenizer import AlignTok, StoredTokenizer
from aligntok.runtime.autocast import MetaAutocast
from aligntok.runtime.devices import Precision
from aligntok.runtime.world import alone
from aligntok.training.conditions import ByCaption, ByLabel, Conditioning
from aligntok.training.generator_objective import GeneratorObjective
from aligntok.training.objective import Objective
from aligntok.training.tokenizer_objective import TokenizerObjective, frozen_inputs

T = TypeVar("T")


class MetaPrecision(Precision):
    """The meta device, where "auto" is bf16, as on a GPU."""

    def __init__(self, name: str) -> None:
        super().__init__(torch.device("meta"), name)

    def autocast(self) -> MetaAutocast:
        return MetaAutocast(None if self.name in ("tf32", "fp32") else torch.bfloat16)


@contextmanager
def on_meta(device_type: str) -> Iterator[None]:
    """Inside, new tensors have no memory, operators are chosen as on `device_type`, and there is no other process.

    What is drawn at random there leaves the random state as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), assume_device(device_type), alone():
        yield


class _Uninitialised(TorchFunctionMode):
    """Inside, weights on the meta device, which hold no numbers, are not filled with any: most of the time to build."""

    SKIPPED = frozenset("uniform_ normal_ trunc_normal_ clamp_ erfinv_ mul_ add_ fill_ zero_ constant_ copy_".split())

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in self.SKIPPED:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **kwargs)


def count(device_type: str, build: Callable[[], Built], what: Callable[[Built], T]) -> T:
    """what(build()) on the meta device."""
    with on_meta(device_type):
        with _Uninitialised():
            built = build()
        return what(built)


class Built(NamedTuple):
    """An objective on the meta device, a batch for it, and what it is made of."""

    objective: Objective
    batch: Batch
    parts: dict[str, nn.Module]  # all networks on the device, by name
    units: list[nn.Module]  # what FSDP gathers at a time


def build_stage(
    config: TokenizerTrainingConfig, stage: StageConfig, image_size: int, rows: int, looked_up: bool, mode: str
) -> Built:
    """A stage of tokenizer training with a batch of `rows` images; inside `on_meta`.

    Args:
        looked_up: whether outputs of frozen networks come from a table or a cache; else they run in the loop.
        mode: of activation checkpointing.
    """
    tokenizer, discriminator = AlignTok(config.model), PatchDiscriminator(config.losses.discriminator)
    perceptual = None if config.losses.perceptual.kind == "none" else build_perceptual(config.losses.perceptual)
    precision = MetaPrecision(config.training.precision)
    batch = make_batch(torch.empty(rows, 3, image_size, image_size), classes=1)
    snapshot = copy.deepcopy(tokenizer).requires_grad_(False) if stage.semantic.weight > 0 else None
    config = replace(config, training=settings(config.training, rows))
    freeze = freezer(precision, batch if looked_up else None)
    objective = stage_objective(config, stage, tokenizer, discriminator, perceptual, snapshot, precision, freeze)
    recompute(objective, precision, mode)
    parts: dict[str, nn.Module | None] = dict(tokenizer.named_children())
    parts |= {"discriminator": discriminator, "perceptual": perceptual}
    parts |= {} if looked_up else {"snapshot": snapshot}
    units = [*tokenizer.encoder.blocks, tokenizer.adapter, *tokenizer.decoder.levels, discriminator]
    return Built(objective, batch, {name: part for name, part in parts.items() if part is not None}, units)


def stage_objective(
    config: TokenizerTrainingConfig,
    stage: StageConfig,
    tokenizer: AlignTok,
    discriminator: nn.Module,
    perceptual: nn.Module | None,
    snapshot: AlignTok | None,
    precision: Precision,
    freeze: Callable[..., FrozenOutput] | None = None,
) -> TokenizerObjective:
    """The objective of a stage; `freeze` is that of `frozen_inputs`, None = frozen networks run in the loop."""
    frozen = frozen_inputs(stage, tokenizer, snapshot, freeze or freezer(precision))
    if "encoder" in stage.trains and config.model.encoder.lora_rank is not None:
        lora.add(tokenizer.encoder, config.model.encoder.lora_rank)
    return TokenizerObjective(
        tokenizer, discriminator, perceptual, config.losses, stage, frozen, precision, config.training
    )


def build_generator(
    config: GeneratorTrainingConfig,
    latent_shape: tuple[int, int, int],
    rows: int,
    mode: str,
    tokenizer: tuple[type[StoredTokenizer], Any] | None = None,
    image_size: int = 0,
) -> Built:
    """The generator with a batch of `rows` latents (d, h, w); inside `on_meta`.

    Args:
        mode: of activation checkpointing.
        tokenizer: class and configuration of what encodes the batch's images in the loop; None = they are looked up.
        image_size: of these images.
    """
    model = network_of(config, latent_shape[0], latent_shape[1:])
    precision = MetaPrecision(config.training.precision)
    latents: FrozenOutput = itemgetter("latents")
    data = torch.empty(rows, *latent_shape)
    parts: dict[str, nn.Module] = {network_name(model): model}
    if tokenizer is not None:
        kind, settings_of_it = tokenizer
        encoder = kind(copy.deepcopy(settings_of_it)).eval().requires_grad_(False)
        parts["tokenizer"] = encoder
        data, latents = torch.empty(rows, 3, image_size, image_size), FrozenNetwork(encoder.encode, precision)
    config = replace(config, training=settings(config.training, rows))
    batch = make_batch(data, config.model.classes or 1)
    objective = GeneratorObjective(model, latents, conditioned(config, batch), config, precision)
    recompute(objective, precision, mode)
    return Built(objective, batch, parts, [*objective.blocks()])


def conditioned(config: GeneratorTrainingConfig, batch: Batch) -> Conditioning:
    """What the generator is told of a batch on the meta device; captions of full length are put into it."""
    if config.condition == "class":
        assert config.model.classes is not None  # filled in from the images, or by the plan
        return ByLabel(config.model.classes, config.model.label_dropout)
    encoder, rows = config.text.encoder, len(batch["labels"])
    batch["text"] = torch.empty(rows, encoder.tokens, encoder.width)
    batch["text_lengths"] = torch.zeros(rows, dtype=torch.int64)
    return ByCaption(batch["text"][0], encoder.tokens, config.text.dropout)


def make_batch(data: Tensor, classes: int) -> Batch:
    """A batch with `data` as its images and its latents."""
    numbers = torch.arange(len(data))
    rows = torch.arange(len(data), device="cpu")  # read by the objectives
    data_of_rows = {"labels": numbers % classes, "index": numbers, "flip": numbers > 0}
    return {"images": data, "latents": data, **data_of_rows, "rows": rows}


def freezer(precision: Precision, batch: Batch | None = None) -> Callable[..., FrozenOutput]:
    """Makes outputs of frozen networks: looked up for the one batch that is given, else computed in the loop."""

    def freeze(network: Callable[[Tensor], Tensor], name: str = "") -> FrozenOutput:
        in_loop = FrozenNetwork(network, precision)
        if batch is None:
            return in_loop
        values = in_loop(batch)
        return lambda _: values

    return freeze


def settings(training: TrainingConfig, rows: int) -> TrainingConfig:
    """What one process is to do on the meta device: a single micro-batch of `rows` images, blocks as they are."""
    one = replace(training, batch_size=rows, accumulate=1, parallel="ddp", optimizer="adamw")
    return replace(one, checkpointing="none", compile=False)


def recompute(objective: Objective, precision: MetaPrecision, mode: str) -> None:
    """Activation checkpointing of an objective's blocks; the backward pass, where autocast has been left, enters it."""
    blocks = list(objective.blocks())
    for block in blocks:
        block.forward = partial(_in_autocast, block.forward, precision)
    prepare(blocks, mode, compile=False)


def _in_autocast(forward: Callable, precision: MetaPrecision, *inputs: Any, **named: Any) -> Any:
    with precision.autocast():
        return forward(*inputs, **named)
