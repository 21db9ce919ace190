"""ImageReward: BLIP with a head tuned on people's rankings (Xu et al. 2023, arXiv 2304.05977).

    reward_i = (MLP(h_i) - 0.16717362830052426) / 1.0333394966054072

h_i [768] is the text encoder's state of the first token, which attends to the picture; the MLP has widths 768, 1024,
128, 64, 16, 1 and no activations. Pictures: shorter side to 224 px (bicubic), centre crop; prompts: 35 tokens at most.

The package image-reward 1.5 asks for timm 0.6.13 and an old transformers, so the same network is built from
transformers' BLIP classes, and the tensors of ImageReward.pt are given its names. Depths and widths come from the file,
heads have 64 channels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.evaluation.hps import CLIP_MEAN, CLIP_STD
from aligntok.evaluation.scorer_weights import asked_of_hub, from_pretrained, hub_file, place_of
from aligntok.runtime.published import read_published
from aligntok.runtime.weights import load_strictly

FILE = "ImageReward.pt"  # of THUDM/ImageReward on the hub
MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35
HEAD = 64  # channels

_VISION = {
    "patch_embed.proj": "embeddings.patch_embedding",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
}


class RewardNetwork(nn.Module):
    """Vision tower, text encoder with cross-attention, head: shapes of a state dict in ImageReward.pt's names.

    Raises:
        UserError: tensors are missing that the widths are read from.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        shapes = _Shapes(state)
        width, _, patch, _ = shapes["blip.visual_encoder.patch_embed.proj.weight"]
        grid = round((shapes["blip.visual_encoder.pos_embed"][1] - 1) ** 0.5)
        words, text_width = shapes["blip.text_encoder.embeddings.word_embeddings.weight"]
        self.size = grid * patch
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=shapes["blip.visual_encoder.blocks.0.mlp.fc1.weight"][0],
                num_hidden_layers=_depth(state, r"blip\.visual_encoder\.blocks\.(\d+)\."),
                num_attention_heads=width // HEAD,
                image_size=self.size,
                patch_size=patch,
                layer_norm_eps=1e-6,
            )
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=words,
                hidden_size=text_width,
                bos_token_id=None,  # of generation, which needs none here
                sep_token_id=None,
                encoder_hidden_size=width,
                intermediate_size=shapes["blip.text_encoder.encoder.layer.0.intermediate.dense.weight"][0],
                num_hidden_layers=_depth(state, r"blip\.text_encoder\.encoder\.layer\.(\d+)\."),
                num_attention_heads=text_width // HEAD,
                max_position_embeddings=shapes["blip.text_encoder.embeddings.position_embeddings.weight"][0],
            ),
            add_pooling_layer=False,
        )
        self.mlp = _head(state)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Images [n, 3, size, size], token ids and their mask [n, T] -> rewards [n]."""
        seen = self.vision(pixel_values=images).last_hidden_state
        everything = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=everything
        )
        return (self.mlp(read.last_hidden_state[:, 0].float())[:, 0] - MEAN) / STD


class _Shapes(dict):
    """Shapes of a state dict; what is absent is told."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__({name: tuple(value.shape) for name, value in state.items()})

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise UserError(f"--image_reward: the file has no tensor {name}: expected ImageReward.pt of THUDM/ImageReward")


def _depth(state: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for name in state if (found := re.match(pattern, name)))


def _head(state: dict[str, Tensor]) -> nn.Sequential:
    """Linear layers at their places in mlp.layers; what lies between them is dropout, which does nothing here."""
    linear = {int(name.split(".")[2]): value.shape for name, value in state.items() if name.startswith("mlp.layers")}
    layers: list[nn.Module] = [nn.Identity() for _ in range(max(linear, default=-1) + 1)]
    for place in linear:
        weight = _Shapes(state)[f"mlp.layers.{place}.weight"]
        layers[place] = nn.Linear(weight[1], weight[0])
    return nn.Sequential(*layers)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in ImageReward.pt's names -> RewardNetwork's; those that the reward does not need are left out."""
    found = {}
    for name, value in state.items():
        if (plain := name.removeprefix("blip.visual_encoder.")) != name:
            found[f"vision.{_vision_name(plain)}"] = value
        elif (plain := name.removeprefix("blip.text_encoder.")) != name:
            if plain != "embeddings.position_ids":  # 0, 1, 2, ...
                found[f"text.{plain}"] = value
        elif name.startswith("mlp.layers."):
            found[name.replace("mlp.layers.", "mlp.")] = value
    return found


def _vision_name(name: str) -> str:
    if name == "cls_token":
        return "embeddings.class_embedding"
    if name == "pos_embed":
        return "embeddings.position_embedding"
    if name.startswith("norm."):
        return name.replace("norm.", "post_layernorm.")
    for theirs, ours in _VISION.items():
        name = name.replace(f"{theirs}.", f"{ours}.")
    return name.replace("blocks.", "encoder.layers.", 1)


class ImageReward:
    """Rewards of pictures and prompts.

    Args:
        weights: ImageReward.pt by path, or the hub's name of its repository.
        tokenizer: folder or hub name of bert-base-uncased's vocabulary, which the file does not hold.
        device: to compute on, in float32.

    Raises:
        UserError: transformers is absent, or the file does not hold the network's weights.
    """

    names, floor = ("ImageReward",), None

    def __init__(self, weights: str, tokenizer: str, device: torch.device) -> None:
        place = place_of("image_reward", weights)
        file, _, told = hub_file("image_reward", place, FILE)
        state = read_published(file)
        self.network = asked_of_hub("image_reward", place, lambda: RewardNetwork(state))
        load_strictly(self.network, renamed(state), file)
        self.network.float().to(device).eval()
        words = place_of("image_reward_tokenizer", tokenizer)
        self.tokenizer: Any = from_pretrained("image_reward_tokenizer", words, "BertTokenizer")
        if len(self.tokenizer) > (room := self.network.text.config.vocab_size):
            raise UserError(
                f"--image_reward_tokenizer {tokenizer} has {len(self.tokenizer)} words, the network {room}: expected "
                "bert-base-uncased's"
            )
        self.device, self.cut = device, 0
        self.protocol = (
            f"ImageReward, (MLP - {MEAN:.5f}) / {STD:.5f}, BLIP through transformers: {told}, tokenizer {words.name}; "
            f"shorter side to {self.network.size} px (bicubic), centre crop; at most {TOKENS} text tokens; float32"
        )

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """RGB pictures and as many prompts [n] -> [n, 1] float64 on the CPU."""
        images = torch.stack([shown(picture, self.network.size) for picture in pictures])
        self.cut += sum(len(ids) > TOKENS for ids in self.tokenizer(list(prompts), verbose=False)["input_ids"])
        texts = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        ids, mask = (texts[name].to(self.device) for name in ("input_ids", "attention_mask"))
        return self.network(images.to(self.device), ids, mask).double().cpu()[:, None]


def shown(picture: Image.Image, size: int) -> Tensor:
    """RGB picture -> [3, size, size], by torchvision's Resize and CenterCrop on Pillow's pixels."""
    from torchvision.transforms import functional as T

    picture = T.center_crop(T.resize(picture, size, T.InterpolationMode.BICUBIC), [size, size])
    return T.normalize(T.to_tensor(picture), CLIP_MEAN, CLIP_STD)
