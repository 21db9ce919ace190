"""Text to image: the transformer, the text encoder in front of it, and how captions condition training.

The paper trains a FLUX-type transformer of about 2 B parameters and tells nothing more of it: every value here that has
no source is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TextEncoderConfig:
    """A pretrained language model, frozen, whose hidden states are the features of a caption's tokens."""

    name: str = "Qwen/Qwen3-0.6B"  # folder or hub name; "minilm-l6": all-MiniLM-L6-v2 as a package carries it
    revision: str | None = None  # of the hub
    layer: int = -1  # whose hidden states: -1 the last, as the model gives it, -2 the one before, 0 the embeddings
    width: int = 1024  # of its features, which a plan needs before the encoder is there: Qwen3-0.6B 1024, MiniLM 384
    tokens: int = 256  # of a caption at most; the rest is cut off and counted


@dataclass
class FluxTransformerConfig:
    """FLUX's transformer in the dialect of FLUX.2: no biases, shared modulation, time as the only vector condition."""

    width: int = 2048
    heads: int = 16
    double_blocks: int = 6  # text and image have weights of their own and attend to each other
    single_blocks: int = 24  # one set of weights for both; attention and MLP side by side
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # FLUX.2; FLUX.1 has GELU
    mlp_ratio: float = 3.0  # hidden width / width: 3 in FLUX.2, 4 in FLUX.1
    per_block_modulation: bool = False  # FLUX.1: every block has its own; FLUX.2: one for all blocks of a kind
    patch_size: int = 1
    rope_axes: tuple[int, int, int] | None = None  # channels of a head for text index, row, column; null = 2 : 3 : 3
    rope_theta: float = 10_000.0
    centred_positions: bool = False  # rows and columns counted from the middle of the picture instead of its corner
    mask: Literal["length", "none"] = "length"  # none: all padding is attended to, as in FLUX
    pad_to: int = 32  # captions are padded with a learned token to a multiple of this, and masked behind it (Z-Image)
    attention: Literal["auto", "fused", "sdpa"] = "auto"


@dataclass
class TextConfig:
    """What a text-to-image generator has in the place of classes."""

    encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    model: FluxTransformerConfig = field(default_factory=FluxTransformerConfig)
    dropout: float = 0.1  # share of captions in the place of which training reads the empty string
    features: str | None = None  # folder of `aligntok cache-text`; null = captions are encoded when training begins
