"""Self-attention from a packed qkv projection, by one of several backends.

    fused       aligntok.kernels.qknorm_attention: QK-norm, RoPE and attention in one kernel, from qkv to [B, N, H*D]
    flash-attn  the flash-attn package: FlashAttention 3 on Hopper where it is installed, else 2  } behind qknorm_rope,
    xformers    xformers' compiled attention                                                     } which norms and
    sdpa        PyTorch: cuDNN's first on Hopper and newer, FlashAttention 2 first on others     } rotates q and k

`auto` takes `fused` where its Triton kernels run in half precision and the sequence is at most FUSED_TOKENS long;
beyond it FlashAttention 3 where that is installed; `sdpa` elsewhere. Any other request is met or refused with the
reasons; nothing else runs in its place.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from aligntok.errors import UserError
from aligntok.kernels import device_type, explain, qknorm_attention, qknorm_rope, select, transformed
from aligntok.kernels._qknorm_attention_configurations import HEAD_WIDTHS

BACKENDS = ("auto", "fused", "flash-attn", "xformers", "sdpa")
# Tokens up to which PyTorch's CPU flash attention is slower than three plain calls (docs/decisions.md)
SHORT_SEQUENCE = 256
# Tokens up to which `auto` takes `fused`: one program holds a whole head, and the backward pass needs five matrix
# products, as FlashAttention's. Beyond, it takes seven, without the TMA copies and specialised warps that cuDNN and
# FlashAttention 3 have. A reason and not a measurement: no GPU has timed them side by side.
FUSED_TOKENS = 256
HOPPER = (9, 0)
_HALF = (torch.bfloat16, torch.float16)


class Rope(NamedTuple):
    """Tables of rotary positions: every value twice, and once for each pair of channels."""

    cos: Tensor  # [N, D]
    sin: Tensor
    pair_cos: Tensor  # [N, D / 2]: what `fused` reads in 16-byte pieces
    pair_sin: Tensor


@cache
def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a compiled package raises is the reason to print
        return f"{module} cannot be imported ({type(error).__name__}: {error})"
    return None


def _flash_module(device: str) -> str:
    """The package that `flash-attn` means: FlashAttention 3, which is for Hopper, or 2."""
    newest = device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() >= HOPPER
    return "flash_attn_interface" if newest and _import_error("flash_attn_interface") is None else "flash_attn"


def refusal(backend: str, device: str, dtype: torch.dtype, head_width: int) -> str | None:
    """Why a backend cannot run for heads of a width and dtype on a device type, or None."""
    if backend == "fused":
        found = explain("qknorm_attention", device)
        if found.name != "triton":
            return found.rejected.get("triton", "the reference was requested")
        widths = ", ".join(map(str, HEAD_WIDTHS))
        return None if head_width in HEAD_WIDTHS else f"heads of {head_width} channels; there are kernels for {widths}"
    if backend == "sdpa":
        return None
    if transformed():
        return f"{backend} has no forward-mode derivative and no rule for the transforms of torch.func"
    module = _flash_module(device) if backend == "flash-attn" else "xformers.ops"
    if device != "cuda":
        return f"{backend} needs a CUDA device, the tensors are on {device!r}"
    if dtype not in _HALF:
        return f"{backend} takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return _import_error(module)


@torch.compiler.assume_constant_result
def choose(backend: str, device: str, dtype: torch.dtype, head_width: int, tokens: int) -> str:
    """The backend that runs for a request over sequences of `tokens`, on a device type such as "cuda".

    Raises:
        UserError: an unknown name, or a request that cannot be met; the message lists every backend's reason.
    """
    if backend not in BACKENDS:
        raise UserError(f"model.attention is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return _automatic(device, dtype, head_width, tokens)
    if refusal(backend, device, dtype, head_width):
        reasons = ((name, refusal(name, device, dtype, head_width)) for name in BACKENDS[1:])
        raise UserError(
            f"model.attention is {backend!r}, which cannot run here: "
            + "; ".join(f"{name}: {reason or 'available'}" for name, reason in reasons)
        )
    return backend


def _automatic(device: str, dtype: torch.dtype, head_width: int, tokens: int) -> str:
    try:
        triton = select("qknorm_attention", device) == "triton"
    except ValueError:  # another implementation was requested for everything, and this operator has no such
        triton = False
    fast = device == "cpu" or dtype in _HALF  # its fp32 tiles are small; on a CPU it runs only where it is asked for
    if triton and fast and head_width in HEAD_WIDTHS and tokens <= FUSED_TOKENS:
        return "fused"
    longer = tokens > FUSED_TOKENS and _flash_module(device) == "flash_attn_interface"
    return "flash-attn" if longer and not refusal("flash-attn", device, dtype, head_width) else "sdpa"


def _priority(q: Tensor) -> AbstractContextManager:
    """PyTorch's attention kernels in the order of their promise on q's GPU; on other devices its own order."""
    if q.device.type != "cuda":
        return nullcontext()
    first, second = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    if torch.cuda.get_device_capability(q.device) >= HOPPER:
        first, second = second, first
    return sdpa_kernel([first, second, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


def sequence_is_short(device: str, tokens: int) -> bool:
    """Whether attention over so many tokens is written out as plain products instead of PyTorch's fused one."""
    return device_type(device) == "cpu" and tokens <= SHORT_SEQUENCE


def written_out(device: str, tokens: int) -> bool:
    """As `sequence_is_short`, and inside forward mode and torch.func, of which the fused attention knows nothing."""
    return sequence_is_short(device, tokens) or transformed()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q, k, v [B, H, N, D], by PyTorch's fused attention or `written_out`."""
    if written_out(q.device.type, q.shape[-2]):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, N, N]
        return scores.softmax(dim=-1).to(v.dtype) @ v
    with _priority(q):
        return F.scaled_dot_product_attention(q, k, v)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q, k, v [B, N, H, D], by the flash-attn package."""
    found = importlib.import_module(_flash_module(q.device.type)).flash_attn_func(q, k, v)
    return found[0] if isinstance(found, tuple) else found  # FlashAttention 3's first releases add the logsumexp


def attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Rope,
    eps: float,
    backend: str = "auto",
) -> Tensor:
    """Multi-head self-attention with optional QK-norm and rotary positions.

    Args:
        qkv: packed projection [B, N, 3, H, D].
        q_weight: learned scales [D] of q's RMSNorm, or None for no norm.
        k_weight: those of k; both or none.
        rope: tables of cosines and sines.
        eps: of the norms.
        backend: one of BACKENDS.

    Returns:
        [B, N, H*D] in qkv's dtype.

    Raises:
        UserError: the backend is unknown or cannot run here.
    """
    chosen = choose(backend, device_type(qkv.device.type), qkv.dtype, qkv.shape[-1], qkv.shape[1])
    if chosen == "fused":
        return qknorm_attention(qkv, q_weight, k_weight, rope.pair_cos, rope.pair_sin, eps=eps)
    q, k, v = qknorm_rope(qkv, q_weight, k_weight, rope.cos, rope.sin, eps=eps)  # [B, N, H, D] each
    if chosen == "flash-attn":
        return _flash_attention(q, k, v).flatten(2)
    if chosen == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v).flatten(2)
    return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)
