"""Attention over text and image tokens together, from packed projections, with QK-norm and rotary positions inside.

Two streams, text [B, L, 3, H, D] and image [B, N, 3, H, D], each with its own scales, or one [B, L + N, 3, H, D] that
holds the text first. With q, k and v of both in one row, S = L + N tokens, per batch and head,

    q' = rope(rms_norm(q) * q_weight),  k' = rope(rms_norm(k) * k_weight)          [S, D]
    out = softmax(q' k'^T / sqrt(D) + mask) v                                       [S, D]

mask is -inf for the text tokens behind the length of an image's text, lengths[b] <= j < L, which nobody looks at; they
look themselves, and their results are finite. rms_norm and rope are those of `qknorm_attention`, and so are the
gradients; those of the k and v that nobody looks at are zero. The block is that of FLUX.1 and Stable Diffusion 3 (Esser
et al., arXiv 2403.03206, figure 2), which concatenate, transpose and call a library's attention.

Nothing is concatenated, transposed or copied here: the kernels read both projections where they lie and write results
and gradients where the neighbouring projections read them. They are the long forms of `qknorm_attention`, with a loop
for each stream: k' is prepared in a launch of its own, q' beside it in the backward pass, then dq, then dk and dv. A
block of text that is masked as a whole is passed by. No atomics: a weight's gradient is summed per block, then over
the blocks of its stream in a fixed order.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import _triton
from ._dispatch import first_derivative_only, register, select, transformed
from ._dtypes import check_dtype
from ._joint_attention_kernels import _joint_dkv_kernel, _joint_dq_kernel, _joint_forward_kernel, _joint_prepare_kernel
from ._qknorm_attention_configurations import FLOAT32, SHORT, parts, row_block, tiles
from ._triton import Configuration, configuration, dot_precision, launch, operator, triton, wrap_triton
from .qknorm_attention import EPS, LOG2_E, _prepared, _unfit, _unit_stride

# Rows (MAIN + TAIL up to, by architecture); the first that fits is taken. Chosen as those of `qknorm_attention`.
CONFIGURATIONS: dict[str, list[tuple[int, dict[int, Configuration]]]] = {
    "prepare": [(128, {80: row_block(64, 4), 90: row_block(64, 4)})],
    "forward": [
        (48, {80: tiles(64, 64, 4, 2), 90: tiles(128, 64, 8, 2)}),
        (80, {80: tiles(128, 64, 8, 2), 90: tiles(128, 64, 8, 2)}),
        (128, {80: tiles(128, 32, 8, 2), 90: tiles(128, 64, 8, 2)}),
    ],
    "dq": [
        (80, {80: tiles(128, 32, 8, 2), 90: tiles(128, 64, 8, 2)}),
        (96, {80: tiles(64, 32, 8, 2), 90: tiles(64, 64, 8, 2)}),
        (128, {80: tiles(64, 64, 8, 2), 86: tiles(64, 32, 8, 2), 90: tiles(64, 64, 8, 2)}),
    ],
    "dkv": [
        (48, {80: tiles(32, 64, 8, 2), 90: tiles(32, 64, 4, 2)}),
        (64, {80: tiles(32, 64, 4, 2), 90: tiles(32, 64, 4, 2)}),
        (80, {80: tiles(16, 64, 4, 1), 90: tiles(64, 64, 8, 2)}),
        (96, {80: tiles(16, 64, 8, 2), 90: tiles(32, 64, 8, 2)}),
        (128, {80: tiles(32, 64, 8, 2), 90: tiles(32, 64, 8, 2)}),
    ],
}


# Before Triton 3.8, whose compiler (3.6) spills 8 bytes of a few codes for sm_100: instead of the rows (kernel, MAIN +
# TAIL).
WITH_OLDER: dict[tuple[str, int], dict[int, Configuration]] = {
    ("prepare", 128): {100: row_block(32, 4)},
    ("forward", 80): {100: tiles(128, 32, 8, 2)},
    ("dq", 128): {100: tiles(64, 32, 8, 2)},
    ("dkv", 128): {100: tiles(32, 64, 8)},
}


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


def _configured(kernel: str, stream: Tensor) -> Configuration:
    """The pinned configuration of a kernel for the number type and the width of a stream."""
    width = sum(parts(stream.shape[4]))
    if stream.dtype == torch.float32:
        table = dict.fromkeys(_triton.ARCHITECTURES, FLOAT32["long_forward" if kernel == "forward" else kernel])
    else:
        most, table = next(row for row in CONFIGURATIONS[kernel] if width <= row[0])
        table = table | WITH_OLDER.get((kernel, most), {}) if _triton.RELEASE < (3, 8) else table
    return configuration(f"joint_attention_{kernel}", table, stream.device)


def _pair(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """Arguments text{name} and image{name}; the latter is None where one array holds both."""
    return {f"text{name}": tensors[0], f"image{name}": tensors[1] if len(tensors) == 2 else None}


def _weights(letter: str, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """The scales of q or k of both streams, which may be the same."""
    return {f"text_{letter}": weights[0], f"image_{letter}": weights[-1]}


def _common(
    streams: Sequence[Tensor], cos: Tensor, sin: Tensor, text_tokens: int, eps: float, *others: Tensor
) -> dict[str, Any]:
    """What every kernel takes, by name; `ALIGN` divides the strides of the streams' rows and of the others'."""
    _, _, _, H, D = streams[0].shape
    vector = 16 // streams[0].element_size()
    aligned = all(s % vector == 0 for x in (*streams, *others) for s in x.stride()[:-1])
    MAIN, TAIL = parts(D)
    strides = {
        f"{name}_{axis}": stride
        for name, x in (("text", streams[0]), ("image", streams[-1]))
        for axis, stride in zip("bn3h", x.stride(), strict=False)
    }
    return {
        **_pair("", streams),
        **strides,
        "cos": cos.contiguous(),
        "sin": sin.contiguous(),
        "L": text_tokens,
        "N": sum(stream.shape[1] for stream in streams) - text_tokens,
        "H": H,
        "eps": eps,
        "factor": D**-0.5 * LOG2_E,
        "D": D,
        "MAIN": MAIN,
        "TAIL": TAIL,
        "ALIGN": vector if aligned else 1,
    }


def _over_keys(common: dict[str, Any], lengths: Tensor | None, block: int) -> dict[str, Any]:
    """The mask, and whether the keys of text and image fill blocks of a size."""
    even = {"EVEN_L": lengths is None and common["L"] % block == 0, "EVEN_N": common["N"] % block == 0}
    return {"lengths": lengths, **even}


def _of_blocks(common: dict[str, Any], batch: int, block: int) -> tuple[int, int]:
    """Programs that own a block of the text, and of the image."""
    heads = batch * common["H"]
    return heads * triton.cdiv(common["L"], block), heads * triton.cdiv(common["N"], block)


@operator("joint_attention_triton")
def _forward(
    streams: list[Tensor],
    q_weights: list[Tensor],
    k_weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor | None,
    text_tokens: int,
    eps: float,
) -> list[Tensor]:
    """The results of every stream, and the base-2 logarithms of the softmax's denominators [B * H * S]."""
    streams = [_unit_stride(stream) for stream in streams]
    first, S = streams[0], sum(stream.shape[1] for stream in streams)
    B, _, _, H, D = first.shape
    outs = [first.new_empty((B, stream.shape[1], H * D)) for stream in streams]
    lse = first.new_empty(B * H * S, dtype=torch.float32)
    common = _common(streams, cos, sin, text_tokens, eps) | {"prepared": first.new_empty((1, B * H * S, D))}
    weights = _weights("q", q_weights)
    config = _configured("prepare", first)
    grid = (sum(_of_blocks(common, B, config["BLOCK"])), 1)
    launch(wrap_triton(_joint_prepare_kernel), grid, **common, **weights, **_weights("k", k_weights), **config)
    config = _configured("forward", first)
    results = {**_pair("_out", outs), "lse": lse, "TOGETHER": len(outs) == 1, "PRECISION": dot_precision(first.dtype)}
    inputs = weights | _over_keys(common, lengths, config["BLOCK_K"])
    programs = sum(_of_blocks(common, B, config["BLOCK_Q"]))
    launch(wrap_triton(_joint_forward_kernel), (programs,), **common, **inputs, **results, **config)
    return [*outs, lse]


