"""AlignTok: a pretrained vision encoder becomes an image tokenizer, a LightningDiT learns to generate its latents.

    import aligntok
    tokenizer = aligntok.load_tokenizer("runs/quickstart/tokenizer")
    latents = tokenizer.encode(images)                     # [B, 3, H, W] in [-1, 1] -> [B, d, H/16, W/16]
    images = tokenizer.decode(latents)

Everything below is imported on first use, so that the command line starts at once.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "load_tokenizer": "aligntok.models.tokenizer",
    "AlignTok": "aligntok.models.tokenizer",
    "Tokenizer": "aligntok.models.tokenizer",
    "LightningDiT": "aligntok.models.lightning_dit",
    "Generator": "aligntok.models.generator",
    "draw": "aligntok.evaluation.generation",
    "integrate": "aligntok.diffusion.sampler",
    "choose_precision": "aligntok.runtime.devices",
    "Recipe": "aligntok.config",
    "UserError": "aligntok.errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'aligntok' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
