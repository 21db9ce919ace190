"""Small random networks in the layouts of published scorers, and prompts that their tokenizers know."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

WORDS = ("a", "red", "fox", "dog", "on", "the", "hill")
SIDE = 32  # of the pictures that the small networks see


def _clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """Single letters, letters at a word's end, and the merges that make WORDS whole."""
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if f"{parts[0]} {parts[1]}" not in merges:
                merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [parts[0] + parts[1]]
            if parts[0] not in tokens:
                tokens.append(parts[0])
    return {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def write_clip(folder: Path, seed: int = 0, length: int = 8) -> Path:
    """A CLIPModel of transformers with processor and tokenizer; texts have at most `length` tokens."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    vocabulary, merges = _clip_vocabulary()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    end = vocabulary["<|endoftext|>"]
    ids = {"bos_token_id": vocabulary["<|startoftext|>"], "eos_token_id": end, "pad_token_id": end}
    text = tower | ids | {"vocab_size": len(vocabulary), "max_position_embeddings": length}
    torch.manual_seed(seed)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=tower | {"image_size": SIDE, "patch_size": 16}, projection_dim=24)
    )
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn_like(value))
        model.logit_scale.fill_(1.25)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


TINY_HPS = "tiny-hps"


def add_tiny_hps(folder: Path) -> None:
    """Make open_clip know a network of ViT-H-14's kind called TINY_HPS."""
    import open_clip

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{TINY_HPS}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def write_hps(file: Path, seed: int = 0) -> Path:
    """A checkpoint of TINY_HPS as HPSv2 publishes its own: under "state_dict"."""
    import open_clip

    torch.manual_seed(seed)
    model = open_clip.create_model(TINY_HPS, pretrained=None)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    torch.save({"state_dict": model.state_dict()}, file)
    return file


def write_bert_tokenizer(folder: Path) -> Path:
    """A vocabulary in the layout of bert-base-uncased."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return folder


def reward_state(words: int = 12, width: int = 128, text_width: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the names of ImageReward.pt: two blocks each, heads of 64 channels, 32 px."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def linear(name: str, out: int, into: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, generator=generator) / into**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=generator)

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(size, generator=generator)

    def table(name: str, *shape: int) -> None:
        state[name] = torch.randn(*shape, generator=generator)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    table(f"{vision}.cls_token", 1, 1, width)
    table(f"{vision}.pos_embed", 1, 5, width)
    table(f"{vision}.patch_embed.proj.weight", width, 3, 16, 16)
    table(f"{vision}.patch_embed.proj.bias", width)
    for block in (f"{vision}.blocks.{i}" for i in range(2)):
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", 96, width)
        linear(f"{block}.mlp.fc2", width, 96)
    norm(f"{vision}.norm", width)
    state[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    table(f"{text}.embeddings.word_embeddings.weight", words, text_width)
    table(f"{text}.embeddings.position_embeddings.weight", 40, text_width)
    norm(f"{text}.embeddings.LayerNorm", text_width)
    for layer in (f"{text}.encoder.layer.{i}" for i in range(2)):
        for kind, source in (("attention", text_width), ("crossattention", width)):
            linear(f"{layer}.{kind}.self.query", text_width, text_width)
            linear(f"{layer}.{kind}.self.key", text_width, source)
            linear(f"{layer}.{kind}.self.value", text_width, source)
            linear(f"{layer}.{kind}.output.dense", text_width, text_width)
            norm(f"{layer}.{kind}.output.LayerNorm", text_width)
        linear(f"{layer}.intermediate.dense", 80, text_width)
        linear(f"{layer}.output.dense", text_width, 80)
        norm(f"{layer}.output.LayerNorm", text_width)
    linear("blip.vision_proj", 16, width)
    linear("blip.text_proj", 16, text_width)
    for place, out, into in ((0, 32, text_width), (2, 16, 32), (4, 8, 16), (6, 4, 8), (7, 1, 4)):
        linear(f"mlp.layers.{place}", out, into)
    return state
