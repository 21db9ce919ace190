"""What a command says before it trains: the machine once, then each part: data, networks, kernels, where it goes.

Nothing is decided here. The kernels come from the selection report of aligntok.kernels, the attention backend from
models/attention.py, the device from aligntok.commands.doctor, which also has the reasons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from aligntok.config import (
    FluxTransformerConfig,
    LightningDiTConfig,
    LossConfig,
    RivalStageConfig,
    StageConfig,
    TrainingConfig,
)
from aligntok.data.sources import Source
from aligntok.kernels import explain
from aligntok.models.attention import choose, sequence_is_short
from aligntok.models.decoder import Decoder
from aligntok.models.encoder import Encoder
from aligntok.models.joint_attention import choose_joint
from aligntok.models.lightning_dit import dimensions
from aligntok.runtime.devices import Precision
from aligntok.runtime.machine import device_line
from aligntok.runtime.world import World

_OF_FLOW = ("flow_interpolate", "flow_loss")


def machine_line(precision: Precision, world: World) -> str:
    """Versions, processes, device and precision of a run."""
    cuda = f", CUDA {torch.version.cuda}" if precision.device.type == "cuda" else ""
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    return (
        f"aligntok {_own_version()}, torch {torch.__version__}{cuda}; {processes} on {device_line(precision.device)}; "
        f"{precision}"
    )


@dataclass(frozen=True)
class PartFacts:
    """What the lines of one part are made of."""

    name: str
    steps: int
    training: TrainingConfig
    pictures: str  # how many of what
    source: Source
    networks: Mapping[str, nn.Module]  # those that it runs
    kernels: str  # from the functions below
    fingerprint: str
    output: Path


def part_lines(facts: PartFacts, world: World, mfu: str | None) -> Iterator[str]:
    """The lines of one part; `mfu` is what `Telemetry.watch` says of it."""
    batch, every = facts.training.batch_size, facts.training.checkpoint_every
    share = f" ({batch // world.size:,} per process)" if world.size > 1 else ""
    yield f"{facts.name}: {facts.steps:,} steps of {batch:,} images{share}"
    yield f"  data: {facts.pictures}, {facts.source}"
    sizes = [f"{name} {_size(network)}" for name, network in facts.networks.items() if list(network.parameters())]
    yield f"  parameters: {', '.join(sizes)}"
    yield f"  {facts.kernels}; why not otherwise: aligntok doctor"
    if mfu is not None:
        yield f"  {mfu}"
    resume = f"a checkpoint every {every:,} steps; to resume, give the same command again"
    yield f"  config {facts.fingerprint}, output {facts.output}, {resume}"


def tokenizer_kernels(losses: LossConfig, stage: StageConfig, encoder: Encoder, size: int, device: torch.device) -> str:
    """The operators that a tokenizer stage uses, with the implementation that runs on `device`, and its attention."""
    operators = ["adapter_projection", "group_norm_silu", *_of_losses(losses, stage)]
    rows, columns = encoder.grid(size, size)
    short = sequence_is_short(device.type, encoder.prefix_tokens + rows * columns)
    return f"kernels: {_chosen(operators, device)}; attention: timm's, {'written out' if short else 'sdpa'}"


def rival_kernels(
    losses: LossConfig, stage: RivalStageConfig, decoder: nn.Module, device: torch.device, adaptive: bool = True
) -> str:
    """The operators that a rival's training uses; its transformers are timm's.

    Args:
        adaptive: whether its adversarial loss has the adaptive weight.
    """
    own = ["group_norm_silu"] if isinstance(decoder, Decoder) else []
    return f"kernels: {_chosen([*own, *_of_losses(losses, stage, adaptive)], device)}"


def _of_losses(losses: LossConfig, stage: StageConfig | RivalStageConfig, adaptive: bool = True) -> list[str]:
    operators = []
    if losses.perceptual.kind != "none":
        operators.append("lpips_distance")
    if stage.gan_start < stage.steps and losses.gan_weight > 0:
        operators += ["gan_loss", "norm_ratio"] if adaptive else ["gan_loss"]
    return operators


def generator_kernels(model: LightningDiTConfig | FluxTransformerConfig, tokens: int, precision: Precision) -> str:
    """The operators that the generator uses in training over so many tokens, and its attention backend."""
    dtype = torch.bfloat16 if precision.name == "bf16" else torch.float32
    if isinstance(model, FluxTransformerConfig):
        asked = choose_joint(model.attention, precision.device.type, dtype)
        fused = (asked or explain("joint_attention", precision.device).name) == "triton"
        operators = ["adaln", *(["swiglu"] if model.mlp == "swiglu" else []), "joint_attention"]
        return (
            f"kernels: {_chosen([*operators, *_OF_FLOW], precision.device)}; attention: {'fused' if fused else 'sdpa'}"
        )
    _, width, heads = dimensions(model)
    backend = choose(model.attention, precision.device.type, dtype, width // heads, tokens)
    of_attention = "qknorm_attention" if backend == "fused" else "qknorm_rope"
    operators = ["adaln", "swiglu", of_attention, *_OF_FLOW]
    return f"kernels: {_chosen(operators, precision.device)}; attention: {backend}"


def _chosen(operators: list[str], device: torch.device) -> str:
    """As "adaln cpp, swiglu cpp, ..."; an implementation that was requested and cannot run is said to raise."""
    found = (explain(name, device) for name in operators)
    return ", ".join(f"{selection.op} {selection.name or 'raises'}" for selection in found)


def _size(network: nn.Module) -> str:
    """Parameters, as "22.1 M trained", "3.1 M frozen", or both where some of it trains."""
    count = {True: 0, False: 0}
    for parameter in network.parameters():
        count[parameter.requires_grad] += parameter.numel()
    parts = [f"{_short(count[True])} trained"] if count[True] else []
    parts += [f"{_short(count[False])} frozen"] if count[False] or not parts else []
    return " + ".join(parts)


def _short(count: int) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return str(count)


def _own_version() -> str:
    try:
        return version("aligntok")
    except PackageNotFoundError:
        return "(not installed)"
