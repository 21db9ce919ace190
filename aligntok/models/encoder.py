"""A pretrained timm vision transformer as the encoder of a tokenizer: image -> one token per f x f pixels.

    images [B, 3, H, W] in [-1, 1]  ->  tokens [B, H/f * W/f, C], row-major over the grid

Three things happen on the way, each where the sources leave room and each stated here:
- Patch size p and downsampling f may differ (DINOv2 has p = 14, the tokenizer f = 16): the image is resized
  by p/f, bicubic with antialiasing, not clamped, so that 256 px become 224 px and 16 x 16 tokens
  (paper-compatible reading; RAE does the same, without antialiasing).
- The image is brought to the encoder's own mean and standard deviation, as read from timm's configuration.
- A learned position table is interpolated inside the forward pass by timm: bicubic with antialiasing in
  float32, any rectangle. Encoders with rotary positions (DINOv3) compute them for the grid; their
  training-time jitter is switched off.

The class token and registers are dropped, and so is everything behind the tapped block: later blocks,
pooling, classifier.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeGuard

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from aligntok.config import EncoderConfig
from aligntok.errors import UserError, near_multiples
from aligntok.models.attention import written_out
from aligntok.models.encoder_weights import EMBEDDED_NAME, Backbone, load_state, read_weights

_SUPPORTED = (
    "the encoder must be one of timm's ViTs with one patch size, "
    "e.g. DINOv2, DINOv3, SigLIP2 (vit_*_siglip_*.v2_webli) or MAE"
)


class Encoder(nn.Module):
    """See the module's docstring. Nothing in it is random: train() and eval() give the same tokens.

    Attributes: `width` C, `patch_size` p, `downsample` f, `prefix_tokens` (dropped), `mean` and `std` of
    the input as tuples, `backbone` (timm's model, cut behind the tapped block), `blocks` (what FSDP wraps
    and checkpointing recomputes), `source` (where the weights came from, for printing).

    On the meta device (`with torch.device("meta")`) no weights are read, whatever the configuration says.
    """

    input_scale: Tensor
    input_shift: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        if config.downsample < 1:
            raise UserError(f"encoder.downsample must be a positive number of pixels, got {config.downsample}")
        _check_name(config.name)
        self.backbone, self.source = _load_backbone(config)
        self.width: int = self.backbone.embed_dim
        self.patch_size: int = self.backbone.patch_embed.patch_size[0]
        self.downsample = config.downsample
        self.antialias = config.antialias
        self.prefix_tokens: int = self.backbone.num_prefix_tokens
        published: Any = self.backbone.pretrained_cfg  # a dictionary that timm attaches
        self.mean: tuple[float, ...] = tuple(published["mean"])
        self.std: tuple[float, ...] = tuple(published["std"])
        # [-1, 1] -> [0, 1] -> (v - mean) / std, as one multiply-add. Saved with the weights: a checkpoint
        # of a tokenizer must not depend on what a later timm believes about the same name.
        scale = [0.5 / std for std in self.std]
        shift = [(0.5 - mean) / std for mean, std in zip(self.mean, self.std, strict=True)]
        self.register_buffer("input_scale", torch.tensor(scale).view(1, 3, 1, 1))
        self.register_buffer("input_shift", torch.tensor(shift).view(1, 3, 1, 1))

    @property
    def blocks(self) -> nn.Sequential | nn.ModuleList:
        """The transformer blocks, in order."""
        return self.backbone.blocks

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for an image; UserError if a side is not a multiple of f."""
        f = self.downsample
        for side, pixels in (("height", height), ("width", width)):
            if pixels < f or pixels % f:
                near = near_multiples(pixels, f)
                raise UserError(
                    f"image {side} {pixels} is not a multiple of the downsampling {f}; the nearest is {near}"
                )
        return height // f, width // f

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, H/f * W/f, C], a view past the prefix tokens."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"expected images [B, 3, H, W], got {list(images.shape)}")
        rows, columns = self.grid(images.shape[-2], images.shape[-1])
        if self.patch_size != self.downsample:
            size = (rows * self.patch_size, columns * self.patch_size)
            # float32: the antialiased kernel has no bfloat16 form on every device
            images = F.interpolate(images.float(), size=size, mode="bicubic", antialias=self.antialias)
        images = images * self.input_scale + self.input_shift
        images = images.to(self.backbone.patch_embed.proj.weight.dtype)  # bfloat16 only if the weights are
        self._choose_attention(images.device, self.prefix_tokens + rows * columns)
        tokens = self.backbone.forward_features(images)  # [B, prefix + N, C]
        return tokens[:, self.prefix_tokens :]

    def _choose_attention(self, device: torch.device, tokens: int) -> None:
        """timm's plain attention or PyTorch's fused one, by the rule of models/attention.py."""
        for block in self.blocks:
            attention: Any = block.attn  # timm's, of several classes
            attention.fused_attn = not written_out(device.type, tokens)


