"""Which numbers and words the fields of a recipe may hold; checked before anything is read or computed.

The command line knows types and words already. Here are the ranges, and the words for recipes made in Python.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from math import inf
from typing import Any, Literal, get_args, get_origin, get_type_hints

from aligntok.config.generator import FlowConfig, GeneratorTrainingConfig, LightningDiTConfig, SamplerConfig
from aligntok.config.rivals import (
    AlignmentConfig,
    DinoDiscriminatorConfig,
    MAETokConfig,
    MAETokLossConfig,
    RAEConfig,
    RepaEConfig,
    RivalConfig,
    RivalStageConfig,
    VAEConfig,
    ViTDecoderConfig,
)
from aligntok.config.run import DataConfig, EvaluationConfig, SpikeConfig, TrainingConfig
from aligntok.config.text import FluxTransformerConfig, TextConfig, TextEncoderConfig
from aligntok.config.tokenizer import (
    AdapterConfig,
    DecoderConfig,
    DiscriminatorConfig,
    EncoderConfig,
    LossConfig,
    SemanticConfig,
    StageConfig,
    TokenizerTrainingConfig,
)
from aligntok.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `text` is how a message calls them."""

    low: float
    high: float
    text: str


ANY_COUNT = Range(0, inf, "at least 0")
COUNT = Range(1, inf, "at least 1")
STEPS = Range(1, inf, "at least 1 step")
WEIGHT = Range(0, inf, "at least 0")
POSITIVE = Range(5e-324, inf, "more than 0")
SHARE = Range(0, 1, "a number from 0 to 1")
BELOW_ONE = Range(0, 1 - 2**-53, "at least 0 and less than 1")
RATES = {
    "learning_rate": WEIGHT,
    "warmup_steps": ANY_COUNT,
    "final_learning_rate": WEIGHT,
    "ema_decay": SHARE,
    "gradient_clip": WEIGHT,
}
ADVERSARIAL = RATES | {"discriminator_learning_rate": WEIGHT, "gan_start": ANY_COUNT}
RANGES: dict[type, dict[str, Range]] = {
    DataConfig: {"workers": ANY_COUNT, "memory_limit_gib": WEIGHT, "max_images": COUNT, "stall_timeout": WEIGHT},
    SpikeConfig: {"factor": POSITIVE, "window": Range(2, inf, "at least 2 losses"), "max_rewinds": ANY_COUNT},
    TrainingConfig: {
        "batch_size": Range(1, inf, "at least 1 image"),
        "seed": Range(0, 2**31 - 1, "a number from 0 to 2147483647"),  # a step's seed is the seed and 32 bits more
        "checkpoint_every": STEPS,
        "keep_checkpoints": COUNT,
        "log_every": STEPS,
        "nonfinite_limit": STEPS,
        "accumulate": Range(1, inf, "at least 1 micro-batch"),
        "preview_every": ANY_COUNT,
        "profile": ANY_COUNT,
    },
    EvaluationConfig: {"samples": COUNT},
    EncoderConfig: {"downsample": Range(1, inf, "at least 1 pixel")},
    AdapterConfig: {"hidden": COUNT, "latent_channels": COUNT},
    DecoderConfig: {"base_channels": COUNT, "channel_multipliers": COUNT, "blocks": ANY_COUNT, "groups": COUNT},
    DiscriminatorConfig: {"base_channels": COUNT, "layers": ANY_COUNT},
    LossConfig: {
        "perceptual_weight": WEIGHT,
        "perceptual_share": Range(5e-324, 1, "more than 0 and at most 1"),
        "gan_weight": WEIGHT,
        "gan_weight_max": POSITIVE,
        "lecam_weight": WEIGHT,
        "lecam_decay": BELOW_ONE,
    },
    SemanticConfig: {"weight": WEIGHT},
    StageConfig: ADVERSARIAL
    | {
        "steps": ANY_COUNT,
        "adapter_learning_rate": WEIGHT,
        "encoder_learning_rate": WEIGHT,
        "decoder_noise": WEIGHT,
    },
    TokenizerTrainingConfig: {"betas": BELOW_ONE, "statistics_images": COUNT},
    LightningDiTConfig: dict.fromkeys(
        ("depth", "width", "heads", "patch_size", "classes", "head_width", "head_heads"), COUNT
    )
    | {"label_dropout": SHARE, "head_depth": ANY_COUNT},
    FluxTransformerConfig: dict.fromkeys(("width", "heads", "patch_size", "pad_to"), COUNT)
    | dict.fromkeys(("double_blocks", "single_blocks", "rope_axes"), ANY_COUNT)
    | {"mlp_ratio": POSITIVE, "rope_theta": POSITIVE},
    TextEncoderConfig: {"width": COUNT, "tokens": COUNT},
    TextConfig: {"dropout": SHARE},
    FlowConfig: {"direction_weight": WEIGHT, "time_shift": POSITIVE},
    SamplerConfig: {
        "steps": COUNT,
        "time_shift": POSITIVE,
        "end": BELOW_ONE,
        "guidance_channels": COUNT,
        "guidance_interval": SHARE,
    },
    GeneratorTrainingConfig: RATES | {"steps": STEPS, "betas": BELOW_ONE, "snapshot_every": ANY_COUNT},
    VAEConfig: {"latent_channels": COUNT, "packing": COUNT},
    AlignmentConfig: {"weight": WEIGHT, "weight_max": POSITIVE},
    ViTDecoderConfig: dict.fromkeys(("depth", "width", "heads", "hidden", "patch_size"), COUNT),
    RAEConfig: {"noise": WEIGHT},
    DinoDiscriminatorConfig: {"input_size": COUNT, "kernel": COUNT},
    RivalStageConfig: ADVERSARIAL | {"steps": STEPS, "discriminator_start": ANY_COUNT},
    MAETokConfig: dict.fromkeys(
        ("image_size", "patch_size", "latent_tokens", "latent_channels", "width", "depth", "heads"), COUNT
    ),
    MAETokLossConfig: dict.fromkeys(("auxiliary_depth", "auxiliary_width", "auxiliary_heads"), COUNT)
    | {"auxiliary_weight": WEIGHT},
    RepaEConfig: dict.fromkeys(("depth", "projector_width"), COUNT)
    | {"generator_weight": WEIGHT, "tokenizer_weight": WEIGHT, "bridge_momentum": SHARE},
    RivalConfig: {"kl_weight": WEIGHT, "betas": BELOW_ONE, "statistics_images": COUNT},
}


