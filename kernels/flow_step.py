"""One solver step of a flow, with classifier-free guidance, in place.

For a state z [B, d, h, w] in fp32 and the network's velocity [2B, d, h, w], labelled half first, or [B, d, h, w],

    v = null + w (labelled - null)        on all channels or the first k, else v = labelled
    Euler            z <- z + dt v
    Heun, first      ahead <- z + dt v,   z <- z + dt/2 v
    Heun, second     z <- z + dt/2 v(ahead)             which is an Euler step of dt/2

(Ho & Salimans 2022, arXiv 2207.12598, for guidance.) Because Heun's first evaluation adds its half at once, neither the
old state nor the first velocity is kept. Arithmetic is fp32. A step reads each half of the velocity once (the null half
only where it counts), and reads and writes z once.
"""

import torch
from torch import Tensor

from . import _latents, _triton
from ._dispatch import register, select
from ._latents import planes, strides, tiling
from ._triton import configuration, launch, operator, tl, triton, wrap_triton

# 2048 numbers a program: 16 a thread of z and of each half.
CONFIGURATIONS = _latents.configurations(2048)


def flow_step_reference(
    z: Tensor,
    velocity: Tensor,
    dt: float,
    guidance: float = 1.0,
    channels: int | None = None,
    ahead: Tensor | None = None,
) -> None:
    """The step in plain PyTorch; see `flow_step`."""
    velocity = velocity.to(z.dtype)
    if velocity.shape[0] != z.shape[0]:
        labelled, null = velocity.chunk(2)
        velocity = null + guidance * (labelled - null)
        if channels is not None:
            velocity = torch.cat([velocity[:, :channels], labelled[:, channels:]], dim=1)
    if ahead is not None:
        ahead.copy_(torch.add(z, velocity, alpha=dt))
        dt = dt / 2
    z.add_(velocity, alpha=dt)


@triton.jit
def _kernel(
    z, velocity, ahead, dt, guidance, guided_channels, d, P,
    z_image, z_channel, v_image, v_channel, v_pixel, to_null,
    GUIDED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(P, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    inside = (pixel < P) & (channel < d)
    source = velocity + image * v_image + channel * v_channel + pixel * v_pixel
    v = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_C]
    if GUIDED:
        guided = channel < guided_channels
        null = tl.load(source + to_null, mask=inside & guided, other=0.0).to(tl.float32)
        v = tl.where(guided, null + guidance * (v - null), v)
    place = image * z_image + channel * z_channel + pixel
    state = tl.load(z + place, mask=inside, other=0.0)
    if ahead is not None:
        tl.store(ahead + place, state + dt * v, mask=inside)
        dt = 0.5 * dt
    tl.store(z + place, state + dt * v, mask=inside)


@operator("flow_step_triton", mutates_args=("z", "ahead"))
def _step(z: Tensor, velocity: Tensor, dt: float, guidance: float, channels: int, ahead: Tensor | None) -> None:
    state, v = planes(z), planes(velocity)
    grid, meta = tiling(configuration("flow_step", CONFIGURATIONS, z.device), state)
    numbers = (dt, guidance, channels, *state.shape[1:], *state.stride()[:2], *strides(v), len(state) * v.stride(0))
    launch(wrap_triton(_kernel), grid, state, v, ahead, *numbers, GUIDED=len(v) != len(state), **meta)


register("flow_step", triton=_triton.refusal)


def _check(z: Tensor, velocity: Tensor, guidance: float, channels: int | None, ahead: Tensor | None) -> None:
    _latents.check("z", z, dtypes=(torch.float32, torch.float64))
    B, *rest = z.shape
    _latents.check("velocity", velocity)
    if velocity.shape not in ((B, *rest), (2 * B, *rest)):
        raise ValueError(f"velocity: expected {[B, *rest]} or {[2 * B, *rest]}, got {list(velocity.shape)}")
    if velocity.shape[0] == B and guidance != 1.0:
        raise ValueError(f"guidance {guidance} needs the null half: expected velocity {[2 * B, *rest]}")
    if channels is not None and not 0 < channels <= z.shape[1]:
        raise ValueError(f"channels: expected 1..{z.shape[1]} or None for all, got {channels}")
    if ahead is not None and (ahead.shape != z.shape or ahead.dtype != z.dtype or ahead.stride() != z.stride()):
        raise ValueError(f"ahead: expected a tensor like z, {list(z.shape)} {z.dtype}; use torch.empty_like(z)")
    others = [velocity] if ahead is None else [velocity, ahead]
    if any(x.device != z.device for x in others):
        raise ValueError(f"z, velocity and ahead: expected one device, {z.device}")


def flow_step(
    z: Tensor,
    velocity: Tensor,
    dt: float,
    *,
    guidance: float = 1.0,
    channels: int | None = None,
    ahead: Tensor | None = None,
    implementation: str | None = None,
) -> None:
    """Update z in place by one step; formulas in the module's docstring.

    Args:
        z: state [B, d, h, w], fp32 (fp64 for the reference), overwritten. Triton wants it contiguous.
        velocity: [B, d, h, w], or [2B, d, h, w] with the labelled half first; bf16, fp16, fp32 or fp64; strides are
            free, channels-last is read as it is.
        dt: difference of times, negative towards data in the paper's direction.
        guidance: w; anything but 1 needs the null half.
        channels: guide the first `channels` only; None: all.
        ahead: a tensor like z, overwritten with z + dt v; z then takes half a step (Heun's first evaluation).
        implementation: "auto", "triton" or "reference"; None follows `use_implementation` and ALIGNTOK_KERNELS.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; guidance without a null half; channels out of
            range; `implementation` is unknown or cannot run here.
    """
    _check(z, velocity, guidance, channels, ahead)
    unfit = _latents.unfit(z.shape[1], (z, velocity), (z, velocity))
    if not z.is_contiguous():
        unfit = (("triton", "z is not contiguous"),)
    if select("flow_step", z.device.type, implementation, unfit) == "triton":
        _step(z, velocity, dt, guidance, z.shape[1] if channels is None else channels, ahead)
    else:
        flow_step_reference(z, velocity, dt, guidance, channels, ahead)
