"""The objective of a tokenizer stage; Stages 1, 2 and 3 differ only in their `StageConfig`.

    L = L1 + w_p LPIPS + w_g lambda L_gan + w_sp L_sp          lambda: adaptive weight, every term a mean over elements

Stage 1 trains adapter and decoder, Stage 2 all three parts with L_sp, Stage 3 the decoder (AlignTok 4.2). The first
three terms are those of every autoencoder here, rivals included: `AutoencoderObjective`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aligntok.config import LossConfig, RivalStageConfig, StageConfig, TrainingConfig
from aligntok.data.frozen import FrozenOutput
from aligntok.data.sources import Batch
from aligntok.kernels import gan_loss
from aligntok.losses.adversarial import LeCam, adaptive_weight, image_gradient, surrogate
from aligntok.losses.semantic import semantic_loss
from aligntok.models import lora
from aligntok.models.batch_norm import synchronise
from aligntok.models.blocks import prepare, restore
from aligntok.models.tokenizer import AlignTok, StoredTokenizer
from aligntok.runtime import collectives
from aligntok.runtime.devices import Precision
from aligntok.runtime.world import Place
from aligntok.training.distributed import is_sharded, replicate, shard
from aligntok.training.ema import adopt, build_ema
from aligntok.training.objective import Phase, Schedule, Values, build_optimizer, parameter_group


@dataclass
class FrozenInputs:
    """Outputs of networks that a stage does not train; None where the stage has no use for one."""

    features: FrozenOutput | None = None  # encoder tokens [B, N, C], when the encoder is frozen
    latents: FrozenOutput | None = None  # raw latents [B, d, h, w], when encoder and adapter are frozen
    snapshot: FrozenOutput | None = None  # Stage 1's latents (or features, for "before_adapter"), target of L_sp


def frozen_inputs(
    stage: StageConfig, tokenizer: AlignTok, snapshot: AlignTok | None, freeze: Callable[..., FrozenOutput]
) -> FrozenInputs:
    """What a stage needs of networks that it does not train.

    Args:
        snapshot: the tokenizer that L_sp holds on to; None where the stage has no L_sp.
        freeze: called with a network, images -> output, and what that is called; gives its output for a batch.
    """
    inputs = FrozenInputs()
    if stage.trains == ("decoder",):
        inputs.latents = freeze(tokenizer.raw_latents, "latents")
    elif "encoder" not in stage.trains:
        inputs.features = freeze(tokenizer.encoder, "encoder features")
    if snapshot is not None:
        after = stage.semantic.position == "after_adapter"
        inputs.snapshot = freeze(snapshot.raw_latents if after else snapshot.encoder, "snapshot")
    return inputs


class AutoencoderObjective:
    """Training of an image autoencoder on L1 + w_p LPIPS + w_g lambda L_gan, with its discriminator and averages.

    A subclass says how a batch is reconstructed (`_forward`) and, where it is not the LDM decoder's, which weight the
    adaptive lambda is taken at (`_last_weight`). Tokenizer and discriminator are trained in place.

    Args:
        trained: the parts to train, by name.
        rates: learning rate of each.
    """

    discriminator_clip: float | None = None  # largest norm of the discriminator's gradient; None = any

    def __init__(
        self,
        tokenizer: StoredTokenizer,
        trained: dict[str, nn.Module],
        rates: dict[str, float],
        discriminator: nn.Module,
        perceptual: nn.Module | None,
        losses: LossConfig,
        stage: StageConfig | RivalStageConfig,
        precision: Precision,
        training: TrainingConfig,
        betas: tuple[float, float] = (0.5, 0.9),
    ) -> None:
        self.tokenizer, self.discriminator, self.perceptual = tokenizer, discriminator, perceptual
        self.losses, self.stage, self.precision, self.training = losses, stage, precision, training
        self.steps, self.discriminator_start = stage.steps, stage.gan_start
        self.schedule = Schedule(stage.steps, stage.warmup_steps, stage.final_learning_rate)
        self.trained = trained
        tokenizer.eval().requires_grad_(False)
        for part in trained.values():
            lora.train_only_lora(part.train().requires_grad_(True))
        self.together = nn.ModuleDict(trained)
        self.ema = None if stage.ema_decay is None else build_ema(self.together, stage.ema_decay)
        prepare(self.blocks(), training.checkpointing, training.compile)
        self._spread_out()
        groups = [parameter_group(part.parameters(), rates[name]) for name, part in trained.items()]
        self.autoencoder_optimizer = build_optimizer(groups, betas, training, precision.device)
        group = parameter_group(discriminator.parameters(), stage.discriminator_learning_rate)
        self.discriminator_optimizer = build_optimizer([group], betas, training, precision.device)
        self.lecam = LeCam(losses.lecam_decay).to(precision.device) if losses.lecam_weight else None
        # This step's reconstructions by their first row, handed from the first phase to the second
        self._fakes: dict[int, Tensor] = {}
        self._logits: list[Tensor] = []  # this step's statistics of the discriminator's logits, for LeCam

    def _spread_out(self) -> None:
        """Over the processes: what is trained by DDP or FSDP2, the small discriminator always by DDP."""
        synchronise(self.discriminator)
        self.judge = replicate({"discriminator": self.discriminator})
        if not is_sharded(self.training.parallel):
            self.autoencoder = replicate(self.trained)
            return
        self.autoencoder = shard(self.trained)
        if self.ema is not None:
            averaged = self.ema.module
            assert isinstance(averaged, nn.ModuleDict)  # as `together`
            shard(dict(averaged.items()))

    def modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = dict(self.trained)
        if self.discriminator_start < self.steps:
            found["discriminator"] = self.discriminator
            if self.lecam is not None:
                found["lecam"] = self.lecam
        if self.ema is not None:
            found["ema"] = self.ema
        return found

    def optimizers(self) -> dict[str, Optimizer]:
        return {"autoencoder": self.autoencoder_optimizer, "discriminator": self.discriminator_optimizer}

    def phases(self, step: int) -> Iterator[Phase]:
        adversarial = step >= self.stage.gan_start and self.losses.gan_weight > 0
        self.schedule.apply(self.autoencoder_optimizer, step)
        loss = self._adversarial_loss if adversarial else self._reconstruction_loss
        accumulate = self.training.accumulate
        clip = self.stage.gradient_clip
        yield Phase("autoencoder", self.autoencoder_optimizer, loss, clip, self.autoencoder, accumulate)
        if step >= self.discriminator_start and self.losses.gan_weight > 0:
            self.schedule.apply(self.discriminator_optimizer, step)
            loss, taken = self._discriminator_loss, self._average_logits
            self._logits.clear()
            clip, judge = self.discriminator_clip, self.judge
            yield Phase("discriminator", self.discriminator_optimizer, loss, clip, judge, accumulate, taken)
        self._fakes.clear()

    def turns(self) -> list[int]:
        starts = {0, self.stage.gan_start, self.discriminator_start}
        return sorted(step for step in starts if step == 0 or 0 < step < self.steps)

    def after_step(self) -> None:
        if self.ema is not None:
            self.ema.update_parameters(self.together)

    def _average_logits(self) -> None:
        if self.lecam is not None:
            self.lecam.update(torch.stack(self._logits).mean(0))

    def finish(self) -> None:
        """At the end of a stage: blocks as they were, and the moving averages, if it keeps them, as weights."""
        restore(self.blocks())
        if self.ema is not None:
            adopt(self.together, self.ema)

    def _place(self, batch: Batch) -> Place:
        return Place.from_rows(batch["rows"], self.training.batch_size)

    def _draw(self, batch: Batch, like: Tensor) -> Tensor:
        """N(0, 1) noise like a tensor [B, ...] of the batch's rows, each row's the same however they are shared out."""
        place = self._place(batch)
        shape = (place.batch_size, *like.shape[1:])
        return place.of(torch.randn(shape, dtype=like.dtype, device=like.device))

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, Values]:
        """(reconstruction [B, 3, H, W] float32, weighted sum of the losses that are not on images, values)."""
        raise NotImplementedError

    def blocks(self) -> Iterable[nn.Module]:
        return ()

    def _last_weight(self) -> Tensor:
        return self.tokenizer.decoder.get_parameter("conv_out.weight")

    def _reconstruction(self, output: Tensor, batch: Batch) -> tuple[Tensor, Values]:
        """L1 + w_p LPIPS, float32; LPIPS of a share of the batch, of which every process has about as many rows."""
        images, place = batch["images"], self._place(batch)
        l1 = (output - images).abs().mean()
        if self.perceptual is None:
            return l1, {"l1": l1.detach()}
        seen, wanted = place.chosen(self.losses.perceptual_share)
        if len(seen) < place.count:
            output, images = output[seen], images[seen]
        with self.precision.autocast():
            distance = self.perceptual(output, images).float().sum() if seen else l1.new_zeros(())
        distance = distance / (wanted * place.count / place.batch_size)  # the mean over processes is that over `wanted`
        loss = l1 + self.losses.perceptual_weight * distance
        return loss, {"l1": l1.detach(), "perceptual": distance.detach()}

    def _reconstruction_loss(self, batch: Batch) -> tuple[Tensor, Values]:
        output, other, values = self._forward(batch)
        self._fakes[self._place(batch).first] = output.detach()
        loss, parts = self._reconstruction(output, batch)
        return loss + other, values | parts

    def _adversarial_loss(self, batch: Batch) -> tuple[Tensor, Values]:
        output, other, values = self._forward(batch)
        loss, _, parts = self._with_adversary(output, batch)
        return loss + other, values | parts

    def _with_adversary(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Values]:
        """L_rec, differentiated once down to the image (see aligntok.losses.adversarial).

        Returns:
            the loss; the gradient of its first two terms by `output`; values.
        """
        image = output.detach().requires_grad_()
        reconstruction, parts = self._reconstruction(image, batch)
        with self.precision.autocast():
            logits = self.discriminator(image)
        adversarial, _ = gan_loss.generator_loss(logits, self.losses.gan)
        gradients = image_gradient(reconstruction, image), image_gradient(adversarial, image)
        weight = adaptive_weight(output, self._last_weight(), *gradients, self.losses.gan_weight_max)
        weight = weight * self.losses.gan_weight
        self._fakes[self._place(batch).first] = image.detach()
        parts |= {"gan": adversarial.detach(), "gan_weight": weight}
        total = reconstruction + weight * adversarial
        return surrogate(output, gradients[0] + weight * gradients[1], total), gradients[0], parts

    def _discriminator_loss(self, batch: Batch) -> tuple[Tensor, Values]:
        fakes = self._fakes[self._place(batch).first]  # of the autoencoder phase
        with self.precision.autocast():
            real, fake = self.discriminator(batch["images"]), self.discriminator(fakes)
        lecam: dict[str, Any] = {}
        if self.lecam is not None:
            lecam = {"lecam_means": self.lecam.means, "lecam_weight": self.losses.lecam_weight}
        loss, stats = gan_loss.discriminator_loss(real, fake, self.losses.gan, **lecam)
        self._logits.append(stats)
        return loss, {"discriminator": loss.detach(), "logits_real": stats[0], "logits_fake": stats[1]}


class TokenizerObjective(AutoencoderObjective):
    """See the module docstring; `tokenizer` and `discriminator` are trained in place."""

    tokenizer: AlignTok
    stage: StageConfig

    def __init__(
        self,
        tokenizer: AlignTok,
        discriminator: nn.Module,
        perceptual: nn.Module | None,
        losses: LossConfig,
        stage: StageConfig,
        frozen: FrozenInputs,
        precision: Precision,
        training: TrainingConfig,
        betas: tuple[float, float] = (0.5, 0.9),
    ) -> None:
        self.frozen = frozen
        rates = {
            "encoder": stage.encoder_learning_rate,
            "adapter": stage.adapter_learning_rate or stage.learning_rate,
            "decoder": stage.learning_rate,
        }
        trained: dict[str, nn.Module] = {name: getattr(tokenizer, name) for name in stage.trains}
        super().__init__(
            tokenizer, trained, rates, discriminator, perceptual, losses, stage, precision, training, betas
        )

    def blocks(self) -> Iterable[nn.Module]:
        return self.tokenizer.encoder.blocks if "encoder" in self.trained else ()

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, Values]:
        """(reconstruction, weighted semantic loss, values)."""
        target = None if self.frozen.snapshot is None else self.frozen.snapshot(batch)
        with self.precision.autocast():
            latents, features, distance = self._latents(batch, target)
            output = self.tokenizer.decoder(self._with_noise(batch, latents)).float()
        values = {"latent_std": deviation(latents)}
        semantic = self.stage.semantic
        if target is None:
            return output, output.new_zeros(()), values
        if distance is not None:
            loss = distance / latents.numel()
        else:
            current, channel_dim = (latents, 1) if semantic.position == "after_adapter" else (features, 2)
            assert current is not None  # features are at hand where their distance is the loss
            loss = semantic_loss(current, target, semantic.kind, channel_dim)
        return output, semantic.weight * loss, values | {"semantic": loss.detach()}

    def _latents(self, batch: Batch, target: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Through whatever this stage trains, given the target of L_sp if there is one.

        Returns:
            raw latents [B, d, h, w]; encoder features or None; the sum of (latents - target)^2, where L_sp is made of
            it and the adapter can compute it as it goes, else None.
        """
        if "adapter" not in self.trained and "encoder" not in self.trained:
            assert self.frozen.latents is not None  # see `frozen_inputs`
            return self.frozen.latents(batch), None, None
        features = self._features(batch)
        grid = self.tokenizer.grid(batch["images"])
        semantic = self.stage.semantic
        if target is None or semantic.kind != "l2" or semantic.position != "after_adapter":
            return self.tokenizer.adapter(features, grid), features, None
        latents, distance = self.tokenizer.adapter(features, grid, target)
        return latents, features, distance

    def _features(self, batch: Batch) -> Tensor:
        if "encoder" in self.trained:
            return self.tokenizer.encoder(batch["images"])
        assert self.frozen.features is not None  # see `frozen_inputs`
        return self.frozen.features(batch)

    def _with_noise(self, batch: Batch, latents: Tensor) -> Tensor:
        """Latents plus `decoder_noise` standard deviations of noise, in units of the normalised latent."""
        if not self.stage.decoder_noise:
            return latents
        scale = self.tokenizer.latent_std[:, None, None] if self.tokenizer.has_statistics else deviation(latents)
        return latents + self.stage.decoder_noise * scale * self._draw(batch, latents)


def deviation(latents: Tensor) -> Tensor:
    """Standard deviation over all elements of all processes' latents, float32, without a gradient."""
    x = latents.detach().float()
    mean, square = collectives.mean(torch.stack([x.mean(), x.square().mean()])).unbind()
    return (square - mean.square()).clamp(min=0).sqrt()
