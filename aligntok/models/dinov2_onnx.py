"""DINOv2 ViT-S/14 out of an ONNX graph, as a state dict of timm's `vit_small_patch14_dinov2`.

The file (`dinov2-vits14` in aligntok.runtime.assets) is an export of the Hugging Face implementation under a
saliency head:
- norms, biases, LayerScale, the patch convolution and the class token keep their names under `backbone.`;
- weights of linear layers were folded into anonymous constants, transposed; the node that multiplies by one
  names it: /backbone/encoder/layer.0/mlp/fc1/MatMul multiplies by the weight of
  backbone.encoder.layer.0.mlp.fc1;
- query, key and value are stacked into timm's qkv, in this order;
- the position table (37x37 and the class token) was split into two constants, found through the nodes that
  read them.
The file is only parsed as a protobuf; nothing in it is executed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aligntok.errors import UserError

_BLOCKS = 12  # ViT-S
_EMBEDDINGS = "backbone.embeddings."

# Hugging Face's names inside a block -> timm's; query, key and value are stacked apart from this table.
_BLOCK_NAMES = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The backbone's tensors (float32) under timm's names; loads strictly into vit_small_patch14_dinov2
    without a head.

    Raises UserError if the file is not an ONNX graph or lacks one of the expected tensors.
    """
    tensors = _named_tensors(path)

    def take(name: str) -> Tensor:
        if name not in tensors:
            raise UserError(f"{path} has no tensor {name}: it is not the DINOv2 ViT-S/14 graph that was expected")
        return torch.from_numpy(tensors[name].copy())

    state = {
        "cls_token": take(_EMBEDDINGS + "cls_token"),
        "pos_embed": torch.cat([take("position.class"), take("position.grid")], dim=1),  # [1, 1 + 37 * 37, 384]
        "patch_embed.proj.weight": take(_EMBEDDINGS + "patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": take(_EMBEDDINGS + "patch_embeddings.projection.bias"),
        "norm.weight": take("backbone.layernorm.weight"),
        "norm.bias": take("backbone.layernorm.bias"),
    }
    for index in range(_BLOCKS):
        source, target = f"backbone.encoder.layer.{index}.", f"blocks.{index}."
        for theirs, ours in _BLOCK_NAMES.items():
            for kind in ("weight", "bias"):
                state[f"{target}{ours}.{kind}"] = take(f"{source}{theirs}.{kind}")
        for kind in ("weight", "bias"):
            parts = [take(f"{source}attention.attention.{part}.{kind}") for part in ("query", "key", "value")]
            state[f"{target}attn.qkv.{kind}"] = torch.cat(parts)
        for number in (1, 2):
            state[f"{target}ls{number}.gamma"] = take(f"{source}layer_scale{number}.lambda1")
    return state


def _named_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """All constants of the graph, the anonymous ones named after the node that reads them."""
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    try:
        graph = onnx.load(str(path)).graph
    except (OSError, DecodeError) as error:
        raise UserError(f"{path} cannot be read as an ONNX graph: {error}") from error
    tensors = {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}
    for node in graph.node:
        anonymous = [name for name in node.input if name.startswith("onnx::") and name in tensors]
        if node.op_type == "MatMul" and anonymous:
            layer = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            tensors[layer + ".weight"] = tensors[anonymous[0]].T
        elif node.name.startswith("/backbone/embeddings/") and node.op_type in ("Reshape", "Concat"):
            for (
                name
            ) in anonymous:  # the grid is reshaped to 37x37 for its interpolation, the class row is put before it
                if tensors[name].ndim == 3:
                    tensors["position.grid" if node.op_type == "Reshape" else "position.class"] = tensors[name]
    return tensors
