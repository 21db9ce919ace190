"""Attention backends: short CPU sequences, the choice on every device, refusals with reasons."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from aligntok.errors import UserError
from aligntok.kernels import use_implementation
from aligntok.models import attention as module
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
    assert choose("auto", "cuda", torch.bfloat16, 64, 256) == "fused"
    assert choose("auto", "cpu", torch.float32, 64, 256) == "sdpa"
    assert choose("auto", "cuda", torch.bfloat16, 20, 256) == "sdpa"
    assert choose("auto", "cuda", torch.float32, 64, 256) == "sdpa", "its fp32 tiles are not tuned"
    for requested in ("reference", "cpp"):
        with use_implementation(requested):
            assert choose("auto", "cuda", torch.bfloat16, 64, 256) == "sdpa"


@pytest.fixture
def hopper(monkeypatch):
    """An H100 without and, once its name is put there, with FlashAttention 3."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield
    module._import_error.cache_clear()


class FlashAttention3:
    """Stands in for the package, with the results of its releases: the output, or a tuple with the logsumexp."""

    def __init__(self, name: str, with_logsumexp: bool) -> None:
        self.__name__, self.with_logsumexp = name, with_logsumexp

    def flash_attn_func(self, q, k, v):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return (out, out[..., 0]) if self.with_logsumexp else out


def test_long_sequences_take_flash_attention_3_where_it_is_installed(hopper, monkeypatch):
    assert choose("auto", "cuda", torch.bfloat16, 64, 1024) == "sdpa"
    module._import_error.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn_interface", FlashAttention3("flash_attn_interface", False))
    assert choose("auto", "cuda", torch.bfloat16, 64, 1024) == "flash-attn"
    assert choose("flash-attn", "cuda", torch.bfloat16, 64, 16) == "flash-attn"
    assert choose("auto", "cuda", torch.bfloat16, 64, 256) == "fused"
    assert choose("auto", "cuda", torch.float32, 64, 1024) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert choose("auto", "cuda", torch.bfloat16, 64, 1024) == "sdpa", "FlashAttention 3 is for Hopper"


@pytest.mark.parametrize("with_logsumexp", [False, True])
def test_flash_attention_is_called_as_its_releases_want(with_logsumexp, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", FlashAttention3("flash_attn", with_logsumexp))
    q, k, v = torch.randn(3, 2, 5, 3, 8).unbind(0)
    expected = attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(module._flash_attention(q, k, v), expected)


@pytest.mark.parametrize(("capability", "first"), [((9, 0), "CUDNN_ATTENTION"), ((8, 0), "FLASH_ATTENTION")])
def test_pytorchs_kernels_are_tried_in_the_order_of_their_promise(capability, first, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    before = torch._C._get_sdp_priority_order()
    with module._priority(SimpleNamespace(device=torch.device("cuda"))):
        assert torch._C._get_sdp_priority_order()[0] == int(getattr(SDPBackend, first))
    assert torch._C._get_sdp_priority_order() == before


def test_impossible_requests_list_every_reason():
    with pytest.raises(UserError, match=r"fused: .*flash-attn: .*CUDA device.*xformers: .*sdpa: available"):
        choose("flash-attn", "cpu", torch.bfloat16, 64, 16)
    with pytest.raises(UserError, match="bfloat16 and float16, not float32"):
        choose("xformers", "cuda", torch.float32, 64, 16)
    with pytest.raises(UserError, match="expected one of auto, fused"):
        choose("flash", "cuda", torch.bfloat16, 64, 16)


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
