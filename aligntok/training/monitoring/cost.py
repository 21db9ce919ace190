"""What a training step costs, counted without running it.

The real objective takes a real step (forward, every phase, backward, optimizer) on the meta device, whose tensors have
shapes, dtypes and strides, but no numbers and no memory, so that the full-size model is built and stepped in seconds on
any machine. Meanwhile `Meter` writes down

    activations    everything that operators allocate, from allocation to release, at the moment when it is most;
                   gradients of parameters, once complete, are counted apart
    saved          what autograd saves for the backward pass (saved-tensor hooks), at its highest
    FLOPs          of every operator, by the formulas of PyTorch's FlopCounterMode, recomputation included

Operators are chosen as on a CUDA GPU: what the fused kernels save there is what is counted. Not seen: workspaces inside
an operator (cuDNN, cuBLAS), the CUDA context, the allocator's fragmentation.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from aligntok.config import (
    GeneratorTrainingConfig,
    LightningDiTConfig,
    StageConfig,
    TokenizerConfig,
    TokenizerTrainingConfig,
    TrainingConfig,
)
from aligntok.data.frozen import FrozenNetwork
from aligntok.data.sources import Batch
from aligntok.kernels import assume_device
from aligntok.losses.perceptual import build_perceptual
from aligntok.models import lora
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.tokenizer import AlignTok
from aligntok.runtime.autocast import MetaAutocast
from aligntok.runtime.devices import Precision
from aligntok.training.generator_objective import GeneratorObjective
from aligntok.training.tokenizer_objective import FrozenInputs, TokenizerObjective

_ops = torch.ops.aligntok


def _attention_flops(qkv: Tensor, products: int) -> int:
    """Of `products` matrix products of N x N with D, for qkv [B, N, 3, H, D]."""
    batch, tokens, _, heads, width = qkv.shape
    return 2 * products * batch * heads * tokens**2 * width


# Our operators that hold matrix products, and attention, whose backward pass is charged what the mathematics needs,
# without the scores that it computes again.
_FORMULAS: dict[Any, Callable[..., int]] = {
    _ops.qknorm_attention_triton: lambda qkv, *_, **__: _attention_flops(qkv, 2),
    _ops.qknorm_attention_triton_backward: lambda dout, qkv, *_, **__: _attention_flops(qkv, 4),
    _ops.adapter_projection_triton: lambda p, weight, *_, **__: 2 * p.numel() * weight.shape[0],
    _ops.adapter_projection_triton_backward: lambda p, weight, *_, **__: 4 * p.numel() * weight.shape[0],
    torch.ops.aten._scaled_dot_product_flash_attention: lambda q, *_, **__: 4 * q.numel() * q.shape[-2],
    torch.ops.aten._scaled_dot_product_flash_attention_backward: lambda _, q, *__, **___: 8 * q.numel() * q.shape[-2],
}


class Meter(TorchDispatchMode):
    """Follows every storage that operators allocate, from its allocation to its release, and counts FLOPs."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self._before = {tensor.untyped_storage()._cdata for tensor in before}  # weights, the batch
        self.live = self.saved = self.peak_live = self.peak_saved = self.flops = 0
        self._sizes: dict[int, int] = {}  # storages allocated inside, by address
        self._holders: dict[int, int] = {}  # how many saved tensors lie in a storage

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs)
        elif func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes and storage._cdata not in self._before:
                    self._allocated(storage)
        return result

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._sizes[key] = size
        self.live += size
        self.peak_live = max(self.peak_live, self.live)
        weakref.finalize(storage, self._released, key)

    def _released(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def gradient(self, parameter: nn.Parameter) -> None:
        """A parameter's gradient is complete: it is counted elsewhere."""
        key = parameter.grad.untyped_storage()._cdata
        self.live -= self._sizes.get(key, 0)
        self._sizes[key] = 0

    def pack(self, tensor: Tensor) -> _Saved:
        """Hook: autograd saves a tensor."""
        key = tensor.untyped_storage()._cdata
        size = self._sizes.get(key, 0)
        holders = self._holders.get(key, 0)
        self._holders[key] = holders + 1
        if not holders:
            self.saved += size
            self.peak_saved = max(self.peak_saved, self.saved)
        held = _Saved(tensor)
        weakref.finalize(held, self._dropped, key, size)
        return held

    def _dropped(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.saved -= size


class _Saved:
    """A tensor that autograd has saved."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


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


class MetaPrecision:
    """Stands in for `devices.Precision` on the meta device."""

    device = torch.device("meta")

    def __init__(self, name: str) -> None:
        self.dtype = None if name == "fp32" else torch.bfloat16

    def autocast(self) -> MetaAutocast:
        return MetaAutocast(self.dtype)


@contextmanager
def on_meta(device_type: str) -> Iterator[None]:
    """Inside, new tensors have no memory, and operators are chosen as on `device_type`."""
    with torch.device("meta"), assume_device(device_type):
        yield


def tokenizer_cost(
    config: TokenizerTrainingConfig,
    stage: StageConfig,
    image_size: int,
    micro_batch: int,
    checkpointing: str = "none",
    device_type: str = "cuda",
) -> Cost:
    """Cost of the first step of a tokenizer's stage; frozen networks run in the loop, as with random crops."""
    with on_meta(device_type):
        tokenizer, discriminator = AlignTok(config.model), PatchDiscriminator(config.losses.discriminator)
        perceptual = None if config.losses.perceptual.kind == "none" else build_perceptual(config.losses.perceptual)
        snapshot = copy.deepcopy(tokenizer).requires_grad_(False) if stage.semantic.weight > 0 else None
        if "encoder" in stage.trains and config.model.encoder.lora_rank is not None:
            lora.add(tokenizer.encoder, config.model.encoder.lora_rank)
        precision = MetaPrecision(config.training.precision)
        carry_autocast(tokenizer.encoder.blocks, precision)
        config = replace(config, training=_settings(config.training, checkpointing, micro_batch))
        objective = stage_objective(config, stage, tokenizer, discriminator, perceptual, snapshot, precision)
        batch = make_batch(torch.empty(micro_batch, 3, image_size, image_size), classes=1)
        parts = {"encoder": tokenizer.encoder, "adapter": tokenizer.adapter, "decoder": tokenizer.decoder}
        parts |= {"discriminator": discriminator, "perceptual": perceptual, "snapshot": snapshot}
        units = [*tokenizer.encoder.blocks, tokenizer.adapter, *tokenizer.decoder.levels, discriminator]
        found = {name: part for name, part in parts.items() if part is not None}
        return measure(objective, batch, found, units)


def stage_objective(
    config: TokenizerTrainingConfig,
    stage: StageConfig,
    tokenizer: AlignTok,
    discriminator: nn.Module,
    perceptual: nn.Module | None,
    snapshot: AlignTok | None,
    precision: Precision | MetaPrecision,
) -> TokenizerObjective:
    """The objective of a stage, as random crops have it: no output of a frozen network is looked up."""
    # The noise asks whether there are statistics, and meta tensors have no numbers; it is one latent large
    stage = replace(stage, decoder_noise=0.0)
    frozen = FrozenInputs()
    if stage.trains == ("decoder",):
        frozen.latents = FrozenNetwork(tokenizer.raw_latents, precision)
    elif "encoder" not in stage.trains:
        frozen.features = FrozenNetwork(tokenizer.encoder, precision)
    if snapshot is not None:
        after = stage.semantic.position == "after_adapter"
        frozen.snapshot = FrozenNetwork(snapshot.raw_latents if after else snapshot.encoder, precision)
    return TokenizerObjective(
        tokenizer, discriminator, perceptual, config.losses, stage, frozen, precision, config.training
    )


def generator_cost(
    config: GeneratorTrainingConfig,
    latent_shape: tuple[int, int, int],
    micro_batch: int,
    checkpointing: str = "none",
    device_type: str = "cuda",
) -> Cost:
    """Cost of a step of the generator on latents (d, h, w) that come from a cache."""
    with on_meta(device_type):
        model = LightningDiT(config.model, latent_shape[0], latent_shape[1:])
        precision = MetaPrecision(config.training.precision)
        carry_autocast(model.blocks, precision)
        config = replace(config, training=_settings(config.training, checkpointing, micro_batch))
        objective = GeneratorObjective(model, itemgetter("latents"), config, precision)
        batch = make_batch(torch.empty(micro_batch, *latent_shape), config.model.classes)
        return measure(objective, batch, {"LightningDiT": model}, [*model.blocks])


def forward_flops(config: TokenizerConfig, image_size: int) -> dict[str, int]:
    """FLOPs of encoding and of decoding one image."""
    with on_meta("cuda"), torch.no_grad():
        tokenizer, images = AlignTok(config).eval(), torch.empty(1, 3, image_size, image_size)
        with MetaAutocast(torch.bfloat16):
            with Meter([]) as encoding:
                latents = tokenizer.raw_latents(images)
            with Meter([]) as decoding:
                tokenizer.decoder(latents)
    return {"encode": encoding.flops, "decode": decoding.flops}


def generator_forward_flops(config: LightningDiTConfig, latent_shape: tuple[int, int, int]) -> int:
    """FLOPs of one network evaluation for one latent."""
    with on_meta("cuda"), torch.no_grad():
        model = LightningDiT(config, latent_shape[0], latent_shape[1:]).eval()
        label = torch.zeros(1, dtype=torch.long)
        with MetaAutocast(torch.bfloat16), Meter([]) as meter:
            model(torch.empty(1, *latent_shape), torch.empty(1), label)
    return meter.flops


def make_batch(data: Tensor, classes: int) -> Batch:
    """A batch with `data` as its images and its latents."""
    numbers = torch.arange(len(data))
    rows = torch.arange(len(data), device="cpu")  # read by the objectives
    data_of_rows = {"labels": numbers % classes, "index": numbers, "flip": numbers > 0}
    return {"images": data, "latents": data, **data_of_rows, "rows": rows}


def measure(
    objective: TokenizerObjective | GeneratorObjective,
    batch: Batch,
    parts: dict[str, nn.Module],
    units: list[nn.Module],
) -> Cost:
    """Take the first step of `objective` and count.

    Args:
        objective: on the meta device.
        batch: of one process.
        parts: all networks on the device, by name.
        units: what FSDP gathers at a time.
    """
    weights = {id(p): p for part in parts.values() for p in part.parameters()}
    buffers = [b for part in parts.values() for b in part.buffers()]
    trained = [p for p in weights.values() if p.requires_grad]
    meter = Meter([*weights.values(), *buffers, *batch.values()])
    hooks = [p.register_post_accumulate_grad_hook(meter.gradient) for p in trained]
    for phase in objective.phases(0):
        phase.optimizer.zero_grad(set_to_none=True)
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
    ema = objective.ema
    return Cost(
        parameters={name: _numbers(part) for name, part in parts.items()},
        trained=_bytes(trained),
        frozen=_bytes([*weights.values(), *buffers]) - _bytes(trained),
        gradients=_bytes(p.grad for p in trained),
        optimizer=_bytes(x for state in states for x in state.values() if isinstance(x, Tensor)),
        averages=0 if ema is None else _bytes([*ema.module.parameters(), *ema.module.buffers()]),
        largest_unit=max(_bytes(p for p in unit.parameters() if p.requires_grad) for unit in units),
        micro_batch=len(batch["labels"]),
        activations=meter.peak_live,
        saved=meter.peak_saved,
        flops=meter.flops,
    )


def _settings(training: TrainingConfig, checkpointing: str, micro_batch: int) -> TrainingConfig:
    """What one process is to do: a single micro-batch, not compiled."""
    return replace(training, checkpointing=checkpointing, batch_size=micro_batch, accumulate=1, compile=False)


def carry_autocast(blocks: Iterable[nn.Module], precision: MetaPrecision) -> None:
    """Blocks that the backward pass computes again do so under autocast, which there has been left."""
    for block in blocks:
        block.forward = partial(_in_autocast, block.forward, precision)


def _in_autocast(forward: Callable, precision: MetaPrecision, *inputs: Any) -> Any:
    with precision.autocast():
        return forward(*inputs)


def _numbers(part: nn.Module) -> tuple[int, int]:
    counts = [0, 0]
    for parameter in part.parameters():
        counts[not parameter.requires_grad] += parameter.numel()
    return counts[0], counts[1]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
