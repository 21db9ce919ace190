"""REPA-E (arXiv 2504.10483): a VAE and the generator on its latents trained together.

    tokenizer:      L1 + LPIPS + w_gan L_gan + w_kl KL + w_vae (1 - cos(g(h_k(z_t)), f))         generator frozen
    discriminator:  hinge
    generator:      |v - (z_1 - z_0)|^2 + w_gen (1 - cos(g(h_k(z_t)), f))                        z_0 without gradient

z is a sample of the posterior, normalised by a BatchNorm without scale and bias (the bridge), h_k the generator's
stream after k blocks, g a projector, f the tokens of a frozen encoder. The diffusion loss never reaches the VAE; the
alignment does, through the bridge's running statistics and with the generator's weights held. Times, noise and dropped
labels are the same in both passes. At the end the bridge's statistics become the tokenizer's latent statistics.
Sources: REPA-E train_repae.py:555-610 and configs/l1_lpips_kl_gan.yaml (weights, order, what is detached).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from aligntok.config import FlowConfig
from aligntok.data.frozen import FrozenOutput
from aligntok.data.sources import Batch
from aligntok.devices import Precision, optimizer_is_fused
from aligntok.diffusion.flow import drop_labels, sample_time
from aligntok.errors import UserError
from aligntok.kernels import flow_interpolate, flow_loss, gan_loss, noise_key
from aligntok.losses.semantic import semantic_loss
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.training.ema import build_ema
from aligntok.training.objective import Phase, Schedule, Values, parameter_group


@dataclass
class RepaEConfig:
    """Defaults: REPA-E's; numbers in brackets are lines of train_repae.py."""

    steps: int = 400_000
    learning_rate: float = 1e-4  # of all three [555, 573-581]
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW without decay
    warmup_steps: int = 0
    gradient_clip: float = 1.0  # [569]
    ema_decay: float = 0.9999  # of the generator
    depth: int = 8  # k: blocks before the stream that is aligned [594]
    projector_width: int = 2048  # hidden layers of g (REPA)
    generator_weight: float = 0.5  # REPA loss of the generator [608]
    tokenizer_weight: float = 1.5  # REPA loss of the VAE [610]
    perceptual_weight: float = 1.0  # configs/l1_lpips_kl_gan.yaml, with the two below
    gan_weight: float = 0.1  # from the first step, not adaptive
    kl_weight: float = 1e-6  # on the divergence summed over the latent
    bridge_momentum: float = 0.1  # of the BatchNorm [558]
    flow: FlowConfig = field(default_factory=lambda: FlowConfig(time_sampling="uniform", direction_weight=0.0))  # SiT


class AlignedGenerator(nn.Module):
    """A LightningDiT with REPA's projector on its stream after `depth` blocks.

    Args:
        features: channels of the frozen encoder's tokens.
    """

    def __init__(self, model: LightningDiT, depth: int, hidden: int, features: int) -> None:
        super().__init__()
        if not 1 <= depth <= len(model.blocks):
            raise UserError(f"repa depth is {depth}, the generator has {len(model.blocks)} blocks")
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
    """What the first phase of a step hands to the others."""

    latents: Tensor  # raw, without gradient
    reconstruction: Tensor
    features: Tensor
    t: Tensor
    key: Tensor
    labels: Tensor


