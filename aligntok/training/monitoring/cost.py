"""What a training step costs, counted without running it.

The real objective takes a real step (forward, every phase, backward, optimizer) on the meta device, whose tensors have
shapes, dtypes and strides, but no numbers and no memory, so that the full-size model is built and stepped in seconds on
any machine. Meanwhile `Meter` writes down

    activations    everything that operators allocate, from allocation to release, at the moment when it is most;
                   gradients of parameters, once complete, are counted apart
    saved          what autograd saves for the backward pass (saved-tensor hooks), at its highest
    FLOPs          of every operator, by the formulas of PyTorch's FlopCounterMode, recomputation included

Operators are chosen as on the device type that is asked about: what the fused kernels save there is what is counted.
Not seen: workspaces inside an operator (cuDNN, cuBLAS), the CUDA context, the allocator's fragmentation. A run that
wants to know its FLOPs for MFU (`stage_flops`, `generator_flops`) takes no step of its own for that.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.swa_utils import AveragedModel
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
from aligntok.runtime.world import Place, alone
from aligntok.training.conditions import ByCaption, ByLabel, Conditioning
from aligntok.training.generator_objective import GeneratorObjective
from aligntok.training.monitoring.meter import Flops, Meter
from aligntok.training.objective import Objective
from aligntok.training.tokenizer_objective import TokenizerObjective, frozen_inputs

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """One training step of one process; bytes unless said otherwise."""

    parameters: dict[str, tuple[int, int]]  # part -> (trained, frozen), in numbers
    trained: int  # weights that change, fp32
    frozen: int  # weights and buffers that do not, and buffers
    gradients: int
    optimizer: int
    averages: int  # of the moving averages, where a stage keeps them
    largest_unit: int  # trained weights of the largest block: what FSDP gathers at a time
    micro_batch: int  # images
    activations: int  # the most that is allocated at a time beside `state`
    saved: int  # that part of it which autograd keeps for the backward pass, at its highest
    flops: int  # of the micro-batch: forward, backward, recomputation; no optimizer

    @property
    def state(self) -> int:
        """What lies on a GPU between two steps, gradients included, with nothing sharded."""
        return self.trained + self.frozen + self.gradients + self.optimizer + self.averages


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


_counted: dict[str, Any] = {}


def once(count: Callable[..., T], *arguments: Any) -> T:
    """count(*arguments), called once in a process: recipes share parts. Arguments are equal if they print equally."""
    key = repr((count.__qualname__, arguments))
    if key not in _counted:
        _counted[key] = count(*arguments)
    return _counted[key]


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
    objective = GeneratorObjective(model, latents, _conditioned(config, batch), config, precision)
    recompute(objective, precision, mode)
    return Built(objective, batch, parts, [*objective.blocks()])


def _conditioned(config: GeneratorTrainingConfig, batch: Batch) -> Conditioning:
    """What the generator is told of a batch on the meta device; captions of full length are put into it."""
    if config.condition == "class":
        assert config.model.classes is not None  # filled in from the images, or by the plan
        return ByLabel(config.model.classes, config.model.label_dropout)
    encoder, rows = config.text.encoder, len(batch["labels"])
    batch["text"] = torch.empty(rows, encoder.tokens, encoder.width)
    batch["text_lengths"] = torch.zeros(rows, dtype=torch.int64)
    return ByCaption(batch["text"][0], encoder.tokens, config.text.dropout)


def tokenizer_cost(
    config: TokenizerTrainingConfig,
    stage: StageConfig,
    image_size: int,
    micro_batch: int,
    checkpointing: str = "none",
    device_type: str = "cuda",
) -> Cost:
    """Cost of the first step of a tokenizer's stage; frozen networks run in the loop, as with random crops."""
    build = partial(build_stage, config, stage, image_size, micro_batch, looked_up=False, mode=checkpointing)
    return count(device_type, build, measure)


def generator_cost(
    config: GeneratorTrainingConfig,
    latent_shape: tuple[int, int, int],
    micro_batch: int,
    checkpointing: str = "none",
    device_type: str = "cuda",
) -> Cost:
    """Cost of a step of the generator on latents (d, h, w) that come from a cache."""
    return count(device_type, partial(build_generator, config, latent_shape, micro_batch, checkpointing), measure)


def stage_flops(
    config: TokenizerTrainingConfig, stage: StageConfig, image_size: int, looked_up: bool, device_type: str
) -> dict[int, float]:
    """FLOPs per image of a stage's steps; see `step_flops` and `build_stage`."""
    rows, mode = config.training.batch_size, config.training.checkpointing
    return count(device_type, partial(build_stage, config, stage, image_size, rows, looked_up, mode), step_flops)


