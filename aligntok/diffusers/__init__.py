"""Our networks as diffusers' models, and pipelines with its flow-matching scheduler.

    from aligntok.diffusers import AlignTokPipeline, AutoencoderAlignTok
    vae = AutoencoderAlignTok.from_pretrained("exported", subfolder="vae")
    pipe = AlignTokPipeline.from_pretrained("exported")
    pipe(["sunflower", 7], num_inference_steps=50).images[0].save("sunflower.png")

`aligntok export --to diffusers` writes such folders, `aligntok convert --from diffusers-aligntok` turns them back. The
rest of this package needs no diffusers, and imports nothing of this folder.
"""

from importlib import import_module
from typing import Any

from aligntok.errors import UserError
from aligntok.runtime.weights import in_short

try:
    import diffusers as _theirs  # noqa: F401
except Exception as error:  # ImportError, or whatever a broken environment raises
    raise UserError(
        f"aligntok.diffusers needs diffusers, which cannot be imported ({in_short(error)}): "
        "pip install 'aligntok[diffusers]'"
    ) from error

_PUBLIC = {
    "AutoencoderAlignTok": "autoencoder",
    "LightningDiTTransformer2DModel": "transformers",
    "AlignTokFluxTransformer2DModel": "transformers",
    "AlignTokPipeline": "pipelines",
    "AlignTokTextToImagePipeline": "pipelines",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'aligntok.diffusers' has no attribute {name!r}")
    return getattr(import_module(f"aligntok.diffusers.{_PUBLIC[name]}"), name)
