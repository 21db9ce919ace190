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
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension
from ._dispatch import register, select

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: bool = True
) -> Tensor:
    """SiLU(GroupNorm(x)) in plain PyTorch; see `group_norm_silu`."""
    # Only the CPU's group_norm takes bf16 x with fp32 parameters.
    mixed = x.dtype != weight.dtype and x.device.type != "cpu"
    u = torch.group_norm(x.to(weight.dtype) if mixed else x, groups, weight, bias, eps)
    y = F.silu(u) if activation else u
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _cpp_refusal(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the C++ implementation is for tensors on the CPU, not on {device.type!r}"
    return _extension.unavailable()


register("group_norm_silu", cpp=_cpp_refusal)


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> None:
    if x.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"x: expected dtype {accepted}, got {x.dtype}")
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
            accepted = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in parameter_dtypes))
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
        implementation: "auto", "cpp" or "reference"; None follows `use_implementation` and ALIGNTOK_KERNELS.

    Returns:
        y [B, C, H, W] in x's dtype and channels-last memory. The gradient of x is channels-last too. The C++
        implementation differentiates once.

    Raises:
        ValueError: a shape, dtype or device does not fit; `groups` does not divide C; `implementation` is
            unknown or cannot run here.
    """
    _check(x, weight, bias, groups, eps)
    if select("group_norm_silu", x.device.type, implementation) == "cpp":
        return torch.ops.aligntok.group_norm_silu.default(x, weight, bias, groups, eps, activation)
    return group_norm_silu_reference(x, weight, bias, groups, eps, activation)
