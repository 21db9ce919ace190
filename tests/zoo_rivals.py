"""Rivals of a few thousand parameters, and recipes that train them in seconds."""

from pathlib import Path

from helpers import tiny_recipe

from aligntok.config import (
    AlignmentConfig,
    DecoderConfig,
    DinoDiscriminatorConfig,
    EncoderConfig,
    MAETokConfig,
    MAETokLossConfig,
    RAEConfig,
    Recipe,
    RepaEConfig,
    RivalConfig,
    RivalStageConfig,
    VAEConfig,
    ViTDecoderConfig,
)

TINY_VIT = "vit_tiny_patch16_224.augreg_in21k"
KINDS = ("va-vae", "rae", "maetok", "repa-e")  # trained by two processes and by one


def tiny_vit(**more) -> EncoderConfig:
    return EncoderConfig(name=TINY_VIT, weights="random", layer=1, **more)


def tiny_vae(encoder: str = "cnn") -> VAEConfig:
    networks = DecoderConfig(base_channels=8, channel_multipliers=(1, 1, 1, 1, 2), blocks=1, groups=4)
    return VAEConfig(encoder=encoder, latent_channels=4, networks=networks, vit=tiny_vit())


def tiny_rae(size: int = 32) -> RAEConfig:
    decoder = ViTDecoderConfig(size="custom", depth=1, width=32, heads=2, hidden=96)
    return RAEConfig(encoder=tiny_vit(antialias=False), decoder=decoder, image_size=size)


def tiny_dino() -> DinoDiscriminatorConfig:
    return DinoDiscriminatorConfig(tiny_vit(final_norm=False), input_size=32, taps=(0, 1), kernel=3)


def tiny_maetok() -> MAETokConfig:
    return MAETokConfig(image_size=32, patch_size=16, latent_tokens=6, latent_channels=5, width=32, depth=1, heads=2)


def tiny_maetok_loss(**more) -> MAETokLossConfig:
    """Shallow decoders of HOG and of one vision transformer."""
    options = {"dino": tiny_vit(), "clip": None} | more
    return MAETokLossConfig(auxiliary_width=16, auxiliary_depth=1, auxiliary_heads=1, **options)


def rival_recipe(folder: Path, images: Path, kind: str, **rival) -> Recipe:
    """A rival in a few seconds: 32 px, 4 steps, every loss switched on from the third."""
    recipe = tiny_recipe(folder, images)
    recipe.rival = RivalConfig(
        kind=kind,
        vae=tiny_vae(),
        alignment=AlignmentConfig(tiny_vit()),
        rae=tiny_rae(),
        dino=tiny_dino(),
        crop="center",
        losses=recipe.tokenizer.losses,
        stage=RivalStageConfig(steps=4, learning_rate=1e-3, gan_start=2, ema_decay=0.9),
        training=recipe.tokenizer.training,
        maetok=tiny_maetok(),
        maetok_loss=tiny_maetok_loss(),
        repa_e=RepaEConfig(encoder=tiny_vit(), depth=1, projector_width=16),
    )
    if kind == "repa-e":
        recipe.rival.stage.ema_decay = None
    for name, value in rival.items():
        setattr(recipe.rival, name, value)
    return recipe