@operator("joint_attention_triton_backward")
def _backward(
    douts: list[Tensor],
    streams: list[Tensor],
    outs: list[Tensor],
    lse: Tensor,
    q_weights: list[Tensor],
    k_weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor | None,
    text_tokens: int,
    eps: float,
) -> list[Tensor]:
    """The gradient of every stream, then the scales' [streams, D] in fp32: q's, k's."""
    streams, douts = [_unit_stride(stream) for stream in streams], [_unit_stride(dout) for dout in douts]
    first, S = streams[0], sum(stream.shape[1] for stream in streams)
    B, _, _, H, D = first.shape
    dqkv = [first.new_empty(stream.shape) for stream in streams]
    common = _common(streams, cos, sin, text_tokens, eps, *douts) | {"prepared": first.new_empty((2, B * H * S, D))}
    of_q, of_k = _weights("q", q_weights), _weights("k", k_weights)
    config = _configured("prepare", first)
    grid = (sum(_of_blocks(common, B, config["BLOCK"])), 2)
    launch(wrap_triton(_joint_prepare_kernel), grid, **common, **of_q, **of_k, **config)
    dout_strides = {
        f"{name}_dout_{axis}": stride
        for name, x in (("text", douts[0]), ("image", douts[-1]))
        for axis, stride in zip("bn", x.stride(), strict=False)
    }
    upstream = {**_pair("_dout", douts), **dout_strides, "lse": lse, "scale": D**-0.5}
    results = {**_pair("_dqkv", dqkv), "delta": torch.empty_like(lse)}
    common |= {"TOGETHER": len(dqkv) == 1, "PRECISION": dot_precision(first.dtype)}
    config = _configured("dq", first)
    blocks = _of_blocks(common, B, config["BLOCK_Q"])
    dq_weight = first.new_empty((sum(blocks), D), dtype=torch.float32)
    inputs = {**of_q, **_pair("_out", outs), **_over_keys(common, lengths, config["BLOCK_K"]), "dweight": dq_weight}
    launch(wrap_triton(_joint_dq_kernel), (sum(blocks),), **common, **inputs, **upstream, **results, **config)
    dweights = [_summed(dq_weight, blocks, len(streams))]
    config = _configured("dkv", first)
    blocks = _of_blocks(common, B, config["BLOCK_K"])
    dk_weight = first.new_empty((sum(blocks), D), dtype=torch.float32)
    inputs = {**of_k, "lengths": lengths, "dweight": dk_weight}
    launch(wrap_triton(_joint_dkv_kernel), (sum(blocks),), **common, **inputs, **upstream, **results, **config)
    return [*dqkv, *dweights, _summed(dk_weight, blocks, len(streams))]


