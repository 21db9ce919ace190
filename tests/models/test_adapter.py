"""The adapter: shapes, the distance to a snapshot, and the fused path beside the plain one."""

import pytest
import torch
from torch.nn import functional as F

from aligntok.config import AdapterConfig
from aligntok.kernels import use_implementation
from aligntok.models.adapter import Adapter

B, GRID, C, D = 2, (2, 3), 24, 5


def adapter(kind: str) -> Adapter:
    torch.manual_seed(0)
    return Adapter(C, AdapterConfig(kind=kind, latent_channels=D))


def tokens() -> torch.Tensor:
    """Encoder tokens: a view past two prefix tokens."""
    return torch.randn(B, 2 + GRID[0] * GRID[1], C, generator=torch.Generator().manual_seed(1))[:, 2:]


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_latents_are_those_of_the_layers_written_out(kind):
    made, h = adapter(kind), tokens()
    hidden = F.gelu(made.hidden(h)) if kind == "mlp" else h
    expected = made.projection(hidden).transpose(1, 2).unflatten(2, GRID)
    assert torch.equal(made(h, GRID), expected)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_distance_and_its_gradients(kind):
    made, snapshot = adapter(kind), torch.randn(B, D, *GRID)
    latents, distance = made(tokens(), GRID, snapshot)
    assert torch.equal(latents, made(tokens(), GRID))
    expected = F.mse_loss(latents, snapshot)
    torch.testing.assert_close(distance / latents.numel(), expected)
    parameters = list(made.parameters())
    found = torch.autograd.grad(distance / latents.numel(), parameters, retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_the_fused_path_agrees(kind):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made, h, snapshot = adapter(kind).to(device), tokens().to(device), torch.randn(B, D, *GRID, device=device)
    results = {}
    for name in ("reference", "triton"):
        with use_implementation(name):
            latents, distance = made(h, GRID, snapshot)
        loss = latents.square().sum() + distance
        results[name] = [latents, distance, *torch.autograd.grad(loss, list(made.parameters()))]
    for one, other in zip(*results.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
