"""The rivals of AlignTok and what trains them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from aligntok.config.run import TrainingConfig
from aligntok.config.tokenizer import DecoderConfig, EncoderConfig, LossConfig


@dataclass
class VAEConfig:
    """LDM's KL autoencoder as VA-VAE uses it at f16d32; VA-VAE is the same network trained with one more loss."""

    encoder: Literal["cnn", "vit"] = "cnn"  # "vit": the paper's VA-VAE with AlignTok's encoder from scratch
    latent_channels: int = 32  # before packing
    networks: DecoderConfig = field(default_factory=DecoderConfig)  # the decoder and, mirrored, the CNN encoder
    vit: EncoderConfig = field(default_factory=lambda: EncoderConfig(weights="random"))  # only with encoder "vit"
    quant_convs: bool = True  # 1x1 convolutions on both sides of the latent; FLUX's autoencoder has none
    packing: int = 1  # 2 = each 2 x 2 block of latents goes into the channels, as FLUX's transformer reads them


@dataclass
class AlignmentConfig:
    """VA-VAE's vision-foundation loss; weight and margins of vavae/configs/f16d32_vfdinov2.yaml."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)  # frozen: DINOv2 ViT-L/14, last layer
    weight: float = 0.1  # factor on the adaptive ratio
    weight_max: float = 1e8  # clamp of the adaptive ratio: contperceptual.py
    cosine_margin: float = 0.5
    distance_margin: float = 0.25


@dataclass
class ViTDecoderConfig:
    """RAE's ViT-MAE decoder; a named size fills depth, width, heads and hidden (RAE configs/decoder)."""

    size: Literal["B", "L", "XL", "custom"] = "XL"
    depth: int | None = None  # the four only with size "custom"
    width: int | None = None
    heads: int | None = None
    hidden: int | None = None  # of the MLP
    patch_size: int = 16  # pixels per token on the way out


def _rae_encoder() -> EncoderConfig:
    return EncoderConfig(name="vit_base_patch14_reg4_dinov2.lvd142m", antialias=False)


@dataclass
class RAEConfig:
    """Representation autoencoder (arXiv 2510.11690): a frozen encoder and a ViT decoder trained on noisy features."""

    encoder: EncoderConfig = field(default_factory=_rae_encoder)
    decoder: ViTDecoderConfig = field(default_factory=ViTDecoderConfig)
    image_size: int = 256  # statistics are per element, so a tokenizer belongs to one size
    noise: float = 0.8  # tau: features get noise of a standard deviation uniform in [0, tau] (RAE rae.py)


@dataclass
class DinoDiscriminatorConfig:
    """RAE's discriminator: heads on the tokens of a frozen DINO ViT-S/8."""

    encoder: EncoderConfig = field(
        default_factory=lambda: EncoderConfig(name="vit_small_patch8_224.dino", downsample=8, final_norm=False)
    )
    input_size: int = 224  # images are resized to it
    taps: tuple[int, ...] = (2, 5, 8, 11)  # blocks whose tokens are judged, beside the last one's
    kernel: int = 9  # of the heads' convolution along the tokens


@dataclass
class RivalStageConfig:
    """The one stage in which a rival is trained; defaults of VA-VAE's 50-epoch configuration."""

    steps: int = 250_000  # 50 ImageNet epochs at batch 256
    learning_rate: float = 1e-4
    discriminator_learning_rate: float = 1e-4
    warmup_steps: int = 0
    final_learning_rate: float = 1.0  # share of the rate left at the last step, reached along a cosine
    gan_start: int = 5_000  # first step whose autoencoder loss is adversarial; steps or more = never
    discriminator_start: int | None = None  # first step of the discriminator; None = gan_start
    ema_decay: float | None = None
    gradient_clip: float | None = None


@dataclass
class MAETokConfig:
    """MAETok (arXiv 2502.03444): 128 latent tokens in a row from two ViT-B/16."""

    image_size: int = 256  # one model, one size: the decoder's queries are as many as its patches
    patch_size: int = 16
    latent_tokens: int = 128
    latent_channels: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12

    @property
    def side(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


def _clip() -> EncoderConfig:
    return EncoderConfig(name="vit_base_patch16_clip_224.openai")


@dataclass
class MAETokLossConfig:
    """What MAETok hides in training, and which features of the hidden patches shallow decoders predict."""

    mask_share: tuple[float, float] = (0.4, 0.6)  # of the patches; MAETok's enc_token_drop and its maximum
    auxiliary_weight: float = 1.0  # on the sum of the features' losses (MAETok's code adds them as they are)
    auxiliary_depth: int = 3  # "shallow"; the size of MAETok's auxiliary decoders is not in the sources at hand
    auxiliary_width: int = 192  # likewise
    auxiliary_heads: int = 3
    hog: bool = True  # predict histograms of oriented gradients
    dino: EncoderConfig | None = field(default_factory=EncoderConfig)  # DINOv2's tokens; null = not; its size: ours
    clip: EncoderConfig | None = field(default_factory=_clip)  # CLIP's tokens; null = not; its size: ours


def _dinov2_base() -> EncoderConfig:
    return EncoderConfig(name="vit_base_patch14_dinov2.lvd142m")


@dataclass
class RepaEConfig:
    """REPA-E (arXiv 2504.10483): what joint training adds to a VAE's and a generator's; lines of train_repae.py."""

    tokenizer: str | None = None  # folder of the VAE to start with, any with a posterior; None = rival.vae, untrained
    encoder: EncoderConfig = field(default_factory=_dinov2_base)  # frozen: DINOv2-B
    depth: int = 8  # generator's blocks before the stream that is aligned [594]
    projector_width: int = 2048  # hidden layers of the projector (REPA)
    generator_weight: float = 0.5  # REPA loss of the generator [608]
    tokenizer_weight: float = 1.5  # REPA loss of the VAE [610]
    bridge_momentum: float = 0.1  # of the BatchNorm between VAE and generator [558]


@dataclass
class RivalConfig:
    """A rival of AlignTok, trained in the same loop on the same data by `aligntok train-rival`."""

    # "repa-e" also trains the generator of the recipe: generator.model, flow, learning rate, betas, clip and averages
    kind: Literal["vae", "va-vae", "rae", "maetok", "repa-e"] = "vae"
    vae: VAEConfig = field(default_factory=VAEConfig)  # kinds "vae", "va-vae" and "repa-e"
    kl_weight: float = 1e-6  # on the KL divergence summed over a latent, against a loss summed over pixels: LDM, VA-VAE
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)  # kind "va-vae"
    rae: RAEConfig = field(default_factory=RAEConfig)  # kind "rae"
    discriminator: Literal["patch", "dino"] = "patch"
    dino: DinoDiscriminatorConfig = field(default_factory=DinoDiscriminatorConfig)  # discriminator "dino"
    crop: Literal["random", "center"] = "random"
    losses: LossConfig = field(default_factory=LossConfig)
    stage: RivalStageConfig = field(default_factory=RivalStageConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    betas: tuple[float, float] = (0.5, 0.9)
    statistics_images: int = 10_000
    maetok: MAETokConfig = field(default_factory=MAETokConfig)  # this and the next: kind "maetok"
    maetok_loss: MAETokLossConfig = field(default_factory=MAETokLossConfig)
    repa_e: RepaEConfig = field(default_factory=RepaEConfig)  # kind "repa-e"; its losses.gan_weight is not adaptive
