"""Ratio of the L2 norms of two lists of tensors, each list taken as one long vector:

    ratio = min(|a| / (|b| + delta), limit)        |a| = sqrt(sum over all tensors and elements of a^2)

It is the adaptive weight of VQGAN (Esser et al. 2021, eq. 7) with the gradients of the reconstruction loss as `a` and
of the adversarial loss as `b`. On CUDA both norms and the ratio are one launch without a read-back to the host; the
squares are summed in fp64 in a fixed order, so two runs give equal bits. The reference sums in the result's precision.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _extension, _extension_cuda
from ._dispatch import Unfit, register, select
from ._dtypes import check_dtype

MAX_TENSORS_CUDA = 128  # of both lists: their addresses travel in the launch's 4 KiB of parameters


def _norm(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    norms = [torch.linalg.vector_norm(t, dtype=dtype) for t in tensors]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def norm_ratio_reference(a: Sequence[Tensor], b: Sequence[Tensor], delta: float, limit: float) -> Tensor:
    """The ratio in plain PyTorch; see `norm_ratio`."""
    dtype = torch.float64 if a[0].dtype == torch.float64 else torch.float32
    return (_norm(a, dtype) / (_norm(b, dtype) + delta)).clamp(max=limit)


def _cpp_refusal(device: torch.device) -> str | None:
    return _extension.unavailable() if device.type == "cpu" else _extension_cuda.refusal(device)


register("norm_ratio", cpp=_cpp_refusal)


def _check(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    if not a or not b:
        raise ValueError(f"a and b: expected at least one tensor each, got {len(a)} and {len(b)}")
    dtype, device = a[0].dtype, a[0].device
    check_dtype("a and b", dtype)
    for tensor in (*a, *b):
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                "a and b: expected one dtype and one device, got "
                f"{dtype} on {device} and {tensor.dtype} on {tensor.device}"
            )


@torch.no_grad()
def norm_ratio(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *,
    delta: float = 0.0,
    limit: float = float("inf"),
    implementation: str | None = None,
) -> Tensor:
    """min(|a| / (|b| + delta), limit); formula in the module's docstring.

    Args:
        a, b: tensors of any shape, fp32, bf16, fp16 or fp64, all of one dtype and on one device; strides are free.
        delta: added to |b|.
        limit: largest result. NaN stays NaN.
        implementation: "auto", "cpp" or "reference"; None follows `use_implementation` and ALIGNTOK_KERNELS.

    Returns:
        The ratio [], fp32 (fp64 for fp64 tensors), without a gradient or a tangent.

    Raises:
        ValueError: an empty list; unsupported or different dtypes; different devices; `implementation` is unknown or
            cannot run here.
    """
    _check(a, b)
    device = a[0].device.type
    unfit: Unfit = ()
    if device == "cuda" and len(a) + len(b) > MAX_TENSORS_CUDA:
        unfit = (("cpp", f"more than {MAX_TENSORS_CUDA} tensors"),)
    if select("norm_ratio", device, implementation, unfit) == "cpp":
        return torch.ops.aligntok.norm_ratio.default(list(a), list(b), delta, limit)
    return norm_ratio_reference(a, b, delta, limit).detach()  # no_grad leaves the tangents of forward mode
