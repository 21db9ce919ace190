"""The objective of the generator: flow matching on normalised latents, with labels or captions, and EMA."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from aligntok.config import GeneratorTrainingConfig
from aligntok.data.frozen import FrozenOutput
from aligntok.data.sources import Batch
from aligntok.diffusion.flow import training_loss
from aligntok.models.blocks import prepare
from aligntok.models.generator import Network
from aligntok.runtime.devices import Precision
from aligntok.runtime.world import Place
from aligntok.training.conditions import Conditioning
from aligntok.training.distributed import is_sharded, replicate, shard
from aligntok.training.ema import build_ema
from aligntok.training.objective import Phase, Schedule, Values, build_optimizer, parameter_group


class GeneratorObjective:
    """Trains `model` in place; `latents` gives the normalised latents [B, d, h, w] of a batch, `condition` what the
    network is told of its pictures.

    `snapshot(n)` is called after every `config.snapshot_every` steps, in every process; n steps are done by then.
    Batches come in `shapes` shapes.
    """

    def __init__(
        self,
        model: Network,
        latents: FrozenOutput,
        condition: Conditioning,
        config: GeneratorTrainingConfig,
        precision: Precision,
        snapshot: Callable[[int], None] | None = None,
        shapes: int = 1,
    ) -> None:
        self.snapshot, self._step = snapshot, 0
        self.model, self.latents, self.config, self.precision = model.train(), latents, config, precision
        self.condition = condition
        self.steps = config.steps
        self.ema = build_ema(model, config.ema_decay)
        prepare(self.blocks(), config.training.checkpointing, config.training.compile, shapes)
        if is_sharded(config.training.parallel):
            self.trained = shard({"model": model})
            shard({"model": self.ema.module})
        else:
            self.trained = replicate({"model": model})
        self.schedule = Schedule(config.steps, config.warmup_steps, config.final_learning_rate)
        trained = (p for p in model.parameters() if p.requires_grad)
        groups = [parameter_group(trained, config.learning_rate)]
        self.optimizer = build_optimizer(groups, config.betas, config.training, precision.device)

    def blocks(self) -> Iterator[nn.Module]:
        """Of the trunk and, where the model has one, of the head."""
        return self.model.transformer_blocks()

    def turns(self) -> list[int]:
        return [0]

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "ema": self.ema}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"model": self.optimizer}

    def phases(self, step: int) -> Iterator[Phase]:
        self._step = step
        self.schedule.apply(self.optimizer, step)
        accumulate = self.config.training.accumulate
        yield Phase("generator", self.optimizer, self._loss, self.config.gradient_clip, self.trained, accumulate)

    def after_step(self) -> None:
        self.ema.update_parameters(self.model)
        done, every = self._step + 1, self.config.snapshot_every
        if self.snapshot is not None and every and done % every == 0:
            self.snapshot(done)

    def _loss(self, batch: Batch) -> tuple[Tensor, Values]:
        place = Place.from_rows(batch["rows"], self.config.training.batch_size)
        condition = self.condition(batch, place)
        with self.precision.autocast():
            loss, values = training_loss(self.model, self.latents(batch), condition, self.config.flow, place)
        return loss, values | {"loss": loss.detach()}
