"""Training MAETok: reconstruction of masked images, and features of the hidden patches from shallow decoders.

    L = L1 + w_p LPIPS + w_g lambda L_gan + w_aux sum_k L_k        L_k over masked patches only
    L_k = mean squared difference (HOG)  or  mean of 1 - cos (features of a frozen encoder: DINOv2, CLIP, SigLIP)

The shallow decoders serve training alone: they are in the checkpoints and not in the tokenizer's folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from aligntok.config import LossConfig, RivalStageConfig, TrainingConfig
from aligntok.data.frozen import FrozenNetwork, FrozenOutput
from aligntok.data.sources import Batch
from aligntok.devices import Precision
from aligntok.errors import UserError
from aligntok.losses.semantic import semantic_loss
from aligntok.models.encoder import Encoder
from aligntok.training.objective import Values
from aligntok.training.tokenizer_objective import AutoencoderObjective
from aligntok.zoo.hog import hog, hog_width
from aligntok.zoo.maetok import MAETok, MAETokConfig, TokenDecoder, draw_mask


@dataclass
class MAETokLossConfig:
    mask_share: tuple[float, float] = (0.4, 0.6)  # of the patches; MAETok's enc_token_drop and its maximum
    auxiliary_weight: float = 1.0  # on the sum of the features' losses (MAETok's code adds them as they are)
    auxiliary_depth: int = 3  # "shallow"; the size of MAETok's auxiliary decoders is not in the sources at hand
    auxiliary_width: int = 192  # likewise
    auxiliary_heads: int = 3


@dataclass
class FeatureTarget:
    """What a shallow decoder predicts: `output(batch)` gives [B, N, width], patches in rows."""

    output: FrozenOutput
    width: int
    kind: Literal["l2", "cosine"] = "cosine"


def hog_target(config: MAETokConfig) -> FeatureTarget:
    """Histograms of oriented gradients of the images themselves."""
    return FeatureTarget(lambda batch: hog(batch["images"], config.patch_size), hog_width(config.patch_size), "l2")


def encoder_target(encoder: Encoder, precision: Precision) -> FeatureTarget:
    """Tokens of a frozen vision transformer, whose downsampling must be MAETok's patch size."""
    return FeatureTarget(FrozenNetwork(encoder.eval().requires_grad_(False), precision), encoder.width)


class MAETokObjective(AutoencoderObjective):
    """See the module's docstring; tokenizer and discriminator are trained in place."""

    tokenizer: MAETok

    def __init__(
        self,
        tokenizer: MAETok,
        targets: dict[str, FeatureTarget],
        config: MAETokLossConfig,
        discriminator: nn.Module,
        perceptual: nn.Module | None,
        losses: LossConfig,
        stage: RivalStageConfig,
        precision: Precision,
        training: TrainingConfig,
        betas: tuple[float, float] = (0.9, 0.95),  # SoftVQ's configuration, the same repository
    ) -> None:
        low, high = config.mask_share
        if not 0 < low <= high <= 1:
            raise UserError(f"mask_share is {config.mask_share}, expected two shares with 0 < low <= high <= 1")
        self.targets, self.config = targets, config
        width, depth, heads = config.auxiliary_width, config.auxiliary_depth, config.auxiliary_heads
        self.auxiliary = nn.ModuleDict(
            {name: TokenDecoder(tokenizer.config, t.width, width, depth, heads) for name, t in targets.items()}
        ).to(precision.device)
        trained = {"encoder": tokenizer.encoder, "decoder": tokenizer.decoder, "auxiliary": self.auxiliary}
        rates = dict.fromkeys(trained, stage.learning_rate)
        super().__init__(
            tokenizer, trained, rates, discriminator, perceptual, losses, stage, precision, training, betas
        )

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, Values]:
        images = batch["images"]
        masked = draw_mask(len(images), self.tokenizer.config.side**2, *self.config.mask_share, images.device)
        with self.precision.autocast():
            raw = self.tokenizer.raw_latents(images, masked)
            output = self.tokenizer.reconstruct(raw).float()
            tokens = raw.squeeze(2).transpose(1, 2)  # [B, K, d]
            predicted = {name: decoder(tokens).float() for name, decoder in self.auxiliary.items()}
        losses = {name: self._feature_loss(name, predicted[name], batch, masked) for name in predicted}
        total = self.config.auxiliary_weight * sum(losses.values(), output.new_zeros(()))
        values = {"latent_std": raw.detach().float().std()}
        return output, total, values | {name: loss.detach() for name, loss in losses.items()}

    def _feature_loss(self, name: str, predicted: Tensor, batch: Batch, masked: Tensor) -> Tensor:
        target = self.targets[name].output(batch)
        if target.shape != predicted.shape:
            raise UserError(
                f"target {name} gives features {list(target.shape)}, expected {list(predicted.shape)}: "
                "one row for each patch of MAETok"
            )
        return semantic_loss(predicted[masked], target[masked], self.targets[name].kind, channel_dim=1)

    def _last_weight(self) -> Tensor:
        return self.tokenizer.decoder.out.weight