def check_ranges(config: Any, where: str = "") -> None:
    """Refuse a configuration dataclass with a value out of its range, here or in one inside it.

    Raises:
        UserError: the field's dotted name, its value and what was expected.
    """
    ranges, hints = RANGES.get(type(config), {}), get_type_hints(type(config))
    for field in fields(config):
        value, name = getattr(config, field.name), f"{where}{field.name}"
        if is_dataclass(value):
            check_ranges(value, f"{name}.")
            continue
        if value in ((), []) and field.name in ranges:
            raise UserError(f"{name} is empty, expected numbers of {ranges[field.name].text}")
        for part in value if isinstance(value, tuple | list) else (value,):
            if part is not None:
                _check(name, value, part, ranges.get(field.name), _words(hints[field.name]))


def _check(name: str, value: Any, part: Any, allowed: Range | None, words: tuple[str, ...]) -> None:
    """`part` is the value itself, or one of its elements."""
    if allowed is not None and not allowed.low <= part <= allowed.high:
        raise UserError(f"{name} is {_shown(value)}, expected {allowed.text}")
    if words and part not in words:
        listed = ", ".join(words[:-1]) + " or " + words[-1]
        raise UserError(f"{name} is {part!r}, expected {listed}")


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _words(hint: Any) -> tuple[str, ...]:
    """The words that a type allows; () where it allows more."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    found = [_words(option) for option in get_args(hint)]
    return next((words for words in found if words), ())
