"""Training MAETok: reconstruction of masked images, and features of the hidden patches from shallow decoders.

    L = L1 + w_p LPIPS + w_g lambda L_gan + w_aux sum_k L_k        L_k over masked patches only
    L_k = mean squared difference (HOG)  or  mean of 1 - cos (features of a frozen encoder: DINOv2, CLIP, SigLIP)

The shallow decoders serve training alone: they are in the checkpoints and not in the tokenizer's folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from torch import Tensor, nn

from aligntok.config import MAETokConfig, RivalConfig
from aligntok.data.frozen import FrozenOutput
from aligntok.data.sources import Batch
from aligntok.errors import UserError
from aligntok.losses.semantic import semantic_loss
from aligntok.runtime.devices import Precision
from aligntok.training.objective import Values
from aligntok.training.tokenizer_objective import deviation
from aligntok.zoo.hog import hog, hog_width
from aligntok.zoo.maetok import MAETok, TokenDecoder, as_mask, draw_hidden
from aligntok.zoo.objectives import RivalObjective


@dataclass
class FeatureTarget:
    """What a shallow decoder predicts: `output(batch)` gives [B, N, width], patches in rows."""

    output: FrozenOutput
    width: int
    kind: Literal["l2", "cosine"] = "cosine"


def hog_target(config: MAETokConfig) -> FeatureTarget:
    """Histograms of oriented gradients of the images themselves."""
    return FeatureTarget(lambda batch: hog(batch["images"], config.patch_size), hog_width(config.patch_size), "l2")


class MAETokObjective(RivalObjective):
    """See the module's docstring; tokenizer and discriminator are trained in place."""

    tokenizer: MAETok

    def __init__(
        self,
        tokenizer: MAETok,
        discriminator: nn.Module,
        perceptual: nn.Module | None,
        config: RivalConfig,
        precision: Precision,
        targets: dict[str, FeatureTarget],
    ) -> None:
        settings = config.maetok_loss
        low, high = settings.mask_share
        if not 0 < low <= high <= 1:
            raise UserError(
                f"rival.maetok_loss.mask_share is {settings.mask_share}, expected two shares with 0 < low <= high <= 1"
            )
        self.targets = targets
        width, depth, heads = settings.auxiliary_width, settings.auxiliary_depth, settings.auxiliary_heads
        self.auxiliary = nn.ModuleDict(
            {name: TokenDecoder(tokenizer.config, t.width, width, depth, heads) for name, t in targets.items()}
        ).to(precision.device)
        trained: dict[str, nn.Module] = {"encoder": tokenizer.encoder, "decoder": tokenizer.decoder}
        if targets:
            trained["auxiliary"] = self.auxiliary
        super().__init__(tokenizer, trained, discriminator, perceptual, config, precision)

    def blocks(self) -> Iterable[nn.Module]:
        return chain(self.tokenizer.encoder.trunk.blocks, self.tokenizer.decoder.trunk.blocks)

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, Values]:
        images, place, settings = batch["images"], self._place(batch), self.config.maetok_loss
        patches = self.tokenizer.config.side**2
        hidden = place.of(draw_hidden(place.batch_size, patches, *settings.mask_share, images.device))  # [B, M]
        masked = as_mask(hidden, patches)
        with self.precision.autocast():
            raw = self.tokenizer.raw_latents(images, masked)
            output = self.tokenizer.reconstruct(raw).float()
            tokens = raw.squeeze(2).transpose(1, 2)  # [B, K, d]
            predicted = {name: decoder(tokens).float() for name, decoder in self.auxiliary.items()}
        losses = {name: self._feature_loss(name, predicted[name], batch, hidden) for name in predicted}
        total = settings.auxiliary_weight * sum(losses.values(), output.new_zeros(()))
        values = {"latent_std": deviation(raw)}
        return output, total, values | {name: loss.detach() for name, loss in losses.items()}

    def _feature_loss(self, name: str, predicted: Tensor, batch: Batch, hidden: Tensor) -> Tensor:
        """Of the patches whose numbers are in `hidden` [B, M]."""
        target = self.targets[name].output(batch)
        if target.shape != predicted.shape:
            raise UserError(
                f"target {name} gives features {list(target.shape)}, expected {list(predicted.shape)}: "
                "one row for each patch of MAETok"
            )
        predicted, target = (values.take_along_dim(hidden[..., None], dim=1) for values in (predicted, target))
        return semantic_loss(predicted, target, self.targets[name].kind, channel_dim=2)

    def _last_weight(self) -> Tensor:
        return self.tokenizer.decoder.out.weight
