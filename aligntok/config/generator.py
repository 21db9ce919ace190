"""LightningDiT, its flow matching and its sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from aligntok.config.run import TrainingConfig
from aligntok.config.text import TextConfig


@dataclass
class LightningDiTConfig:
    """LightningDiT (VA-VAE's repository, models/lightningdit.py); a named size fills depth, width and heads."""

    size: Literal["S", "B", "L", "XL", "custom"] = "XL"
    depth: int | None = None  # only with size "custom"
    width: int | None = None
    heads: int | None = None
    patch_size: int = 1
    classes: int | None = None  # None = as many as the images have
    label_dropout: float = 0.1
    qk_norm: bool = False  # off for 64 epochs, on for longer runs, without it losses turn NaN (project page, plot)
    shift: bool = True  # adaLN with shift; False = "wo_shift"
    attention: Literal["auto", "fused", "flash-attn", "xformers", "sdpa"] = "auto"  # models/attention.py
    head_depth: int = 0  # blocks of a wide head behind the trunk; 2 = DiT^DH (RAE), 0 = none (LightningDiT)
    head_width: int = 2048  # only with a head: DiT^DH's width and heads for every trunk (RAE configs/training)
    head_heads: int = 16


@dataclass
class FlowConfig:
    """z_t = (1-t) z_0 + t z_1, target z_1 - z_0 (paper's direction: t = 1 is noise)."""

    time_sampling: Literal["logit_normal", "uniform"] = "logit_normal"  # LightningDiT
    direction_weight: float = 1.0  # LightningDiT's cosine term on the velocity; 0 = off
    time_shift: float = 1.0  # of training times, t -> s t / (1 + (s - 1) t); RAE: sqrt(values of a latent / 4096)


@dataclass
class SamplerConfig:
    solver: Literal["euler", "heun"] = "euler"
    steps: int = 250  # network evaluations per sample (Heun takes steps / 2 solver steps)
    time_shift: float = 3.3333333  # LightningDiT's s = .3 seen from t = 1 noise: 1 / .3
    end: float = 0.0  # last time of the grid, before the shift; RAE stops at .001
    guidance: float = 1.0  # 1 = none
    guidance_channels: int | None = None  # None = all; 3 = the first three (LightningDiT's code, paper parity)
    guidance_interval: tuple[float, float] = (
        0.0,
        0.9,
    )  # LightningDiT's interval start .10, 64 epochs: off above t = .9
    cuda_graph: bool = True  # on CUDA: record the network's launches once and replay them; false to debug


@dataclass
class GeneratorTrainingConfig:
    """LightningDiT on the latents of a trained tokenizer; images are always centre-cropped."""

    tokenizer: str | None = None  # folder of the tokenizer; None = OUTPUT/tokenizer
    start: str | None = None  # folder of a generator with the same network, whose weights training begins with
    condition: Literal["class", "text"] = "class"  # text: `text` says everything, `model` nothing
    model: LightningDiTConfig = field(default_factory=LightningDiTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(batch_size=1024, checkpoint_every=20_000)  # LightningDiT
    )
    steps: int = 80_000  # 64 ImageNet epochs at batch 1024
    learning_rate: float = 2e-4  # AdamW (.9, .95), no decay: LightningDiT train.py
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 0
    final_learning_rate: float = 1.0
    ema_decay: float = 0.9999
    gradient_clip: float | None = 1.0  # LightningDiT's authors advise it against NaN
    latents: str | None = None  # folder of a latent cache; its images are then not needed
    snapshot_every: int = 0  # steps between generators kept in OUTPUT/snapshots, to plot convergence; 0 = none
