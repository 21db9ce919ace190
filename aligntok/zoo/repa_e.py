"""REPA-E (arXiv 2504.10483): a VAE and the generator on its latents trained together.

    tokenizer:      L1 + w_p LPIPS + w_g L_gan + w_kl KL / (3 H W) + w_vae (1 - cos(g(h_k(z_t)), f))   generator frozen
    discriminator:  hinge
    generator:      |v - (z_1 - z_0)|^2 + w_gen (1 - cos(g(h_k(z_t)), f))                        z_0 without gradient

z is a sample of the posterior, normalised by a BatchNorm without scale and bias (the bridge), h_k the generator's
stream after k blocks, g a projector, f the tokens of a frozen encoder. The diffusion loss never reaches the VAE; the
alignment does, through the bridge's running statistics and with the generator's weights held. Times and noise are the
same in both passes; labels are dropped in the generator's alone, since REPA-E's generator is in eval mode in the
other. The discriminator's gradient is clipped like the others. At the end the bridge's statistics become the
tokenizer's latent statistics. L_gan has a plain weight here, not an adaptive one. REPA-E's weight of KL, 1e-6, stands
beside means over pixels: it is 1e-6 x 3 H W in the terms of `rival.kl_weight`, which is LDM's.
Sources: REPA-E train_repae.py:555-610 and configs/l1_lpips_kl_gan.yaml (weights, order, what is detached).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aligntok.config import GeneratorTrainingConfig, RivalConfig
from aligntok.data.frozen import FrozenOutput
from aligntok.data.sources import Batch
from aligntok.diffusion.condition import dropped
from aligntok.diffusion.flow import sample_time, shift_time
from aligntok.errors import UserError
from aligntok.kernels import flow_interpolate, flow_loss, gan_loss, noise_key
from aligntok.losses.semantic import semantic_loss
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.runtime import collectives
from aligntok.runtime.devices import Precision
from aligntok.runtime.world import current
from aligntok.training.distributed import replicate
from aligntok.training.ema import build_ema
from aligntok.training.objective import Phase, Schedule, Values, build_optimizer, parameter_group
from aligntok.zoo.objectives import VAEObjective
from aligntok.zoo.vae import VAE


class Bridge(nn.Module):
    """BatchNorm without scale and bias over the rows of all processes.

        z = (raw - mean) / sqrt(var + eps)         batch statistics in training, which move the running ones

    Args:
        mean, std: [d], the running statistics to start with.
    """

    eps = 1e-4  # train_repae.py's BatchNorm2d
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, mean: Tensor, std: Tensor, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", mean.clone())
        self.register_buffer("running_var", std.square())

    def forward(self, raw: Tensor) -> Tensor:
        """Raw latents [B, d, h, w], float32 and without gradient -> normalised ones."""
        if not self.training:
            return self.running(raw)
        mean = collectives.mean(raw.mean((0, 2, 3)))
        variance = collectives.mean((raw - mean[:, None, None]).square().mean((0, 2, 3)))
        count = raw.numel() // raw.shape[1] * current().size
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return self._normalised(raw, mean, variance)

    def running(self, raw: Tensor) -> Tensor:
        """Normalised by the running statistics, which stay as they are; gradients pass."""
        return self._normalised(raw, self.running_mean, self.running_var)

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """(mean, std) [d] with which a tokenizer normalises as `running` does."""
        return self.running_mean, (self.running_var + self.eps).sqrt()

    def _normalised(self, raw: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return (raw - mean[:, None, None]) * torch.rsqrt(variance + self.eps)[:, None, None]


class AlignedGenerator(nn.Module):
    """A LightningDiT with REPA's projector on its stream after `depth` blocks.

    Args:
        features: channels of the frozen encoder's tokens.
    """

    def __init__(self, model: LightningDiT, depth: int, hidden: int, features: int) -> None:
        super().__init__()
        if not 1 <= depth <= len(model.blocks):
            raise UserError(f"rival.repa_e.depth is {depth}, the generator has {len(model.blocks)} blocks")
        self.model = model
        self.depth = depth
        width = model.patches.out_channels
        self.projector = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, features)
        )

    def forward(self, z: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(velocity like z, projected stream [B, N, features])."""
        return self._run(self.model, z, t, labels)

    def project(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The projected stream alone, without the blocks behind it."""
        front = copy.copy(self.model)  # shares every parameter; only its list of blocks is shorter
        front._modules = self.model._modules | {"blocks": self.model.blocks[: self.depth]}
        return self._run(front, z, t, labels)[1]

    def _run(self, model: LightningDiT, z: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def note(block: nn.Module, given: tuple, output: tuple) -> None:
            x, (branch, gate) = output
            seen.append(x + gate[:, None] * branch)  # what the next block begins with

        handle = model.blocks[self.depth - 1].register_forward_hook(note)
        try:
            velocity = model(z, t, labels)
        finally:
            handle.remove()
        return velocity, self.projector(seen[0])


class Draws(NamedTuple):
    """What the first phase of a step hands to the generator's."""

    latents: Tensor  # raw, without gradient
    features: Tensor
    t: Tensor
    key: Tensor
    labels: Tensor  # some dropped
    first: int  # number of the first row


class RepaEObjective(VAEObjective):
    """Trains tokenizer, discriminator and generator in place; see the module's docstring.

    Args:
        tokenizer: a VAE, with latent statistics for the bridge to start with.
        discriminator, perceptual: as in tokenizer training; no perceptual loss if None.
        config: stage, losses and KL weight of the VAE and the discriminator, weights of the alignment.
        model: the generator.
        generator: its learning rate and schedule, betas, clip, averages and flow.
        features: gives the frozen encoder's tokens [B, N, C] of a batch, one for each token of the generator.
        channels: C.
    """

    def __init__(
        self,
        tokenizer: StoredTokenizer,
        discriminator: nn.Module,
        perceptual: nn.Module | None,
        config: RivalConfig,
        precision: Precision,
        model: LightningDiT,
        generator: GeneratorTrainingConfig,
        features: FrozenOutput,
        channels: int,
    ) -> None:
        if not isinstance(tokenizer, VAE):
            raise UserError(f"REPA-E trains a VAE, and {type(tokenizer).__name__} has no posterior to sample")
        if config.stage.ema_decay is not None:
            raise UserError(
                "rival.stage.ema_decay is given, but the generator learns the latents of the VAE's weights and not of "
                "their averages: set it to null (generator.ema_decay is the generator's)"
            )
        tokenizer._require_statistics()
        settings, training = config.repa_e, config.training
        self.model, self.settings, self.features = model, generator, features
        self.generator_ema = build_ema(model, generator.ema_decay)  # copies blocks that are not prepared yet
        super().__init__(tokenizer, discriminator, perceptual, config, precision)
        self.discriminator_clip = config.stage.gradient_clip
        aligned = AlignedGenerator(model, settings.depth, settings.projector_width, channels)
        self.generator = aligned.to(precision.device).train()
        bridge = Bridge(tokenizer.latent_mean, tokenizer.latent_std, settings.bridge_momentum)
        self.bridge = bridge.to(precision.device).train()
        self.replicated = replicate({"generator": self.generator})
        self.generator_schedule = Schedule(self.steps, generator.warmup_steps, generator.final_learning_rate)
        group = parameter_group(self.generator.parameters(), generator.learning_rate)
        self.generator_optimizer = build_optimizer([group], generator.betas, training, precision.device)
        judges = (*discriminator.parameters(), *self.generator.parameters())
        self._judges = [parameter for parameter in judges if parameter.requires_grad]
        self._draws: dict[int, Draws] = {}  # of this step, by their first row

    def blocks(self) -> Iterator[nn.Module]:
        yield from super().blocks()
        yield from self.model.blocks

    def modules(self) -> dict[str, nn.Module]:
        own = {"generator": self.generator, "bridge": self.bridge, "generator_ema": self.generator_ema}
        return super().modules() | own

    def optimizers(self) -> dict[str, Optimizer]:
        return super().optimizers() | {"generator": self.generator_optimizer}

    def phases(self, step: int) -> Iterator[Phase]:
        for phase in super().phases(step):
            # In its backward pass too, where checkpointed blocks run again
            self._hold(phase.name == "autoencoder")
            yield phase
        self._hold(False)
        self.generator_schedule.apply(self.generator_optimizer, step)
        clip, accumulate = self.settings.gradient_clip, self.training.accumulate
        yield Phase("generator", self.generator_optimizer, self._generator_loss, clip, self.replicated, accumulate)
        self._draws.clear()

    def _hold(self, on: bool) -> None:
        """Whether gradients flow through discriminator and generator without reaching their weights."""
        for parameter in self._judges:
            parameter.requires_grad_(not on)

    def after_step(self) -> None:
        super().after_step()
        self.generator_ema.update_parameters(self.model)

    def finish(self) -> None:
        """The bridge's running statistics become the tokenizer's: its `encode` is what the generator was trained on."""
        super().finish()
        self.tokenizer.set_statistics(*self.bridge.statistics)

    def _reconstruction_loss(self, batch: Batch) -> tuple[Tensor, Values]:
        return self._tokenizer_loss(batch, adversarial=False)

    def _adversarial_loss(self, batch: Batch) -> tuple[Tensor, Values]:
        return self._tokenizer_loss(batch, adversarial=True)

    def _tokenizer_loss(self, batch: Batch, adversarial: bool) -> tuple[Tensor, Values]:
        raw, output, loss, values = self._pass(batch)
        draws = self._draw_times(batch, raw)
        self._fakes[draws.first] = output.detach()
        reconstruction, parts = self._reconstruction(output, batch)
        loss, values = loss + reconstruction, values | parts
        with self.precision.autocast():
            if adversarial:
                gan, _ = gan_loss.generator_loss(self.discriminator(output), self.losses.gan)
                loss = loss + self.losses.gan_weight * gan
                values["gan"] = gan.detach()
            noisy = flow_interpolate(self.bridge.running(raw), draws.t, draws.key, first_image=draws.first)
            align = self._distance(self.generator.project(noisy, draws.t, batch["labels"]), draws)
        return loss + self.config.repa_e.tokenizer_weight * align, values | {"align_tokenizer": align.detach()}

    def _generator_loss(self, batch: Batch) -> tuple[Tensor, Values]:
        draws = self._draws[self._place(batch).first]  # of the tokenizer's phase
        data, flow = self.bridge(draws.latents), self.settings.flow
        with self.precision.autocast():
            noisy = flow_interpolate(data, draws.t, draws.key, first_image=draws.first)
            velocity, projected = self.generator(noisy, draws.t, draws.labels)
        loss, parts = flow_loss(velocity, data, draws.key, flow.direction_weight, first_image=draws.first)
        align = self._distance(projected, draws)
        values = {"mse": parts[0], "align_generator": align.detach()}
        return loss + self.config.repa_e.generator_weight * align, values

    def _draw_times(self, batch: Batch, raw: Tensor) -> Draws:
        """Times, noise and labels of these rows, kept for the generator's phase."""
        place, flow, device = self._place(batch), self.settings.flow, raw.device
        t = place.of(sample_time(place.batch_size, flow.time_sampling, device))
        nothing = (batch["labels"].new_full((1,), self.model.null_class),)
        (labels,) = dropped((batch["labels"],), nothing, self.model.config.label_dropout, place)
        t, key = shift_time(t, flow.time_shift), noise_key(device)
        draws = Draws(raw.detach(), self.features(batch).float(), t, key, labels, place.first)
        self._draws[place.first] = draws
        return draws

    @staticmethod
    def _distance(projected: Tensor, draws: Draws) -> Tensor:
        if projected.shape != draws.features.shape:
            raise UserError(
                f"the encoder gives features {list(draws.features.shape)}, the generator's stream is projected to "
                f"{list(projected.shape)}: choose image size, patch size and encoder for one grid of tokens"
            )
        return semantic_loss(projected, draws.features, "cosine", channel_dim=2)