def generator_flops(
    config: GeneratorTrainingConfig,
    latent_shape: tuple[int, int, int],
    device_type: str,
    tokenizer: tuple[type[StoredTokenizer], Any] | None = None,
    image_size: int = 0,
) -> dict[int, float]:
    """FLOPs per image of the generator's steps; see `step_flops` and `build_generator`."""
    rows, mode = config.training.batch_size, config.training.checkpointing
    build = partial(build_generator, config, latent_shape, rows, mode, tokenizer, image_size)
    return count(device_type, build, step_flops)


def step_flops(built: Built) -> dict[int, float]:
    """FLOPs per image of every kind of step, as {first step of the kind: FLOPs}; inside `on_meta`.

    The batch is that of a whole step: what is taken of a share of it (LPIPS) is then counted exactly, however many
    processes and micro-batches the step is divided into.
    """
    objective, found = built.objective, {}
    for step in objective.turns():
        with Flops() as counter:
            for phase in objective.phases(step):
                phase.clear()
                phase.loss(built.batch)[0].backward()
        found[step] = counter.flops / len(built.batch["labels"])
    return found


def forward_flops(kind: type[StoredTokenizer], config: Any, image_size: int) -> dict[str, int]:
    """FLOPs of encoding and of decoding one image by a tokenizer of a class and its configuration."""
    with on_meta("cuda"), torch.no_grad():
        tokenizer, images = kind(config).eval(), torch.empty(1, 3, image_size, image_size)
        with MetaAutocast(torch.bfloat16):
            with Flops() as encoding:
                latents = tokenizer.raw_latents(images)
            with Flops() as decoding:
                tokenizer.reconstruct(latents)
    return {"encode": encoding.flops, "decode": decoding.flops}


def generator_forward_flops(config: GeneratorTrainingConfig, latent_shape: tuple[int, int, int]) -> int:
    """FLOPs of one network evaluation for one latent."""
    with on_meta("cuda"), torch.no_grad():
        model = network_of(config, latent_shape[0], latent_shape[1:]).eval()
        data = torch.empty(1, *latent_shape)
        batch = make_batch(data, 1)
        condition = _conditioned(config, batch)(batch, Place(0, 1, 1))
        with MetaAutocast(torch.bfloat16), Flops() as counter:
            model(data, torch.empty(1), *condition)
    return counter.flops


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


def measure(built: Built) -> Cost:
    """Take the first step of an objective on the meta device, and count."""
    objective, batch, parts, units = built
    weights = {id(p): p for part in parts.values() for p in part.parameters()}
    buffers = [b for part in parts.values() for b in part.buffers()]
    trained = [p for p in weights.values() if p.requires_grad]
    meter = Meter([*weights.values(), *buffers, *batch.values()])
    hooks = [p.register_post_accumulate_grad_hook(meter.gradient) for p in trained]
    for phase in objective.phases(0):
        phase.clear()
        with meter, saved_tensors_hooks(meter.pack, attrgetter("tensor")), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # selective checkpointing does not call these hooks yet
            loss, values = phase.loss(batch)
            loss.backward()
        nn.utils.clip_grad_norm_(phase.parameters, phase.gradient_clip or float("inf"))
        phase.optimizer.step()
        del loss, values
    for hook in hooks:
        hook.remove()
    states = [value for optimizer in objective.optimizers().values() for value in optimizer.state.values()]
    averages = [m.module for m in objective.modules().values() if isinstance(m, AveragedModel)]
    return Cost(
        parameters={name: _numbers(part) for name, part in parts.items()},
        trained=_bytes(trained),
        frozen=_bytes([*weights.values(), *buffers]) - _bytes(trained),
        gradients=_bytes(p.grad for p in trained if p.grad is not None),
        optimizer=_bytes(x for state in states for x in state.values() if isinstance(x, Tensor)),
        averages=_bytes(x for module in averages for x in (*module.parameters(), *module.buffers())),
        largest_unit=max(_bytes(p for p in unit.parameters() if p.requires_grad) for unit in units),
        micro_batch=len(batch["labels"]),
        activations=meter.peak_live,
        saved=meter.peak_saved,
        flops=meter.flops,
    )


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


def _numbers(part: nn.Module) -> tuple[int, int]:
    counts = [0, 0]
    for parameter in part.parameters():
        counts[not parameter.requires_grad] += parameter.numel()
    return counts[0], counts[1]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
