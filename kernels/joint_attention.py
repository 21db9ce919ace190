"""Attention over text and image tokens together, from packed projections, with QK-norm and rotary positions inside.

Two streams, text [B, L, 3, H, D] and image [B, N, 3, H, D], each with its own scales, or one [B, L + N, 3, H, D] that
holds the text first. With q, k and v of both in one row, S = L + N tokens, per batch and head,

    q' = rope(rms_norm(q) * q_weight),  k' = rope(rms_norm(k) * k_weight)          [S, D]
    out = softmax(q' k'^T / sqrt(D) + mask) v                                       [S, D]

mask is -inf for the text tokens behind the length of an image's text, lengths[b] <= j < L, which nobody looks at; they
look themselves, and their results are finite. rms_norm and rope are those of `qknorm_attention`, and so are the
gradients; those of the k and v that nobody looks at are zero. The block is that of FLUX.1 and Stable Diffusion 3 (Esser
et al., arXiv 2403.03206, figure 2), which concatenate, transpose and call a library's attention.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._dispatch import register, select
from ._dtypes import check_dtype
from .qknorm_attention import EPS, _prepared


def joint_attention_reference(
    streams: Sequence[Tensor],
    q_weights: Sequence[Tensor],
    k_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    text_tokens: int,
    lengths: Tensor | None = None,
    eps: float = EPS,
) -> tuple[Tensor, ...]:
    """The same in plain PyTorch with its scaled_dot_product_attention; see `joint_attention`."""
    tokens = [stream.shape[1] for stream in streams]
    rows: list[list[Tensor]] = [[], [], []]  # q, k, v of every stream, [B, H, N_i, D]
    tables = zip(cos.split(tokens), sin.split(tokens), strict=True)
    for stream, q_weight, k_weight, (own_cos, own_sin) in zip(streams, q_weights, k_weights, tables, strict=True):
        q, k, v = stream.permute(2, 0, 3, 1, 4).unbind(0)
        rows[0].append(_prepared(q, q_weight, own_cos, own_sin, eps))
        rows[1].append(_prepared(k, k_weight, own_cos, own_sin, eps))
        rows[2].append(v)
    q, k, v = (torch.cat(part, dim=2) for part in rows)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(sum(tokens), text_tokens, lengths, cos.device))
    return tuple(one.flatten(2).contiguous() for one in out.transpose(1, 2).split(tokens, dim=1))


def _mask(S: int, text_tokens: int, lengths: Tensor | None, device: torch.device) -> Tensor | None:
    """True for the keys that are looked at, [B, 1, 1, S]; None for all."""
    if lengths is None:
        return None
    position = torch.arange(S, device=device)
    return ((position < lengths[:, None]) | (position >= text_tokens))[:, None, None]


register("joint_attention")


def joint_attention(
    streams: Sequence[Tensor],
    q_weights: Sequence[Tensor],
    k_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    text_tokens: int,
    lengths: Tensor | None = None,
    eps: float = EPS,
    implementation: str | None = None,
) -> tuple[Tensor, ...]:
    """Non-causal attention over text and image with QK-norm and RoPE; formulas in the module's docstring.

    Args:
        streams: packed projections, bf16, fp16, fp32 or fp64: text [B, L, 3, H, D] and image [B, N, 3, H, D], or both
            in one [B, L + N, 3, H, D], text first. Any strides, such as those of a slice of a wider projection (copied
            only where D is not dense).
        q_weights, k_weights: for each stream, [D] scales of the RMSNorm of q and k, all in the streams' dtype or all in
            fp32.
        cos, sin: fp32 rotary tables without gradient, [L + N, D / 2], one column for each pair of channels.
        text_tokens: L, at least 1, with at least one image token behind it.
        lengths: [B] int32 or int64, 0 to L: text tokens from there on are not attended to. None: all are.
        eps: of the RMSNorm.
        implementation: "auto" or "reference"; None follows `use_implementation` and ALIGNTOK_KERNELS.

    Returns:
        for each stream its results [B, N_i, H * D], contiguous, in the streams' dtype, ready for the output projection.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; `implementation` is unknown or cannot run here.
    """
    _check(streams, q_weights, k_weights, cos, sin, text_tokens, lengths)
    select("joint_attention", streams[0].device.type, implementation)
    options = {"text_tokens": text_tokens, "lengths": lengths, "eps": eps}
    with sdpa_kernel(SDPBackend.MATH):  # the others have neither forward mode nor second derivatives
        return joint_attention_reference(streams, q_weights, k_weights, cos, sin, **options)


def _check(
    streams: Sequence[Tensor],
    q_weights: Sequence[Tensor],
    k_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    text_tokens: int,
    lengths: Tensor | None,
) -> None:
    _check_streams(streams, text_tokens)
    first, S = streams[0], sum(stream.shape[1] for stream in streams)
    B, D = first.shape[0], first.shape[4]
    kind = q_weights[0].dtype if len(q_weights) else first.dtype
    for name, weights in (("q_weights", q_weights), ("k_weights", k_weights)):
        if len(weights) != len(streams):
            raise ValueError(f"{name}: expected one for each of {len(streams)} streams, got {len(weights)}")
        for weight in weights:
            if weight.shape != (D,) or weight.dtype != kind or kind not in (first.dtype, torch.float32):
                given = f"{list(weight.shape)} in {weight.dtype}"
                raise ValueError(
                    f"{name}: expected shape [{D}], all in {first.dtype} or all in torch.float32, got {given}"
                )
    for name, table in (("cos", cos), ("sin", sin)):
        if D % 2 or table.shape != (S, D // 2) or table.requires_grad:
            raise ValueError(f"{name}: expected a table [{S}, {D // 2}] without gradient, got {list(table.shape)}")
    if lengths is not None and (lengths.shape != (B,) or lengths.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"lengths: expected shape [{B}] in int32 or int64, got {list(lengths.shape)} in {lengths.dtype}"
        )
    others = [*streams, *q_weights, *k_weights, cos, sin, *([] if lengths is None else [lengths])]
    if any(one.device != first.device for one in others):
        raise ValueError(f"expected everything on one device, got {sorted({str(one.device) for one in others})}")


def _check_streams(streams: Sequence[Tensor], text_tokens: int) -> None:
    if len(streams) not in (1, 2):
        raise ValueError(f"streams: expected text and image, or one of both, got {len(streams)} streams")
    first = streams[0]
    check_dtype("streams", first.dtype)
    for stream in streams:
        if stream.ndim != 5 or stream.shape[2] != 3 or stream.numel() == 0:
            raise ValueError(f"streams: expected shape [B, N, 3, H, D] without a zero, got {list(stream.shape)}")
        if stream.dtype != first.dtype or (stream.shape[0], *stream.shape[2:]) != (first.shape[0], *first.shape[2:]):
            raise ValueError(
                f"streams: expected one dtype and shapes that differ in the tokens alone, got {list(stream.shape)} "
                f"in {stream.dtype} beside {list(first.shape)} in {first.dtype}"
            )
    if len(streams) == 2 and text_tokens != first.shape[1]:
        raise ValueError(f"text_tokens: expected {first.shape[1]}, the tokens of the first stream, got {text_tokens}")
    if len(streams) == 1 and not 0 < text_tokens < first.shape[1]:
        raise ValueError(f"text_tokens: expected 1 to {first.shape[1] - 1} of {first.shape[1]}, got {text_tokens}")
