"""Reading the weights of an encoder and loading them strictly, without executing anything that a file holds.

Accepted: the embedded ONNX asset, and whatever aligntok.runtime.published reads, in timm's names. Every key must fit;
keys of the parts that the encoder cuts away (later blocks, pooling, classifier) are left out, and a
position table of another square grid is resampled.
"""

from __future__ import annotations

import re
from pathlib import Path

from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from aligntok.config import EncoderConfig
from aligntok.errors import UserError
from aligntok.models.dinov2_onnx import read_state_dict
from aligntok.runtime import assets
from aligntok.runtime.published import read_published
from aligntok.runtime.weights import misfit

Backbone = VisionTransformer | Eva
EMBEDDED_NAME = "vit_small_patch14_dinov2"  # the architecture whose weights the asset "dinov2-vits14" carries
_CUT_KEYS = re.compile(r"^(head|fc_norm|attn_pool)\.")  # parts behind the tokens


def read_weights(config: EncoderConfig) -> tuple[dict[str, Tensor], str]:
    """State dict of weights "embedded" or of the file `config.weights`, and what to call it when printing."""
    embedded = config.weights == "embedded"
    path = Path(config.weights).expanduser()
    if embedded or path.suffix == ".onnx":
        if config.name.split(".")[0] != EMBEDDED_NAME:
            raise UserError(
                f"the embedded weights are those of {EMBEDDED_NAME}.lvd142m, not of {config.name}; "
                f"set encoder.name={EMBEDDED_NAME}.lvd142m or give other weights"
            )
        file = assets.fetch("dinov2-vits14", None if embedded else path)
        return read_state_dict(file), assets.ASSETS["dinov2-vits14"].what
    if not path.exists():
        raise UserError(
            f"encoder.weights={config.weights} is neither a file, nor a folder, nor one of pretrained, random, embedded"
        )
    return read_published(path), str(path)


def load_state(backbone: Backbone, state: dict[str, Tensor], source: str, layer: int, final_norm: bool) -> None:
    """Load strictly what belongs to a backbone cut behind block `layer`; UserError lists what does not
    fit."""
    state = {key: value for key, value in state.items() if not _is_cut(key, layer, final_norm)}
    _resample_positions(backbone, state)
    if told := misfit(backbone.state_dict(), state):
        raise UserError(f"{source} does not fit the encoder in timm's layout: {told}")
    backbone.load_state_dict(state)


def _is_cut(key: str, layer: int, final_norm: bool) -> bool:
    block = re.match(r"^blocks\.(\d+)\.", key)
    return bool(
        _CUT_KEYS.match(key) or (block and int(block.group(1)) > layer) or (not final_norm and key.startswith("norm."))
    )


def _resample_positions(backbone: Backbone, state: dict[str, Tensor]) -> None:
    """Bring a square position table of another grid to the model's (bicubic, antialiased), within `state`."""
    table, target = state.get("pos_embed"), backbone.pos_embed
    if table is None or target is None or table.shape == target.shape or table.ndim != 3:
        return
    prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    side = round((table.shape[1] - prefix) ** 0.5) if table.shape[1] > prefix else 0
    if side and side * side == table.shape[1] - prefix and table.shape[2] == target.shape[2]:
        state["pos_embed"] = resample_abs_pos_embed(
            table,
            new_size=list(backbone.patch_embed.grid_size),
            old_size=[side, side],
            num_prefix_tokens=prefix,
        )
