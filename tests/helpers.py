"""Small things that several tests need: a tokenizer of a few thousand parameters, pictures on disk."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from aligntok.config import (
    AdapterConfig,
    DecoderConfig,
    EncoderConfig,
    FluxTransformerConfig,
    Recipe,
    TextEncoderConfig,
    TokenizerConfig,
)
from aligntok.config.from_dict import from_dict
from aligntok.models.encoder import Encoder
from aligntok.models.tokenizer import AlignTok

# What a record of metrics.jsonl says of the machine and not of the training
MACHINE_VALUES = {"seconds", "images_per_second", "memory_gib", "data_wait", "mfu"}


def tiny_config() -> TokenizerConfig:
    """Real architecture, two blocks of a ViT-Ti at f16, eight latent channels."""
    return TokenizerConfig(
        encoder=EncoderConfig(name="vit_tiny_patch16_224.augreg_in21k", weights="random", layer=1),
        adapter=AdapterConfig(latent_channels=8),
        decoder=DecoderConfig(base_channels=8, channel_multipliers=(1, 1, 1, 1, 2), blocks=0, groups=4),
    )


def seeded_encoder(config: EncoderConfig) -> Encoder:
    """The tiny encoder has no weights to read: without a seed, each call would align latents to another one."""
    torch.manual_seed(0)
    return Encoder(config)


def tiny_tokenizer(seed: int = 0) -> AlignTok:
    torch.manual_seed(seed)
    return AlignTok(tiny_config()).eval()


def tiny_recipe(folder: Path, images: Path, **stages: dict) -> Recipe:
    """A whole run in a few seconds: 32 px, 4 steps a stage, every loss switched on."""
    stage = {"learning_rate": 1e-3, "gan_start": 2}
    plan = {
        "stage1": {"trains": ("adapter", "decoder"), "steps": 4, **stage},
        "stage2": {
            "trains": ("encoder", "adapter", "decoder"),
            "steps": 4,
            "semantic": {"weight": 1.0},
            "ema_decay": 0.9,
            "gradient_clip": 1.0,
            **stage,
        },
        "stage3": {"trains": ("decoder",), "steps": 4, **stage},
    }
    for name, changes in stages.items():
        plan[name] |= changes
    training = {"batch_size": 4, "precision": "fp32", "log_every": 1, "checkpoint_every": 100}
    recipe = {
        "output": str(folder),
        "data": {"path": str(images), "image_size": 32, "held_out": 0.2, "workers": 0},
        "tokenizer": {
            "crop": "center",
            "losses": {
                "perceptual": {"kind": "none"},
                "discriminator": {"base_channels": 8, "layers": 1},
            },
            "stages": plan,
            "training": training,
        },
        "generator": {
            "model": {"size": "custom", "depth": 1, "width": 32, "heads": 2},
            "sampler": {"steps": 4, "time_shift": 1.0},
            "training": training,
            "steps": 4,
            "ema_decay": 0.9,
        },
        "evaluation": {"samples": 16},
    }
    made = from_dict(Recipe, recipe)
    made.tokenizer.model = tiny_config()
    return made


def caption(pictures: Path) -> Path:
    """A caption beside every picture of `write_pictures`: a word of its class, and a second one for every other."""
    for number, file in enumerate(sorted(pictures.rglob("*.png"))):
        lines = [f"a {'red cat' if file.parent.name == 'disc' else 'blue dog'}"] + ["on the mat"] * (number % 2)
        file.with_suffix(".txt").write_text("\n".join(lines))
    return pictures


def of_text(recipe: Recipe, encoder: Path) -> Recipe:
    """The recipe with a text-to-image transformer of two blocks in the place of its LightningDiT, in place."""
    config = recipe.generator
    config.condition = "text"
    config.text.encoder = TextEncoderConfig(str(encoder), width=32, tokens=8)
    config.text.model = FluxTransformerConfig(width=32, heads=2, double_blocks=1, single_blocks=1, pad_to=2)
    return recipe


def write_pictures(
    folder: Path, count: int = 20, classes: tuple[str, ...] = ("disc", "square"), size: int = 40
) -> Path:
    """Coloured discs and squares on white as PNG files, one sub-folder per class."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    for index in range(count):
        kind = classes[index % len(classes)]
        center, radius = random.uniform(12, size - 12, 2), random.uniform(5, 11)
        far = (
            np.maximum(abs(x - center[0]), abs(y - center[1]))
            if kind == "square"
            else np.hypot(x - center[0], y - center[1])
        )
        pixels = np.full((size, size, 3), 255, np.uint8)
        pixels[far < radius] = random.integers(0, 200, 3)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / f"{index:03d}.png")
    return folder
