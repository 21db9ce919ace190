"""Attention backends: short CPU sequences, the choice on every device, refusals with reasons."""

import pytest
import torch
from torch.nn import functional as F

from aligntok.errors import UserError
from aligntok.kernels import use_implementation
from aligntok.models.attention import SHORT_SEQUENCE, Rope, attend, attention, choose
from aligntok.models.lightning_dit import rope_table


@pytest.mark.parametrize("tokens", [16, SHORT_SEQUENCE, SHORT_SEQUENCE + 1])
def test_attention_equals_scaled_dot_product_attention(tokens):
    q, k, v = (torch.randn(2, 3, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend(q, k, v), expected)
    for a, b in zip(
        torch.autograd.grad(attend(q, k, v).sum().sin(), (q, k, v)),
        torch.autograd.grad(expected.sum().sin(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_default_on_a_cuda_device_is_the_fused_kernel():
    assert choose("auto", "cuda", torch.bfloat16, 64) == "fused"
    assert choose("auto", "cpu", torch.float32, 64) == "sdpa"
    assert choose("auto", "cuda", torch.bfloat16, 20) == "sdpa"
    with use_implementation("reference"):
        assert choose("auto", "cuda", torch.bfloat16, 64) == "sdpa"


def test_impossible_requests_list_every_reason():
    with pytest.raises(UserError, match=r"fused: .*flash-attn: .*CUDA device.*xformers: .*sdpa: available"):
        choose("flash-attn", "cpu", torch.bfloat16, 64)
    with pytest.raises(UserError, match="bfloat16 and float16, not float32"):
        choose("xformers", "cuda", torch.float32, 64)
    with pytest.raises(UserError, match="expected one of auto, fused"):
        choose("flash", "cuda", torch.bfloat16, 64)


@pytest.mark.parametrize("norm", [False, True])
def test_fused_and_sdpa_agree(norm):
    torch.manual_seed(0)
    qkv = torch.randn(1, 9, 3, 2, 32, requires_grad=True)
    weights = (torch.rand(32) + 0.5, torch.rand(32) + 0.5) if norm else (None, None)
    tables = rope_table((3, 3), 32, 3)
    rope = Rope(*tables, *(table[:, ::2] for table in tables))
    results = []
    for backend in ("fused", "sdpa"):
        with use_implementation("triton"):
            out = attention(qkv, *weights, rope, 1e-6, backend)
            results.append((out, *torch.autograd.grad(out.sin().sum(), qkv)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
