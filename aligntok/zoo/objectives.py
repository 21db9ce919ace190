"""Objectives of the rivals, in the one training loop; reconstruction and adversary are AutoencoderObjective's.

    VAE:     L_rec + w_kl KL / (3 H W)                                     L_rec = L1 + w_p LPIPS + w_g lambda L_gan
    VA-VAE:  L_rec + w_kl KL / (3 H W) + w lambda' (L_mcos + L_mdms)       (aligntok.zoo.va_vae)
    RAE:     L_rec on decoder(tokens + sigma n),  n ~ N(0, I), sigma ~ U(0, tau) for each image; only the decoder learns

LDM sums L1 and LPIPS over the 3 H W values of an image and KL over its latent. Dividing all of it by 3 H W turns L1
and LPIPS into the means used here and leaves w_kl where LDM has it. The adaptive weights are ratios to L_rec's
gradient and are divided with it, as they should be; a clamp that was chosen for sums has to be divided, too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from aligntok.config import RivalConfig
from aligntok.data.frozen import FrozenOutput
from aligntok.data.sources import Batch
from aligntok.kernels import norm_ratio
from aligntok.losses.adversarial import DELTA, image_gradient, surrogate
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.runtime import collectives
from aligntok.runtime.devices import Precision
from aligntok.training.objective import Values
from aligntok.training.tokenizer_objective import AutoencoderObjective, deviation
from aligntok.zoo.rae import RAE
from aligntok.zoo.va_vae import alignment_loss
from aligntok.zoo.vae import VAE, ViTEncoder


class RivalObjective(AutoencoderObjective):
    """An autoencoder trained in one stage with one learning rate."""

    def __init__(
        self,
        tokenizer: StoredTokenizer,
        trained: dict[str, nn.Module],
        discriminator: nn.Module,
        perceptual: nn.Module | None,
        config: RivalConfig,
        precision: Precision,
    ) -> None:
        rates = dict.fromkeys(trained, config.stage.learning_rate)
        super().__init__(
            tokenizer,
            trained,
            rates,
            discriminator,
            perceptual,
            config.losses,
            config.stage,
            precision,
            config.training,
            config.betas,
        )
        self.config = config
        if config.stage.discriminator_start is not None:
            self.discriminator_start = config.stage.discriminator_start


class VAEObjective(RivalObjective):
    """The vanilla VAE: everything is trained, a sample of the posterior is decoded."""

    tokenizer: VAE

    def __init__(
        self,
        tokenizer: VAE,
        discriminator: nn.Module,
        perceptual: nn.Module | None,
        config: RivalConfig,
        precision: Precision,
        more: dict[str, nn.Module] | None = None,
    ) -> None:
        trained = {name: part for name, part in tokenizer.named_children() if any(True for _ in part.parameters())}
        super().__init__(tokenizer, trained | (more or {}), discriminator, perceptual, config, precision)

    def blocks(self) -> Iterable[nn.Module]:
        encoder = self.tokenizer.encoder
        return encoder.vit.blocks if isinstance(encoder, ViTEncoder) else ()

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, Values]:
        _, output, kl, values = self._pass(batch)
        return output, kl, values

    def _pass(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Values]:
        """(sampled latents, reconstruction, weighted KL, values)."""
        images = batch["images"]
        with self.precision.autocast():
            posterior = self.tokenizer.posterior(images)
            latents = posterior.sample(self._draw(batch, posterior.mean))
            output = self.tokenizer.reconstruct(latents).float()
        kl = posterior.kl().mean()
        values = {"latent_std": deviation(posterior.mean), "kl": kl.detach()}
        return latents, output, self.config.kl_weight * kl / images[0].numel(), values


class VAVAEObjective(VAEObjective):
    """VA-VAE: the VAE with its latents aligned to `features`, a frozen encoder's tokens [B, N, C] for a batch.

    Args:
        channels: C.
    """

    def __init__(
        self,
        tokenizer: VAE,
        discriminator: nn.Module,
        perceptual: nn.Module | None,
        config: RivalConfig,
        precision: Precision,
        features: FrozenOutput,
        channels: int,
    ) -> None:
        self.features = features
        self.projection = nn.Conv2d(tokenizer.latent_channels, channels, 1, bias=False).to(precision.device)
        more: dict[str, nn.Module] = {"projection": self.projection}
        super().__init__(tokenizer, discriminator, perceptual, config, precision, more)

    def _reconstruction_loss(self, batch: Batch) -> tuple[Tensor, Values]:
        latents, output, kl, values = self._pass(batch)
        image = output.detach().requires_grad_()
        reconstruction, parts = self._reconstruction(image, batch)
        gradient = image_gradient(reconstruction, image)
        self._fakes[self._place(batch).first] = image.detach()
        alignment, more = self._alignment(batch, latents, output, gradient)
        return surrogate(output, gradient, reconstruction) + kl + alignment, values | parts | more

    def _adversarial_loss(self, batch: Batch) -> tuple[Tensor, Values]:
        latents, output, kl, values = self._pass(batch)
        loss, gradient, parts = self._with_adversary(output, batch)
        alignment, more = self._alignment(batch, latents, output, gradient)
        return loss + kl + alignment, values | parts | more

    def _alignment(self, batch: Batch, latents: Tensor, output: Tensor, gradient: Tensor) -> tuple[Tensor, Values]:
        """The weighted alignment loss, given L_rec's gradient by `output`."""
        settings = self.config.alignment
        with self.precision.autocast():
            projected = self.projection(latents)
        loss = alignment_loss(projected, self.features(batch), settings.cosine_margin, settings.distance_margin)
        at = self.tokenizer.encoder.last_weight
        (reconstruction,) = torch.autograd.grad(output, at, gradient, retain_graph=True)
        (alignment,) = torch.autograd.grad(loss, at, retain_graph=True)
        a, b = collectives.mean(torch.stack([reconstruction, alignment]))  # of all processes
        weight = settings.weight * norm_ratio([a], [b], delta=DELTA, limit=settings.weight_max)
        return weight * loss, {"alignment": loss.detach(), "alignment_weight": weight}


class RAEObjective(RivalObjective):
    """RAE: the decoder alone, from `latents`, the frozen encoder's raw tokens [B, C, h, w] for a batch."""

    tokenizer: RAE

    def __init__(
        self,
        tokenizer: RAE,
        discriminator: nn.Module,
        perceptual: nn.Module | None,
        config: RivalConfig,
        precision: Precision,
        latents: FrozenOutput,
    ) -> None:
        self.latents = latents
        super().__init__(tokenizer, {"decoder": tokenizer.decoder}, discriminator, perceptual, config, precision)

    def blocks(self) -> Iterable[nn.Module]:
        return self.tokenizer.decoder.blocks

    def _last_weight(self) -> Tensor:
        return self.tokenizer.decoder.prediction.weight

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, Values]:
        latents = self.latents(batch)
        values = {"latent_std": deviation(latents)}
        place = self._place(batch)
        sigma = self.config.rae.noise * place.of(torch.rand(place.batch_size, 1, 1, 1, device=latents.device))
        latents = latents + sigma * self._draw(batch, latents)
        with self.precision.autocast():
            output = self.tokenizer.reconstruct(latents).float()
        return output, output.new_zeros(()), values
