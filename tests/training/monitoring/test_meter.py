"""Our formulas for FLOPs, as PyTorch's counter takes them on real tensors and as ours does on the meta device."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from aligntok.kernels import adapter_projection, assume_device, joint_attention, qknorm_attention
from aligntok.training.monitoring.meter import Flops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def counted(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def counted_on_meta(work) -> int:
    with torch.device("meta"), assume_device("cuda"), Flops() as counter:
        work()
    return counter.flops


@pytest.mark.parametrize("tokens", [40, 300])
def test_attention_is_counted_whoever_computes_it(tokens):
    shape = (1, 2, tokens, 16)
    q = torch.randn(shape, device=DEVICE, requires_grad=True)
    found = counted(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert found in (
        sdpa_flop_count(*[shape] * 3) + sdpa_backward_flop_count(*[shape] * 4),
        3 * sdpa_flop_count(*[shape] * 3),  # where PyTorch writes it out
    )


def test_our_attention_counts_as_pytorchs():
    qkv = torch.randn(1, 20, 3, 2, 64, device=DEVICE, requires_grad=True)
    shape = (1, 2, 20, 64)
    forward, backward = sdpa_flop_count(*[shape] * 3), sdpa_backward_flop_count(*[shape] * 4)
    assert counted(lambda: qknorm_attention(qkv, implementation="triton").sum().backward()) == forward + backward
    assert counted(lambda: qknorm_attention(qkv, implementation="reference").detach()) == forward


def test_on_meta_the_backward_pass_of_attention_is_what_the_mathematics_needs():
    """Four products; the fifth computes the scores again."""
    qkv = torch.empty(1, 20, 3, 2, 64, device="meta", requires_grad=True)
    found = counted_on_meta(lambda: qknorm_attention(qkv).sum().backward())
    assert found == 3 * sdpa_flop_count(*[(1, 2, 20, 64)] * 3)


def test_joint_attention_counts_as_pytorchs_over_both_streams():
    def streams(device):
        return tuple(torch.zeros(1, n, 3, 2, 64, device=device, requires_grad=True) for n in (8, 12))

    def run(device):
        weights, tables = [torch.ones(64, device=device)] * 2, torch.zeros(20, 32, device=device)
        outs = joint_attention(streams(device), weights, weights, tables, tables, text_tokens=8)
        sum(out.sum() for out in outs).backward()

    assert counted_on_meta(lambda: run("meta")) == 3 * sdpa_flop_count(*[(1, 2, 20, 64)] * 3)


@pytest.mark.parametrize("input_gradient", [True, False])
def test_our_projection_counts_as_the_reference(input_gradient):
    p = torch.randn(1, 20, 32, device=DEVICE, requires_grad=input_gradient)
    weight, bias = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((16, 32), (16,)))

    def work(*arguments, name):
        return lambda: adapter_projection(*arguments, "gelu", implementation=name).sum().backward()

    found = [counted(work(p, weight, bias, name=name)) for name in ("triton", "reference")]
    on_meta = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in (p, weight, bias)]
    found += [counted_on_meta(work(*on_meta, name=name)) for name in ("triton", "reference")]
    assert found == [2 * 20 * 32 * 16 * (3 if input_gradient else 2)] * 4