def _summed(partial: Tensor, blocks: tuple[int, int], streams: int) -> Tensor:
    """The sums [streams, D] of what each block adds to the gradient of a stream's scale."""
    return torch.stack([part.sum(0) for part in (partial.split(blocks) if streams == 2 else [partial])])


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    streams, q_weights, k_weights, cos, sin, lengths, ctx.text_tokens, ctx.eps = inputs
    ctx.streams = len(streams)
    ctx.save_for_backward(*streams, *output, *q_weights, *k_weights, cos, sin, lengths)
    ctx.mark_non_differentiable(output[-1])


def _autograd(ctx: Any, douts: list[Tensor]) -> tuple:
    saved, n = list(ctx.saved_tensors), ctx.streams  # to be asked for once: checkpointing refuses a second time
    streams, outs, lse, saved = saved[:n], saved[n : 2 * n], saved[2 * n], saved[2 * n + 1 :]
    q_weights, k_weights, tables = saved[:n], saved[n : 2 * n], saved[2 * n :]
    arguments = (q_weights, k_weights, *tables, ctx.text_tokens, ctx.eps)
    *dqkv, dq_weights, dk_weights = _backward(douts[:n], streams, outs, lse, *arguments)
    scales = [
        [one.to(weight.dtype) for one, weight in zip(found, weights, strict=True)]
        for found, weights in ((dq_weights, q_weights), (dk_weights, k_weights))
    ]
    return dqkv, *scales, None, None, None, None, None


_forward.register_autograd(first_derivative_only("joint_attention", _autograd), setup_context=_setup_context)
register("joint_attention", triton=_triton.refusal)


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
        implementation: "auto", "triton" or "reference"; None follows `use_implementation` and ALIGNTOK_KERNELS.

    Returns:
        for each stream its results [B, N_i, H * D], contiguous, in the streams' dtype, ready for the output projection.
        The Triton implementation differentiates once, in the streams and the weights. The reference writes the scores
        out up to 256 tokens and inside transforms, and leaves the choice of kernels to PyTorch beyond.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; `implementation` is unknown or cannot run here.
    """
    _check(streams, q_weights, k_weights, cos, sin, text_tokens, lengths)
    first = streams[0]
    unfit = _unfit(first.dtype, first.shape[4])
    if select("joint_attention", first.device.type, implementation, unfit) == "triton":
        streams, q_weights, k_weights = list(streams), list(q_weights), list(k_weights)
        return tuple(_forward(streams, q_weights, k_weights, cos, sin, lengths, text_tokens, eps)[:-1])
    # Written out it has forward mode and second derivatives, which PyTorch's kernels for longer sequences have not
    written_out = transformed() or cos.shape[0] <= SHORT
    with sdpa_kernel(SDPBackend.MATH) if written_out else nullcontext():
        return joint_attention_reference(
            streams, q_weights, k_weights, cos, sin, text_tokens=text_tokens, lengths=lengths, eps=eps
        )


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
