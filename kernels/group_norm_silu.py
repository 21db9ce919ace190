"""GroupNorm followed by SiLU, the pair in front of every convolution of the decoder.

For x [B, C, H, W], weight [C] and bias [C], with the C channels divided into `groups` groups of neighbours,

    xhat = (x - mean) / sqrt(var + eps)     mean and (biased) var over the C/groups * H * W values of a group
    u    = weight * xhat + bias
    y    = u * sigmoid(u), or u without the activation

(Wu and He 2018, arXiv 1803.08494; Elfwing et al. 2017, arXiv 1702.03118.) y has x's dtype and lies in
channels-last memory. Statistics and sums are fp32, fp64 for fp64 x.

The C++ implementation works on channels-last memory; x in another layout is first copied into it. It reads x
once for the statistics (sums around a row of the data in fp32, joined in fp64, so that a mean far larger than
the deviation does no harm) and once for the result. It saves x and the statistics [B, groups]; the backward
pass computes the rest again: one pass for the sums per image and channel, one for dx. All sums run in fixed
order: the same bits in every run and for any number of threads.

The Triton implementation works on channels-last memory too. Where the H * W * C/groups values of a group fit one
program, it reads x once and writes y, and backward reads x and dy once and writes dx. Where they do not, it reads x
twice forward (statistics, result), and x and dy twice backward (sums, dx). It saves the same and keeps no other
intermediate result than sums per strip of pixels, added up in fixed order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension, _triton
from ._dispatch import first_derivative_only, register, select, transformed
from ._dtypes import check_dtype, short
from ._group_norm_silu_kernels import (
    apply_kernel,
    dx_kernel,
    merge_kernel,
    statistics_kernel,
    sums_kernel,
    terms_kernel,
    whole_backward_kernel,
    whole_kernel,
)
from ._triton import configuration, launch, operator, triton, wrap_triton

# A program holds a group of up to LARGEST values, here 16 channels of 32x32 pixels; four times as many exceed the
# register file. WARP values per warp are 16 a thread; backward, with x and dy to hold, spills with 32 warps: 16.
WHOLE = {arch: {"LARGEST": 16384, "WARP": 512, "WARPS": 32, "num_stages": 1} for arch in _triton.ARCHITECTURES}
WHOLE_BACKWARD = {arch: config | {"WARPS": 16} for arch, config in WHOLE.items()}
# Larger maps. 64 channels in bf16 are one 128-byte cache line. The kernels that sum over a strip end with shuffles
# between lanes, as many instructions as for tens of values a thread: 8 tiles of 16 values share them. A strip of 256
# pixels leaves 8 bytes of sums per channel, beside 512 of x in bf16.
STRIPS = {
    arch: {"ROWS": 32, "CHANNELS": 64, "STEPS": 8, "num_warps": 4, "num_stages": 1} for arch in _triton.ARCHITECTURES
}
# The kernels that write a result take one tile of 32 values a thread: with fewer, loading statistics and parameters
# weighs more; with twice as many, dx needs 168 registers.
TILES = {arch: {"ROWS": 64, "CHANNELS": 64, "num_warps": 4, "num_stages": 1} for arch in _triton.ARCHITECTURES}
# Sums of strips that one program adds up at a time: all 256 strips of 256x256 pixels for 8 channels.
# 100: half of that, which Triton 3.9 does not spill
PARTIALS = {
    arch: {"BLOCK": 1024 if arch == 100 else 2048, "num_warps": 4, "num_stages": 1} for arch in _triton.ARCHITECTURES
}


def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: bool = True
) -> Tensor:
    """SiLU(GroupNorm(x)) in plain PyTorch; see `group_norm_silu`."""
    # Only the CPU's group_norm takes bf16 x with fp32 parameters.
    mixed = x.dtype != weight.dtype and x.device.type != "cpu"
    u = torch.group_norm(x.to(weight.dtype) if mixed else x, groups, weight, bias, eps)
    y = F.silu(u) if activation else u
    y = y.to(x.dtype)
    return y if transformed() else y.contiguous(memory_format=torch.channels_last)  # vmap refuses memory formats


def _whole(kernel: str, table: dict, x: Tensor, groups: int) -> dict | None:
    """ROWS, LANES and options for a program that holds a group of x, or None if the group is too large."""
    config = configuration(kernel, table, x.device)
    largest, per_warp, most = (config.pop(name) for name in ("LARGEST", "WARP", "WARPS"))
    lanes, pixels = triton.next_power_of_2(int(x.shape[1] // groups)), x.shape[2] * x.shape[3]
    if pixels * lanes > largest:
        return None
    rows = triton.next_power_of_2(int(pixels))
    return {"ROWS": rows, "LANES": lanes, "num_warps": min(most, max(1, rows * lanes // per_warp)), **config}


def _tiles(kernel: str, table: dict, x: Tensor) -> tuple[dict, int, int]:
    """ROWS, CHANNELS and options for tiles of x; how many strips an image has; how many programs all images take.

    Where x has fewer channels than CHANNELS the tile gets more rows instead.
    """
    B, C, P = x.shape[0], int(x.shape[1]), x.shape[2] * x.shape[3]
    config = configuration(kernel, table, x.device)
    channels = min(config["CHANNELS"], triton.next_power_of_2(C))
    config |= {"ROWS": config["ROWS"] * config["CHANNELS"] // channels, "CHANNELS": channels}
    strips = triton.cdiv(P, config["ROWS"] * config.get("STEPS", 1))
    return config, strips, B * strips * triton.cdiv(C, channels)


@operator("group_norm_silu_triton")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and 1 / deviation [B, groups] in fp32."""
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = weight.contiguous(), bias.contiguous()
    B, C, P = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean = torch.empty(B, groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    switches = {"WIDTH": C // groups, "ACTIVATION": activation}
    whole = _whole("group_norm_silu_whole", WHOLE, x, groups)
    if whole is not None:
        arguments = (x, weight, bias, y, mean, rstd, P, C, eps)
        launch(wrap_triton(whole_kernel), (B * groups,), *arguments, **switches, **whole)
        return y, mean, rstd
    config, strips, programs = _tiles("group_norm_silu_strips", STRIPS, x)
    partials = torch.empty(B * strips, 2, C, dtype=torch.float32, device=x.device)
    launch(wrap_triton(statistics_kernel), (programs,), x, partials, P, C, **config)
    sizes = {"WIDTH": C // groups, "PIXELS": config["ROWS"] * config["STEPS"]}
    config = configuration("group_norm_silu_partials", PARTIALS, x.device)
    launch(wrap_triton(merge_kernel), (B * groups,), partials, mean, rstd, P, C, eps, **sizes, **config)
    config, _, programs = _tiles("group_norm_silu_tiles", TILES, x)
    launch(wrap_triton(apply_kernel), (programs,), x, weight, bias, mean, rstd, y, P, C, **switches, **config)
    return y, mean, rstd


@operator("group_norm_silu_triton_backward")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias."""
    x, dy = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, dy))
    weight, bias = weight.contiguous(), bias.contiguous()
    B, C, P, groups = x.shape[0], x.shape[1], x.shape[2] * x.shape[3], mean.shape[1]
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    sums = torch.empty(B, 2, C, dtype=torch.float32, device=x.device)
    inputs = (x, dy, weight, bias, mean, rstd)
    switches = {"WIDTH": C // groups, "ACTIVATION": activation}
    whole = _whole("group_norm_silu_whole_backward", WHOLE_BACKWARD, x, groups)
    if whole is not None:
        launch(wrap_triton(whole_backward_kernel), (B * groups,), *inputs, dx, sums, P, C, **switches, **whole)
    else:
        strip, strips, programs = _tiles("group_norm_silu_strips", STRIPS, x)
        partials = torch.empty(B * strips, 2, C, dtype=torch.float32, device=x.device)
        terms = torch.empty(B, groups, 2, dtype=torch.float32, device=x.device)
        launch(wrap_triton(sums_kernel), (programs,), *inputs, partials, P, C, **switches, **strip)
        config = configuration("group_norm_silu_partials", PARTIALS, x.device)
        lanes = min(triton.next_power_of_2(int(C // groups)), config["BLOCK"])
        config |= {"PIXELS": strip["ROWS"] * strip["STEPS"], "LANES": lanes, "BLOCK": config["BLOCK"] // lanes}
        arguments = (partials, weight, sums, terms, P, C)
        launch(wrap_triton(terms_kernel), (B * groups,), *arguments, WIDTH=C // groups, **config)
        config, _, programs = _tiles("group_norm_silu_tiles", TILES, x)
        launch(wrap_triton(dx_kernel), (programs,), *inputs, terms, dx, P, C, **switches, **config)
    dbias, dweight = sums.sum(0).unbind()
    return dx, dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, ctx.activation = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _gradients(ctx, dy: Tensor, *_: Tensor) -> tuple:
    return *_backward(dy, *ctx.saved_tensors, ctx.activation), None, None, None


_forward.register_autograd(first_derivative_only("group_norm_silu", _gradients), setup_context=_save)
register("group_norm_silu", triton=_triton.refusal, cpp=_extension.cpu_refusal)


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> None:
    check_dtype("x", x.dtype)
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x: expected shape [B, C, H, W] without a zero, got {tuple(x.shape)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: expected a divisor of the {x.shape[1]} channels, got {groups}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    parameter_dtypes = {x.dtype} if x.dtype == torch.float64 else {x.dtype, torch.float32}
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[1:2]:
            raise ValueError(f"{name}: expected shape [{x.shape[1]}], got {list(parameter.shape)}")
        if parameter.dtype not in parameter_dtypes or parameter.dtype != weight.dtype:
            accepted = " or ".join(sorted(map(short, parameter_dtypes)))
            raise ValueError(
                f"{name}: expected dtype {accepted} for {x.dtype} x, the same for weight and bias, "
                f"got {parameter.dtype}"
            )
        if parameter.device != x.device:
            raise ValueError(f"{name}: expected on {x.device} like x, got {parameter.device}")


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    activation: bool = True,
    *,
    implementation: str | None = None,
) -> Tensor:
    """SiLU(GroupNorm(x)), or GroupNorm(x); formulas in the module's docstring.

    Args:
        x: [B, C, H, W] without empty dimensions, bf16, fp16, fp32 or fp64, best in channels-last memory.
        weight: [C], fp32 or x's dtype; fp64 if x is. Under autocast it stays fp32 beside bf16 x.
        bias: [C], as `weight`.
        groups: divides C.
        eps: >= 0, added to the variance.
        activation: False leaves SiLU out.
        implementation: "auto", "triton", "cpp" or "reference"; None follows `use_implementation` and
            ALIGNTOK_KERNELS.

    Returns:
        y [B, C, H, W] in x's dtype and channels-last memory. The gradient of x is channels-last too. The C++ and the
        Triton implementation differentiate once.

    Raises:
        ValueError: a shape, dtype or device does not fit; `groups` does not divide C; `implementation` is
            unknown or cannot run here.
    """
    _check(x, weight, bias, groups, eps)
    unfit = (("triton", "fp64 is for the reference"),) if x.dtype == torch.float64 else ()
    selected = select("group_norm_silu", x.device.type, implementation, unfit)
    if selected == "triton":
        x = x.contiguous(memory_format=torch.channels_last)
        return _forward(x, weight, bias, groups, float(eps), activation)[0]
    if selected == "cpp":
        return torch.ops.aligntok.group_norm_silu.default(x, weight, bias, groups, eps, activation)
    return group_norm_silu_reference(x, weight, bias, groups, eps, activation)