class RepaEObjective:
    """Trains tokenizer, discriminator and generator in place; see the module's docstring.

    Args:
        tokenizer: a VAE of this package, with latent statistics for the bridge to start with.
        discriminator, perceptual: as in tokenizer training; no perceptual loss if None.
        model: the generator.
        features: gives the frozen encoder's tokens [B, N, C] of a batch, one for each token of the generator.
        feature_width: C.
    """

    def __init__(
        self,
        tokenizer: StoredTokenizer,
        discriminator: nn.Module,
        perceptual: nn.Module | None,
        model: LightningDiT,
        features: FrozenOutput,
        feature_width: int,
        config: RepaEConfig,
        precision: Precision,
    ) -> None:
        if not hasattr(tokenizer, "posterior"):
            raise UserError(f"REPA-E trains a VAE, and {type(tokenizer).__name__} has no posterior to sample")
        tokenizer._require_statistics()
        self.tokenizer, self.discriminator, self.perceptual = tokenizer, discriminator, perceptual
        self.model, self.features, self.config, self.precision = model, features, config, precision
        self.steps = config.steps
        self.schedule = Schedule(config.steps, config.warmup_steps)
        generator = AlignedGenerator(model, config.depth, config.projector_width, feature_width)
        self.generator = generator.to(precision.device).train()
        self.bridge = nn.BatchNorm2d(tokenizer.latent_channels, affine=False, momentum=config.bridge_momentum)
        self.bridge.to(precision.device).running_mean.copy_(tokenizer.latent_mean)
        self.bridge.running_var.copy_(tokenizer.latent_std.square())
        tokenizer.train().requires_grad_(True)
        self.ema = build_ema(model, config.ema_decay)
        parts = {"tokenizer": tokenizer, "discriminator": discriminator, "generator": self.generator}
        self._optimizers = {name: self._optimizer(part) for name, part in parts.items()}
        self._draws: Draws | None = None

    def _optimizer(self, part: nn.Module) -> Optimizer:
        group = parameter_group(part.parameters(), self.config.learning_rate)
        fused = optimizer_is_fused(self.precision.device)
        return AdamW([group], betas=self.config.betas, weight_decay=0.0, fused=fused)

    def modules(self) -> dict[str, nn.Module]:
        return {
            "tokenizer": self.tokenizer,
            "discriminator": self.discriminator,
            "generator": self.generator,
            "bridge": self.bridge,
            "ema": self.ema,
        }

    def optimizers(self) -> dict[str, Optimizer]:
        return self._optimizers

    def phases(self, step: int) -> Iterator[Phase]:
        losses = {
            "tokenizer": self._tokenizer_loss,
            "discriminator": self._discriminator_loss,
            "generator": self._generator_loss,
        }
        for name, loss in losses.items():
            self.schedule.apply(self._optimizers[name], step)
            yield Phase(name, self._optimizers[name], loss, self.config.gradient_clip)
        self._draws = None

    def after_step(self) -> None:
        self.ema.update_parameters(self.model)

    def finish(self) -> None:
        """The bridge's running statistics become the tokenizer's: its `encode` is what the generator was trained on."""
        deviation = (self.bridge.running_var + self.bridge.eps).sqrt()
        self.tokenizer.set_statistics(self.bridge.running_mean, deviation)
        self.tokenizer.eval().requires_grad_(False)

    def _tokenizer_loss(self, batch: Batch) -> tuple[Tensor, Values]:
        images, config = batch["images"], self.config
        with self.precision.autocast():
            posterior = self.tokenizer.posterior(images)
            raw = posterior.sample().float()
            output = self.tokenizer.reconstruct(raw).float()
        draws = self._draw(batch, raw, output)
        values = {"l1": (output - images).abs().mean(), "kl": posterior.kl().mean()}
        with held(self.discriminator, self.generator), self.precision.autocast():
            values["gan"], _ = gan_loss.generator_loss(self.discriminator(output), "hinge")
            values["align_tokenizer"] = self._alignment(self._running_bridge(raw), draws)
            if self.perceptual is not None:
                values["perceptual"] = self.perceptual(output, images).float().mean()
        weights = {
            "l1": 1.0,
            "perceptual": config.perceptual_weight,
            "kl": config.kl_weight,
            "gan": config.gan_weight,
            "align_tokenizer": config.tokenizer_weight,
        }
        loss = sum(weights[name] * value for name, value in values.items())
        return loss, {name: value.detach() for name, value in values.items()}

    def _discriminator_loss(self, batch: Batch) -> tuple[Tensor, Values]:
        assert self._draws is not None, "the tokenizer's phase comes first"
        with self.precision.autocast():
            real, fake = self.discriminator(batch["images"]), self.discriminator(self._draws.reconstruction)
        loss, stats = gan_loss.discriminator_loss(real, fake, "hinge")
        return loss, {"discriminator": loss.detach(), "logits_real": stats[0], "logits_fake": stats[1]}

    def _generator_loss(self, batch: Batch) -> tuple[Tensor, Values]:
        assert self._draws is not None, "the tokenizer's phase comes first"
        draws = self._draws
        with torch.autocast(draws.latents.device.type, enabled=False):
            data = self.bridge(draws.latents)
        with self.precision.autocast():
            velocity, projected = self.generator(flow_interpolate(data, draws.t, draws.key), draws.t, draws.labels)
        loss, parts = flow_loss(velocity, data, draws.key, self.config.flow.direction_weight)
        align = semantic_loss(self._checked(projected, draws), draws.features, "cosine", channel_dim=2)
        values = {"mse": parts[0], "align_generator": align.detach(), "loss": loss.detach()}
        return loss + self.config.generator_weight * align, values

    def _draw(self, batch: Batch, raw: Tensor, output: Tensor) -> Draws:
        """Times, noise and labels of the step, kept for its other phases."""
        device = raw.device
        t = sample_time(len(raw), self.config.flow.time_sampling, device)
        labels = drop_labels(batch["labels"], self.model.config.label_dropout, self.model.null_class)
        features = self.features(batch).float()
        self._draws = Draws(raw.detach(), output.detach(), features, t, noise_key(device), labels)
        return self._draws

    def _running_bridge(self, raw: Tensor) -> Tensor:
        """Normalised by the running statistics, which the tokenizer's phase leaves as they are."""
        return F.batch_norm(raw, self.bridge.running_mean, self.bridge.running_var, eps=self.bridge.eps)

    def _alignment(self, latents: Tensor, draws: Draws) -> Tensor:
        projected = self.generator.project(flow_interpolate(latents, draws.t, draws.key), draws.t, draws.labels)
        return semantic_loss(self._checked(projected, draws), draws.features, "cosine", channel_dim=2)

    @staticmethod
    def _checked(projected: Tensor, draws: Draws) -> Tensor:
        if projected.shape != draws.features.shape:
            raise UserError(
                f"the encoder gives features {list(draws.features.shape)}, the generator's stream is projected to "
                f"{list(projected.shape)}: choose image size, patch size and encoder for one grid of tokens"
            )
        return projected


@contextmanager
def held(*modules: nn.Module) -> Iterator[None]:
    """Gradients flow through `modules` and not into their parameters, for what is computed inside."""
    learned = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
