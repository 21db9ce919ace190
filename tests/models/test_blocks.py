"""Blocks that are recomputed or compiled give what plain ones give."""

import collections
import copy
from functools import partial

import pytest
import torch
from helpers import tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from aligntok.config import LightningDiTConfig
from aligntok.errors import UserError
from aligntok.kernels import use_implementation
from aligntok.models.blocks import prepare, restore
from aligntok.models.encoder import Encoder
from aligntok.models.lightning_dit import LightningDiT


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def generator(depth: int = 2) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    config = LightningDiTConfig(size="custom", depth=depth, width=32, heads=2, classes=3, qk_norm=True)
    model = LightningDiT(config, 4, (3, 3))
    for module in (*model.blocks, model.final):  # gates of zero would keep most weights from the loss
        nn.init.normal_(module.modulation.weight, std=0.2)
    nn.init.normal_(model.final.linear.weight, std=0.2)
    return model, [torch.randn(2, 4, 3, 3), torch.rand(2), torch.tensor([0, 3])]


def encoder() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Encoder(tiny_config().encoder), [torch.rand(2, 3, 32, 32)]


def run(model: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and all gradients."""
    output = model(*inputs)
    return [output, *torch.autograd.grad(output.sin().sum(), [p for p in model.parameters() if p.requires_grad])]


def kept_bytes(model: nn.Module, inputs: list[torch.Tensor]) -> int:
    """How much the forward pass keeps for the backward pass, weights apart."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(*inputs)
    assert output.requires_grad  # until here the graph holds what it keeps
    return sum(kept.values()) - sum(kept.get(p.data_ptr(), 0) for p in model.parameters())


@pytest.mark.parametrize("make", [generator, encoder])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_blocks_have_the_gradients_of_plain_ones_to_the_bit(make, mode):
    model, inputs = make()
    expected = run(model, inputs)
    prepare(model.blocks, mode, compile=False)
    assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), expected, strict=True))


@pytest.mark.parametrize("make", [generator, encoder])
def test_recomputed_blocks_keep_less(make):
    model, inputs = make()
    everything = kept_bytes(model, inputs)
    prepare(model.blocks, "full", compile=False)
    assert kept_bytes(model, inputs) < 0.5 * everything
    restore(model.blocks)
    assert kept_bytes(model, inputs) == everything


class Counter(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_selective_recomputation_keeps_linear_layers_and_repeats_the_rest():
    counts = {}
    for mode in ("none", "selective", "full"):
        model, inputs = generator()
        prepare(model.blocks, mode, compile=False)
        with Counter() as counter:
            run(model, inputs)
        counts[mode] = [counter.counts[name] for name in ("aten::addmm", "aligntok::swiglu", "aligntok::adaln")]
    linears, activations, norms = counts["none"]
    assert min(counts["none"]) > 0
    assert counts["selective"] == [linears, 2 * activations, norms + 2 * 2]  # two in a block; the final layer's not
    assert counts["full"] == [
        linears + 2 * 4,
        2 * activations,
        norms + 2 * 2,
    ]  # the last one is not needed


def test_the_fused_operators_are_recomputed():
    model, (z, t, labels) = generator(depth=1)
    inputs = [z[:1, :, :2, :1], t[:1], labels[:1]]
    with use_implementation("triton"):
        expected = run(model, inputs)
        for mode in ("selective", "full"):
            prepare(model.blocks, mode, compile=False)
            found = run(model, inputs)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            restore(model.blocks)


@pytest.mark.parametrize("make", [generator, encoder])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled_blocks_give_what_plain_ones_give(make, mode, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, inputs = make()
    expected = run(model, inputs)
    prepare(model.blocks, mode, compile=True)
    found = run(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_block_that_cannot_be_compiled_is_not_run_uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    class Breaks(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x

    block = Breaks()
    prepare([block], "none", compile=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        block(torch.ones(3))


def test_every_shape_of_batches_has_graphs_of_its_own(monkeypatch):
    """PyTorch stops behind eight; blocks of one kind share a count."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    block, inputs = nn.Linear(4, 4), [torch.rand(2, n, 4) for n in range(2, 11)]
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):  # as they were, afterwards
        prepare([block], "none", compile=True)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            [block(x) for x in inputs]
        restore([block])
        expected = [block(x) for x in inputs]
        prepare([block], "none", compile=True, shapes=len(inputs))
        torch.testing.assert_close([block(x) for x in inputs], expected)


def test_a_copy_runs_its_own_weights_after_restore():
    model, inputs = generator()
    prepare(model.blocks, "full", compile=False)
    restore(model.blocks)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
    assert not torch.equal(twin(*inputs), model(*inputs))


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="checkpointing is 'some', expected one of none, selective, full"):
        prepare([], "some", compile=False)