def _check_name(name: str) -> None:
    """UserError with the closest names if timm does not know `name` (architecture or architecture.tag)."""
    known = set(timm.list_models()) | set(timm.list_pretrained())
    if name in known:
        return
    vits = sorted(n for n in known if n.startswith(("vit_", "eva", "deit", "beit")))
    close = difflib.get_close_matches(name, vits, n=5, cutoff=0.5)
    # timm calls SigLIP2 "siglip*.v2_webli"
    words = re.findall(r"[a-z]{3,}\d*|v2", name.lower().replace("siglip2", "siglip v2").rsplit("/")[-1])
    close += [n for n in vits if words and all(word in n for word in words) and n not in close]
    hint = f"close names: {', '.join(close[:5])}" if close else "list the names with timm.list_models('vit_*')"
    raise UserError(f"timm {timm.__version__} has no model {name!r}; {hint}")


def _load_backbone(config: EncoderConfig) -> tuple[Backbone, str]:
    """timm's model with weights, cut behind the tapped block; and where the weights came from."""
    with torch.device("meta"):  # costs nothing, and tells user errors from download errors
        blueprint = _create(config.name)
    layer = _check_architecture(blueprint, config)
    on_meta = torch.get_default_device().type == "meta"
    if config.weights == "pretrained" and not on_meta:
        backbone = _create_pretrained(config.name)
    else:
        backbone = blueprint if on_meta else _create(config.name)
    assert isinstance(backbone, VisionTransformer | Eva)  # as the blueprint
    # timm cuts the later blocks, the pooling and the classifier
    backbone.prune_intermediate_layers([layer], prune_norm=not config.final_norm, prune_head=True)
    rope = getattr(backbone, "rope", None)
    if rope is not None and getattr(rope, "aug_active", False):
        rope.aug_active = False  # random coordinates in train() would make the latents drift
    if on_meta:
        return backbone, "none (meta device)"
    if config.weights == "pretrained":
        return backbone, f"timm {config.name}"
    if config.weights == "random":
        return backbone, "random"
    state, source = read_weights(config)
    load_state(backbone, state, source, layer, config.final_norm)
    return backbone, source


def _create(name: str, pretrained: bool = False) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError as error:  # a convolutional or hierarchical network does not take dynamic_img_size
        raise UserError(f"{name} is not a plain vision transformer ({error}); {_SUPPORTED}") from error


def _create_pretrained(name: str) -> nn.Module:
    try:
        return _create(name, pretrained=True)
    except Exception as error:  # timm and the hub raise many kinds; the name itself was checked before
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"the weights of {name} could not be downloaded ({type(error).__name__}: {reason}). Give a file "
            f"in timm's layout instead: encoder.weights=/path/to/{name}.safetensors (or .pth); or "
            f"encoder.weights=embedded with encoder.name={EMBEDDED_NAME}.lvd142m; or encoder.weights=random"
        ) from error


def _is_plain(model: nn.Module) -> TypeGuard[Backbone]:
    return type(model) in (VisionTransformer, Eva) and type(model.patch_embed) is PatchEmbed


def _check_architecture(model: nn.Module, config: EncoderConfig) -> int:
    """Refuse what is not a plain ViT; the tapped block as an index from the front."""
    if not _is_plain(model) or len(set(model.patch_embed.patch_size)) != 1:
        raise UserError(f"{config.name} is a {type(model).__name__}, not a plain vision transformer; {_SUPPORTED}")
    depth = len(model.blocks)
    if not -depth <= config.layer < depth:
        raise UserError(
            f"encoder.layer {config.layer} is out of range: {config.name} has blocks 0 to {depth - 1} "
            f"(or -1 to -{depth}, from the end)"
        )
    if config.final_norm and isinstance(model.norm, nn.Identity):
        raise UserError(f"{config.name} has no norm over its tokens; set encoder.final_norm=false")
    return config.layer % depth
