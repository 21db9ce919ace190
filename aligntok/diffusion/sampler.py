"""Samplers: integrate dz/dt = v(z, t) from noise (t = 1) to data (t = 0).

    grid:      n equal steps of u from 1 to `end`, 0 by default;   t = s u / (1 + (s - 1) u)     (time shift s)
    Euler:     z <- z + (t' - t) v(z, t)
    Heun:      z <- z + (t' - t) (v(z, t) + v(z + (t' - t) v(z, t), t')) / 2
    guidance:  v = v_null + w (v_given - v_null), on all channels or on the first k, for t inside an interval

`steps` counts evaluations of the network per sample: N Euler steps, or N / 2 Heun steps. (LightningDiT's `num_steps`
counts grid points, one more than its evaluations.) Where guidance is off, the null half is not computed. Guidance and
update are one fused operator, `flow_step`, in place on a float32 state. On CUDA the network's calls are replayed from
CUDA graphs (aligntok.diffusion.cuda_graph).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from aligntok.config import SamplerConfig
from aligntok.diffusion.condition import Condition
from aligntok.diffusion.cuda_graph import graphed
from aligntok.diffusion.flow import shift_time
from aligntok.errors import UserError
from aligntok.kernels import flow_step

Velocity = Callable[..., Tensor]  # (z [B, d, h, w], t [B], *condition) -> v like z
Progress = Callable[[int, int], None]  # (steps done, steps in all)


def time_grid(steps: int, shift: float, end: float = 0.0) -> Tensor:
    """Times from 1 to the shifted `end`, [steps + 1], float64, on the host whatever the default device."""
    return shift_time(torch.linspace(1, end, steps + 1, dtype=torch.float64, device="cpu"), shift)


def evaluate(model: Velocity, z: Tensor, t: float, condition: Condition, config: SamplerConfig) -> tuple[Tensor, float]:
    """The network at one time, as `flow_step` takes it: its velocity and the guidance to apply.

    Returns:
        velocity [2B, d, h, w], conditional half first, with the configured guidance inside its interval; else
        [B, d, h, w] and 1.
    """
    low, high = config.guidance_interval
    times = torch.full((z.shape[0],), t, device=z.device, dtype=torch.float32)
    if config.guidance == 1.0 or not low <= t <= high:
        return model(z, times, *condition.given), 1.0
    return model(z.repeat(2, 1, 1, 1), times.repeat(2), *condition.guided), config.guidance


@torch.no_grad()
def integrate(
    model: Velocity,
    noise: Tensor,
    condition: Condition,
    config: SamplerConfig,
    progress: Progress | None = None,
) -> Tensor:
    """Noise z_1 [B, d, h, w] and what is asked for -> latents z_0 [B, d, h, w], float32.

    Raises:
        UserError: what `check_sampler` refuses.
    """
    check_sampler(config, noise.shape[1])
    if config.cuda_graph and noise.is_cuda:
        model = graphed(model)
    solver_steps = config.steps if config.solver == "euler" else config.steps // 2
    grid = time_grid(solver_steps, config.time_shift, config.end).tolist()
    z = noise.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    ahead = torch.empty_like(z) if config.solver == "heun" else None
    channels = config.guidance_channels
    for index, (t, following) in enumerate(itertools.pairwise(grid)):
        dt = following - t
        velocity, guidance = evaluate(model, z, t, condition, config)
        flow_step(z, velocity, dt, guidance=guidance, channels=channels, ahead=ahead)
        if ahead is not None:
            velocity, guidance = evaluate(model, ahead, following, condition, config)
            flow_step(z, velocity, dt / 2, guidance=guidance, channels=channels)
        if progress is not None:
            progress(index + 1, solver_steps)
    return z


def check_sampler(config: SamplerConfig, channels: int) -> None:
    """UserError unless latents of that many channels can be drawn so: solver, steps, guidance, channels, interval."""
    if config.solver not in ("euler", "heun"):
        raise UserError(f"sampler.solver is {config.solver!r}, expected euler or heun")
    if config.steps < 1 or (config.solver == "heun" and config.steps % 2):
        raise UserError(
            f"sampler.steps is {config.steps}: expected at least 1, and an even number for heun (2 evaluations a step)"
        )
    if not 0 <= config.end < 1:
        raise UserError(f"sampler.end is {config.end:g}, expected at least 0, where the data is, and less than 1")
    if not 0 <= config.guidance < inf:
        raise UserError(
            f"sampler.guidance is {config.guidance:g}, expected a finite scale of at least 0: 1 = none, 0 = no label"
        )
    low, high = config.guidance_interval
    if not 0 <= low <= high <= 1:
        raise UserError(
            f"sampler.guidance_interval is [{low:g}, {high:g}], expected [from, to] with 0 <= from <= to <= 1, "
            "the smaller time first"
        )
    if config.guidance_channels is not None and not 0 < config.guidance_channels <= channels:
        raise UserError(
            f"sampler.guidance_channels is {config.guidance_channels}, expected 1..{channels} or null for all"
        )
