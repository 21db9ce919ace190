"""A whole setting from images to samples."""

from __future__ import annotations

from dataclasses import dataclass, field

from aligntok.config.generator import GeneratorTrainingConfig
from aligntok.config.rivals import RivalConfig
from aligntok.config.run import DataConfig, EvaluationConfig
from aligntok.config.tokenizer import TokenizerTrainingConfig


@dataclass
class Recipe:
    """One published setting from images to samples; the YAML files of configs/ lay their values over these."""

    output: str = "runs/aligntok"
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)
    generator: GeneratorTrainingConfig = field(default_factory=GeneratorTrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    rival: RivalConfig = field(default_factory=RivalConfig)
