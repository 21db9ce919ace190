"""Typed configuration: every default of the method, in one place, each with its source.

Dataclasses only, and no import of torch, so that `aligntok --help` answers at once. YAML files and dotted overrides
are laid on top by `aligntok.config.parsing`; nothing else in the package invents a default. "unknown" in a comment
means that the paper does not state the value and that the number is this project's choice (docs/decisions.md has the
reasons).

    tokenizer, generator, text, rivals, run, recipe     the dataclasses, by subject; all are imported from here
    options                                       of the commands that take no recipe
    parsing, recipes, from_dict                   command line, recipe files and dictionaries into dataclasses
"""

from aligntok.config.generator import FlowConfig, GeneratorTrainingConfig, LightningDiTConfig, SamplerConfig
from aligntok.config.recipe import Recipe
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
    Part,
    PerceptualConfig,
    PerceptualKind,
    SemanticConfig,
    StageConfig,
    StagesConfig,
    TokenizerConfig,
    TokenizerTrainingConfig,
)

__all__ = [
    "AdapterConfig",
    "AlignmentConfig",
    "DataConfig",
    "DecoderConfig",
    "DinoDiscriminatorConfig",
    "DiscriminatorConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "FlowConfig",
    "FluxTransformerConfig",
    "GeneratorTrainingConfig",
    "LightningDiTConfig",
    "LossConfig",
    "MAETokConfig",
    "MAETokLossConfig",
    "Part",
    "PerceptualConfig",
    "PerceptualKind",
    "RAEConfig",
    "Recipe",
    "RepaEConfig",
    "RivalConfig",
    "RivalStageConfig",
    "SamplerConfig",
    "SemanticConfig",
    "SpikeConfig",
    "StageConfig",
    "StagesConfig",
    "TextConfig",
    "TextEncoderConfig",
    "TokenizerConfig",
    "TokenizerTrainingConfig",
    "TrainingConfig",
    "VAEConfig",
    "ViTDecoderConfig",
]
