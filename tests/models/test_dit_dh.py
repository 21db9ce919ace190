"""DiT^DH's first weights."""

import math

import pytest
import torch

from aligntok.config import LightningDiTConfig
from aligntok.models.dit_dh import DiTDH

TRUNK, HEAD = 64, 192


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"depth": 1, "width": TRUNK, "heads": 2, "head_depth": 1, "head_width": HEAD, "head_heads": 2}
    return DiTDH(LightningDiTConfig(size="custom", classes=200, **sizes), 8, (4, 4))


def test_linears_start_as_pytorchs(model):
    """Uniform up to 1 / sqrt(inputs), biases too; Xavier would reach sqrt(6 / (inputs + outputs))."""
    layers = [model.project]
    for block in (model.blocks[0], model.head_blocks[0]):
        layers += [block.attention.qkv, block.attention.proj, block.mlp.w12, block.mlp.w3]
    for layer in layers:
        bound = layer.in_features**-0.5
        for value in (layer.weight, layer.bias):
            assert 0.9 * bound < value.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    xavier = math.sqrt(2 / (TRUNK + HEAD))
    assert model.project.weight.std() < 0.85 * xavier


def test_modulations_and_output_start_at_zero_and_embeddings_narrow(model):
    zero = [module.modulation for module in (*model.blocks, *model.head_blocks, model.final)] + [model.final.linear]
    assert all(not layer.weight.any() and not layer.bias.any() for layer in zero)
    for weight in (model.label.weight, model.time.mlp[0].weight, model.time.mlp[2].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    with torch.no_grad():
        velocity = model(torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([0, 1]))
    assert not velocity.any()
