"""The training loop. It knows nothing of images, stages or networks.

For every step: seed the random numbers by (seed, step), fetch the step's batch, and for each phase of the objective
take loss, gradient, clip, guard and optimizer step; then moving averages, telemetry and, when due, a checkpoint.
Because randomness and data are functions of (seed, step), a resumed run continues to the bit where the interrupted
one would have gone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from aligntok import collectives
from aligntok.config import TrainingConfig
from aligntok.data.sources import Batch, Source
from aligntok.training.checkpoint import Checkpoints
from aligntok.training.distributed import complete, gradients
from aligntok.training.guard import Interrupted, NonFiniteGuard, StopSignals
from aligntok.training.objective import Objective, Phase, Values
from aligntok.training.telemetry import Telemetry


def train(
    part: str,
    objective: Objective,
    source: Source,
    config: TrainingConfig,
    device: torch.device,
    telemetry: Telemetry,
    checkpoints: Checkpoints,
) -> None:
    """Run `objective` to its last step, resuming from the newest sound checkpoint.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint was written.
        UserError: too many non-finite steps, or a checkpoint of another run.
    """
    start = checkpoints.restore(objective)
    guard = NonFiniteGuard(config.nonfinite_limit)
    with StopSignals() as signals, telemetry.part(part, start, objective.steps) as log:
        for step in range(start, objective.steps):
            torch.manual_seed(step_seed(config.seed, step))
            batch = move(log.waiting_for(partial(source.batch, step)), device)
            values: Values = {}
            for phase in objective.phases(step):
                values |= run_phase(objective, phase, batch, guard, log.warn)
            objective.after_step()
            done = step + 1
            log.step(done, values, config.batch_size)
            stop = collectives.largest(signals.received or 0)  # one process is signalled, all stop after this step
            if stop or (done % config.checkpoint_every == 0 and done < objective.steps):
                checkpoints.save(done, objective)
            if stop:
                raise Interrupted(stop, done)


def run_phase(
    objective: Objective, phase: Phase, batch: Batch, guard: NonFiniteGuard, warn: Callable[[str], None]
) -> Values:
    """One optimizer step of one phase; skipped, with a warning, where loss or gradient is not finite."""
    phase.optimizer.zero_grad(set_to_none=True)
    loss, values = gradients(phase, batch)
    norm = complete(nn.utils.clip_grad_norm_(phase.parameters, phase.gradient_clip or float("inf")))
    problem = guard.passes(objective, phase, loss, norm)  # of all processes, so that all decide alike
    if problem is not None:
        phase.optimizer.zero_grad(set_to_none=True)
        warn(problem)
        return {}
    phase.optimizer.step()
    return values | {f"grad_norm_{phase.name}": norm}


def step_seed(seed: int, step: int) -> int:
    """Seed of everything random in a step; distinct for distinct (seed, step) up to 2^32 steps."""
    return (seed << 32) + step


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on `device`, copied asynchronously; its row numbers stay on the host, which reads them."""
    return {key: value if key == "rows" else value.to(device, non_blocking=True) for key, value in batch.items()}
