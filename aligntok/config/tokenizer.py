"""AlignTok: the networks, the losses and the three stages of its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from aligntok.config.run import TrainingConfig

Part = Literal["encoder", "adapter", "decoder"]


@dataclass
class EncoderConfig:
    """A timm vision transformer that is turned into the encoder of a tokenizer."""

    name: str = "vit_large_patch14_dinov2.lvd142m"  # AlignTok 4.1: DINOv2 ViT-L/14; no registers as in VA-VAE's code
    weights: str = (
        "pretrained"  # "pretrained" (timm, downloads), "random", "embedded" (package of the quickstart), or a path
    )
    layer: int = -1  # tapped block, -1 = last; the paper does not say, VA-VAE's code uses the last
    final_norm: bool = True  # LayerNorm after the tapped block (VA-VAE foundation_models.py)
    downsample: int = 16  # f: 256 px -> 16x16 tokens; patch-14 encoders see the image resized by 14/16
    lora_rank: int | None = None  # stages that train the encoder train a LoRA of this rank instead; None = all of it
    antialias: bool = True  # of that resize; RAE's decoders were trained on features of one without (RAE rae.py)


@dataclass
class AdapterConfig:
    """Token-wise map from encoder width to latent channels."""

    kind: Literal["mlp", "linear"] = "mlp"  # two-layer MLP (paper); "linear" is the single-layer variant
    hidden: int | None = None  # None = encoder width; unknown in the paper
    latent_channels: int = 32  # d = 32 default, 64 as variant (paper, table 1)


@dataclass
class DecoderConfig:
    """The LDM convolutional decoder; the defaults are VA-VAE's f16d32 (41.42 M parameters)."""

    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2  # a decoder level has blocks + 1 residual blocks, as in LDM
    groups: int = 32  # of every GroupNorm (LDM); fewer for narrow decoders, so that a group has several channels
    attention_levels: tuple[int, ...] = (4,)  # index into channel_multipliers; 4 = the 16x16 level at 256 px


@dataclass
class TokenizerConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


PerceptualKind = Literal["lpips-vgg", "lpips-alex", "st-lpips-alex", "st-lpips-vgg", "none"]


@dataclass
class PerceptualConfig:
    kind: PerceptualKind = "lpips-vgg"  # VGG16: all siblings
    weights: str | None = None  # trunk weights by path; None = torchvision's, or the embedded ones for st-lpips


@dataclass
class DiscriminatorConfig:
    """PatchGAN as in VA-VAE: 2.77 M parameters with the defaults."""

    base_channels: int = 64
    layers: int = 3


@dataclass
class LossConfig:
    """L_rec = L1 + w_p LPIPS + w_g GAN; every term is a mean over elements (see docs/decisions.md)."""

    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    perceptual_weight: float = 1.0  # w_p (paper)
    perceptual_share: float = 1.0  # share of each batch that LPIPS sees: an unbiased estimate at part of the cost
    gan: Literal["hinge", "non_saturating"] = "hinge"  # VA-VAE
    gan_weight: float = 0.5  # factor on the adaptive ratio: VA-VAE config; unknown in the paper
    gan_weight_max: float = 1e4  # clamp of the adaptive ratio: VA-VAE contperceptual.py
    lecam_weight: float = 0.0  # LeCam term of the discriminator's loss; 0 = off as in VA-VAE, SoftVQ and TiTok use 1e-3
    lecam_decay: float = 0.999  # moving averages of the mean logits: TiTok, SoftVQ


@dataclass
class SemanticConfig:
    """Stage 2's tie to the frozen Stage-1 encoder and adapter."""

    weight: float = 0.0  # w_sp; Stage 2 has 1 on ImageNet, 3 on LAION (paper); 0 = off
    kind: Literal["l2", "cosine"] = "l2"  # "cosine" is the ablation
    position: Literal["after_adapter", "before_adapter"] = "after_adapter"  # "before_adapter" is the ablation


@dataclass
class StageConfig:
    """One stage of tokenizer training, as data for the one loop."""

    trains: tuple[Part, ...]
    steps: int
    learning_rate: float = 1e-4  # decoder, and adapter unless it has its own; unknown in the paper, VA-VAE's value
    adapter_learning_rate: float | None = None  # None = learning_rate; a slower adapter keeps the latent's scale small
    encoder_learning_rate: float = 1e-5  # only used where the encoder trains; unknown, siblings use 5e-6 to 1e-4
    discriminator_learning_rate: float = 1e-4
    warmup_steps: int = 0
    final_learning_rate: float = 1.0  # share of the rate left at the last step, reached along a cosine; 1 = constant
    gan_start: int = 0  # first step with the adversarial loss; steps or more = never
    semantic: SemanticConfig = field(default_factory=SemanticConfig)  # Stage 2 only
    ema_decay: float | None = None  # None = no EMA; warmed up as min(decay, (1+n)/(10+n))
    gradient_clip: float | None = None
    decoder_noise: float = 0.0  # sd of noise added to normalised latents (RAE's option tau); off in AlignTok
    latents: str | None = None  # folder of a latent cache, Stage 3 only: centre crops, and the encoder does not run


def _stage1() -> StageConfig:
    return StageConfig(trains=("adapter", "decoder"), steps=50_000, gan_start=5_000)  # GAN start: VA-VAE disc_start


def _stage2() -> StageConfig:
    return StageConfig(
        trains=("encoder", "adapter", "decoder"),
        steps=150_000,
        warmup_steps=1_000,
        semantic=SemanticConfig(weight=1.0),
        ema_decay=0.9999,
        gradient_clip=1.0,
    )


def _stage3() -> StageConfig:
    return StageConfig(trains=("decoder",), steps=50_000)


@dataclass
class StagesConfig:
    """Steps per stage: 50 K / 150 K / 50 K at batch 256, 50 ImageNet epochs in all (unknown in the paper)."""

    stage1: StageConfig = field(default_factory=_stage1)
    stage2: StageConfig = field(default_factory=_stage2)
    stage3: StageConfig = field(default_factory=_stage3)


@dataclass
class TokenizerTrainingConfig:
    """The tokenizer and its three stages."""

    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    crop: Literal["random", "center"] = "random"  # short side + random crop (taming data/base.py), or ADM's centre crop
    losses: LossConfig = field(default_factory=LossConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    betas: tuple[float, float] = (0.5, 0.9)  # Adam of autoencoder and discriminator, no decay: VA-VAE autoencoder.py
    statistics_images: int = 10_000  # images behind the latent statistics: LightningDiT img_latent_dataset.py
