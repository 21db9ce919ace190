"""What every run has, whatever it trains: images, the loop and its services; what the quickstart measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class DataConfig:
    """Where images come from and how they are cut."""

    path: str = (
        "embedded"  # folder (class sub-folders or flat), .tar, folder of .tar, "s-{000..127}.tar", or "embedded"
    )
    # of text to image: null = NAME.txt beside each NAME.jpg, in folders and tars; or a .jsonl, .json (COCO's too) or
    # .parquet file, or a folder of .parquet or .txt files (aligntok/data/captions.py)
    captions: str | None = None
    image_size: int = 256
    flip: bool = True  # horizontal flips; VA-VAE uses none for its tokenizer, LightningDiT caches both
    held_out: float = 0.0  # share of images kept for evaluation, chosen by a seeded shuffle
    workers: int = 8
    memory_limit_gib: float = 2.0  # centre-cropped sets below this size are decoded once and kept in memory
    max_images: int | None = None
    # of text to image: none = square centre crops; else each picture goes to the size that is nearest to its shape, a
    # batch has one size (aligntok/data/buckets.py), and image_size is the side of the square one
    buckets: Literal["none", "area", "short_side"] = "none"
    # what decodes streamed images; auto = DALI where it can be had and most images are JPEG, else Pillow in workers
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    stall_timeout: float = 300.0  # seconds without a batch that end a run; 0 = never


@dataclass
class SpikeConfig:
    """When a loss counts as a spike, and what follows."""

    factor: float = 4.0  # spreads above the median; spread = 1.48 MAD, at least 5 % of the median (recovery/spikes.py)
    window: int = 128  # losses behind the median; nothing is judged before as many have been seen
    rewind: bool = False  # go back to the last checkpoint and leave out the batches since (PaLM, section 5.1)
    max_rewinds: int = 3  # from one and the same checkpoint, before the run stops


PrecisionChoice = Literal["auto", "bf16", "tf32", "fp32"]


@dataclass
class TrainingConfig:
    """What the loop and its services need, whatever the objective."""

    batch_size: int = 256  # per step over all processes; VA-VAE's author recommends 256-512
    precision: PrecisionChoice = "auto"  # auto: bf16 where the device has it
    seed: int = 0
    device: str = "auto"
    checkpoint_every: int = 5_000  # steps
    keep_checkpoints: int = 2
    log_every: int = 50
    nonfinite_limit: int = 20  # skipped steps in a row after which the run stops
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: every process with all weights, or with a share of them
    accumulate: int = 1  # micro-batches per step; batch_size stays that of the step
    keep_best: str | None = None  # logged value, e.g. "loss": the checkpoint after its lowest mean stays as best-STEP
    spike: SpikeConfig | None = None  # None = losses are not watched for spikes
    preview_every: int = 5_000  # steps between two pictures in OUTPUT/previews, and one at the end; 0 = none
    profile: int = 0  # steps to trace into OUTPUT/profile, after five others; 0 = none
    wandb_project: str | None = None  # also record to this Weights & Biases project (pip install 'aligntok[wandb]')
    checkpointing: Literal["none", "selective", "full"] = "none"  # what blocks compute twice to save memory
    compile: bool = False  # torch.compile of the trained encoder's and the generator's blocks, one by one
    optimizer: Literal["adamw", "apex"] = "adamw"  # PyTorch's fused one, or apex's FusedAdam (CUDA, not with fsdp)


@dataclass
class EvaluationConfig:
    """What the quickstart measures at its end; `aligntok evaluate generation` takes the same numbers."""

    samples: int = 384  # generated pictures behind gFD and gKD
    guidance: float = 2.0  # the guided column, on all channels
    ablation: bool = False  # also train and evaluate a Stage-2 branch with w_sp = 0
    # of text to image, on the page: names of pictures that a generator of the embedded set has seen, and others
    prompts: tuple[str, ...] = (
        "pizza",
        "red apple",
        "dog face",
        "tulip",
        "fire engine",
        "older man",
        "heart eyes",
        "blue book",
        "a green car",
        "an angry cat",
        "a purple flower",
        "a house at night",
    )
