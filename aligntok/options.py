"""Options of the commands that take no recipe, as dataclasses: `--help` and the checks are made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class SampleConfig:
    """`aligntok sample`: pictures from a trained generator.

    Args:
        generator: folder written by train-generator.
        tokenizer: folder of the tokenizer that it was trained on.
        output: PNG file of the grid; single pictures go to a folder of the same name with --separate true.
        labels: class names or numbers, one or [several, of, them]; null = every class.
        per_class: pictures per class.
        steps: network evaluations per picture; null = the generator's own setting.
        guidance: classifier-free guidance scale, 1 = none; null = the generator's own setting.
        guidance_channels: null = all, 3 = the first three (the reference code's way).
        seed: of the noise.
        separate: also write every picture as its own file.
        device: auto, cpu, cuda or cuda:N.
    """

    generator: str
    tokenizer: str
    output: str = "samples.png"
    labels: list[str | int] | int | str | None = None
    per_class: int = 8
    steps: int | None = None
    guidance: float | None = None
    guidance_channels: int | None = None
    seed: int = 0
    separate: bool = False
    device: str = "auto"


@dataclass
class ReconstructConfig:
    """`aligntok reconstruct`: pictures through a tokenizer and back.

    Args:
        tokenizer: folder written by train-tokenizer.
        images: folder, .tar or "embedded".
        output: PNG file: originals above, reconstructions below.
        image_size: centre crops of this size, a multiple of the tokenizer's downsampling.
        count: how many pictures.
        device: auto, cpu, cuda or cuda:N.
    """

    tokenizer: str
    images: str = "embedded"
    output: str = "reconstructions.png"
    image_size: int = 256
    count: int = 16
    device: str = "auto"


@dataclass
class EvaluateConfig:
    """`aligntok evaluate`: metrics of a tokenizer and, if given, of a generator on it.

    Args:
        tokenizer: folder written by train-tokenizer.
        generator: folder written by train-generator; null = tokenizer only.
        images: folder, .tar or "embedded": the reference of every metric.
        held_out: share of the images kept out of training; reconstruction is measured on them. 0 = measure on all.
        image_size: centre crops of this size.
        samples: generated pictures behind gFD and gKD.
        guidance: scales to evaluate the generator at.
        output: JSON file for the numbers; null = print only.
        device: auto, cpu, cuda or cuda:N.
    """

    tokenizer: str
    generator: str | None = None
    images: str = "embedded"
    held_out: float = 0.0
    image_size: int = 256
    samples: int = 1024
    guidance: tuple[float, ...] = (1.0, 2.0)
    output: str | None = None
    device: str = "auto"


@dataclass
class StatisticsConfig:
    """`aligntok statistics`: compute and store the latent statistics of a tokenizer.

    Args:
        tokenizer: folder to complete.
        images: folder, .tar or "embedded".
        image_size: centre crops of this size.
        count: images to use.
        device: auto, cpu, cuda or cuda:N.
    """

    tokenizer: str
    images: str
    image_size: int = 256
    count: int = 10_000
    device: str = "auto"


@dataclass
class ConvertConfig:
    """`aligntok convert`: published weights become a tokenizer or generator folder; every tensor is accounted for.

    Args:
        layout: --from: hustvl-vavae, hustvl-lightningdit, rae-decoder, rae-ditdh, flux-ae or diffusers-vae.
        file: the published checkpoint: .pt, .ckpt (read without executing anything) or .safetensors.
        output: folder to write.
        statistics: published latent statistics of a tokenizer: mean and std or var. Without them, aligntok statistics
            computes some, but a published generator needs the published ones.
        tokenizer: folder of the converted tokenizer that a generator belongs to.
        preset: of a LightningDiT checkpoint: 64ep (null) or 800ep, whose published guidance becomes the default.
        encoder: timm name of the encoder that an RAE decoder belongs to; null = DINOv2-B with registers.
        encoder_weights: its weights: pretrained (null), random, or a file in timm's layout.
    """

    layout: str
    file: str
    output: str
    statistics: str | None = None
    tokenizer: str | None = None
    preset: str | None = None
    encoder: str | None = None
    encoder_weights: str | None = None


@dataclass
class CacheLatentsConfig:
    """`aligntok cache-latents`: encode an image set once, for training Stage 3 and generators without the encoder.

    Args:
        tokenizer: folder of a tokenizer. Stage 3 does not change latents: a cache of Stage 2's tokenizer serves both.
        images: folder, .tar or "embedded".
        output: folder of the cache: what tokenizer.stages.stage3.latents and generator.latents ask for. The same
            command again continues an interrupted cache, and checks a finished one. f16d32 latents of ImageNet at
            256 px take 42 GB.
        image_size: centre crops of this size, a multiple of the tokenizer's downsampling.
        flip: also of the mirror images.
        shard_size: images per file; what an interruption costs at most.
        batch_size: images encoded at once, by each of the processes that torchrun starts.
        workers: processes that decode images, per process that encodes.
        precision: of the encoder: bf16 or fp32. Latents are stored as bf16.
        device: auto, cpu, cuda or cuda:N.
    """

    tokenizer: str
    images: str
    output: str
    image_size: int = 256
    flip: bool = True
    shard_size: int = 4096
    batch_size: int = 64
    workers: int = 8
    precision: Literal["bf16", "fp32"] = "bf16"
    device: str = "auto"


@dataclass
class StudyConfig:
    """`aligntok study`: the paper's tokenizers and ablations at a laptop's size, with one generator on each; hours.

    Args:
        output: folder of the study. The same command continues an interrupted one. Several processes may share it when
            they have different seeds; one thread each (OMP_NUM_THREADS=1) makes the most of a processor.
        seeds: every row is trained once for each.
        only: names of rows (recipes of configs/study); null = all.
        samples: generated pictures behind every gFD and gKD.
        guidance: scale of the guided column, on all channels.
        sampling_steps: network evaluations per sample at which the finished generators are compared.
        report: Markdown file to write from everything found in the output folder, with its pictures in a folder of
            the same name; null = OUTPUT/study.md.
        report_only: train and measure nothing.
    """

    output: str = "runs/study"
    seeds: tuple[int, ...] = (0, 1, 2)
    only: list[str] | None = None
    samples: int = 192
    guidance: float = 2.0
    sampling_steps: tuple[int, ...] = (10, 20, 30, 50, 120, 250)
    report: str | None = None
    report_only: bool = False
