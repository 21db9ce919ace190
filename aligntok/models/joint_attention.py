"""Attention over text and image tokens together, by one of two ways.

    fused   aligntok.kernels.joint_attention: QK-norm, RoPE, mask and attention from the packed projections, no copies
    sdpa    the same in PyTorch: norms and rotation, one sequence of both streams, scaled_dot_product_attention

`auto` takes the Triton kernels in half precision where they run. PyTorch's attention takes a mask only in its slower
kernels, so that no length is known from which on it would win; nobody has timed them side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aligntok.errors import UserError
from aligntok.kernels import device_type, explain, joint_attention

BACKENDS = ("auto", "fused", "sdpa")
_HALF = (torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def choose_joint(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """The implementation that `joint_attention` is asked for: "reference" for sdpa, "triton", or None = its own choice.

    Raises:
        UserError: an unknown name, or `fused` where its kernels cannot run.
    """
    if backend not in BACKENDS:
        raise UserError(f"text.model.attention is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "sdpa":
        return "reference"
    if backend == "auto":
        return None if device == "cpu" or dtype in _HALF else "reference"
    found = explain("joint_attention", device)
    if found.name != "triton":
        reason = found.rejected.get("triton", "the reference was requested")
        raise UserError(f"text.model.attention is 'fused', which cannot run here: {reason}; sdpa: available")
    return "triton"


def attend_jointly(
    streams: Sequence[Tensor],
    q_weights: Sequence[Tensor],
    k_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    text_tokens: int,
    lengths: Tensor | None,
    *,
    eps: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """`joint_attention` by the implementation that `backend` means; arguments and results are the operator's."""
    first = streams[0]
    chosen = choose_joint(backend, device_type(first.device.type), first.dtype)
    return joint_attention(
        tuple(streams),
        tuple(q_weights),
        tuple(k_weights),
        cos,
        sin,
        text_tokens=text_tokens,
        lengths=lengths,
        eps=eps,
        implementation=chosen,
    )
