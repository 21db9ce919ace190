"""The training loop. It knows nothing of images, stages or networks.

For every step: fetch the step's batch, seed the random numbers by (seed, step), and for each phase of the objective
take loss, gradient, guard, clip and optimizer step; then moving averages, telemetry and, when due, a checkpoint.
Because randomness and data are functions of (seed, step), a resumed run continues to the bit where the interrupted
one would have gone. (The batch comes first: a loader that starts draws random numbers of its own.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from aligntok.config import TrainingConfig
from aligntok.data.sources import Batch, Source
from aligntok.runtime import collectives
from aligntok.training.distributed import complete, gradients
from aligntok.training.feed import Feed
from aligntok.training.monitoring.telemetry import PartLog, Telemetry
from aligntok.training.objective import Objective, Phase, Values
from aligntok.training.recovery.checkpoint import Checkpoints
from aligntok.training.recovery.guard import Guard, Interrupted, StopSignals
from aligntok.training.recovery.spikes import Spike


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
        UserError: too many non-finite steps, a checkpoint of another run, or one that could not be written.
    """
    guard = Guard(part, config, objective, source, telemetry.folder)
    with StopSignals() as signals, checkpoints, Feed(source, device, objective.steps) as feed:
        start, counters = checkpoints.restore(objective)
        guard.load_state(counters)
        if guard.can_rewind and start == 0:
            checkpoints.save(0, objective, guard.state(), regular=False)
        while True:
            try:
                with telemetry.part(part, start, objective.steps) as log:
                    for step in range(start, objective.steps):
                        take_step(objective, feed, config.seed, guard, log, step, checkpoints.observe)
                        done, regular = step + 1, (step + 1) % config.checkpoint_every == 0
                        stop = collectives.largest(signals.received or 0)  # one process is signalled, all stop here
                        if stop or (regular and done < objective.steps):
                            checkpoints.save(done, objective, guard.state(), regular)
                        if stop:
                            checkpoints.wait()
                            raise Interrupted(stop, done)
                        checkpoints.check()
                return
            except Spike as spike:
                start, counters = checkpoints.restore(objective)
                guard.rewind(spike, start, counters)
                telemetry.say(f"{part}: {spike}; back to step {start}, leaving out the batches since")
                checkpoints.save(start, objective, guard.state(), regular=False)


def take_step(
    objective: Objective,
    feed: Feed,
    seed: int,
    guard: Guard,
    log: PartLog,
    step: int,
    observe: Callable[[Values], None],
) -> None:
    """All phases of one step, with the data and the random numbers of its position."""
    position = step + guard.offset
    batch = log.waiting_for(partial(feed.batch, position))  # before the seed: loaders may draw numbers of their own
    torch.manual_seed(step_seed(seed, position))
    guard.begin(step)
    values: Values = {}
    for phase in objective.phases(step):
        values = run_phase(objective, phase, batch, guard, log.warn) | values  # "loss" is the first phase's
    if not guard.step_is_lost:
        objective.after_step()
    guard.finish()
    observe(values)
    log.step(step + 1, values, len(batch["labels"]))


def run_phase(objective: Objective, phase: Phase, batch: Batch, guard: Guard, warn: Callable[[str], None]) -> Values:
    """One optimizer step of one phase; skipped, with a warning, where loss or gradient is not finite."""
    torch.manual_seed(torch.initial_seed())  # every phase draws from the step's random state
    if not guard.enter():
        return {}
    phase.clear()
    loss, values = gradients(phase, batch)
    norm = nn.utils.get_total_norm([p.grad for p in phase.parameters if p.grad is not None])
    whole = complete(norm)  # of all processes, as the loss is, so that all decide alike
    sound = guard.ask(loss, whole)
    if phase.skips_itself:  # and the device works on while the host waits for the guard's numbers
        _update(phase, whole.nan_to_num(0.0, 0.0), sound)
    if not guard.passes(phase, batch, values, warn):
        phase.clear()
        return {}
    if not phase.skips_itself:
        _update(phase, whole, sound)
    if phase.taken is not None:
        phase.taken()
    return {"loss": loss} | values | {f"grad_norm_{phase.name}": whole}


def _update(phase: Phase, norm: Tensor, sound: Tensor) -> None:
    """Clip by the gradients' norm (0: as they are) and take the optimizer's step; one that can leaves it out itself
    where `sound`, on the device, is false."""
    if phase.gradient_clip:
        nn.utils.clip_grads_with_norm_(phase.parameters, phase.gradient_clip, norm)
    if not phase.skips_itself:
        phase.optimizer.step()
        return
    phase.optimizer.found_inf = (~sound).float()  # type: ignore[attr-defined]  # what GradScaler gives to fused ones
    phase.optimizer.step()
    del phase.optimizer.found_inf  # type: ignore[attr-defined]


def step_seed(seed: int, step: int) -> int:
    """Seed of everything random in a step; distinct for distinct (seed, step) up to 2^32 steps."""
    return (seed << 32) + step
