"""torch.compile takes a LightningDiT block, and an adapter with its semantic loss, as one graph."""

import pytest
import torch
from kernel_checks import DEVICE

from aligntok.config import AdapterConfig, LightningDiTConfig
from aligntok.kernels import use_implementation
from aligntok.models.adapter import Adapter
from aligntok.models.lightning_dit import LightningDiT


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _gradients(function, inputs, parameters):
    """Outputs and all gradients, flat."""
    parameters = list(parameters)
    outputs = [y for y in function(*inputs) if y is not None]
    total = sum(y.float().sin().sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(total, [*inputs, *parameters])]


@pytest.mark.parametrize("implementation", ["auto", "triton"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_block_is_one_graph(implementation, qk_norm):
    torch.manual_seed(0)
    config = LightningDiTConfig(size="custom", depth=1, width=64, heads=2, classes=3, qk_norm=qk_norm)
    model = LightningDiT(config, 4, (3, 3)).to(DEVICE)
    block = model.blocks[0]
    torch.nn.init.normal_(block.modulation.weight, std=0.2)
    rope = model._rope((3, 3), torch.device(DEVICE))
    inputs = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in ((2, 9, 64), (2, 64))]

    def step(x, condition):
        x, (h, gate) = block(x, (None, None), condition, rope)
        return x, h, gate

    with use_implementation(implementation):
        expected = _gradients(step, inputs, block.parameters())
        found = _gradients(torch.compile(step, fullgraph=True, backend="aot_eager"), inputs, block.parameters())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_an_adapter_with_its_semantic_loss_is_one_graph(implementation):
    torch.manual_seed(0)
    adapter = Adapter(24, AdapterConfig(latent_channels=8)).to(DEVICE)
    tokens = torch.randn(2, 9, 24, device=DEVICE).requires_grad_()
    snapshot = torch.randn(2, 8, 3, 3, device=DEVICE)

    def step(tokens):
        latents, distance = adapter(tokens, (3, 3), snapshot)
        return latents, distance / latents.numel()

    with use_implementation(implementation):
        expected = _gradients(step, [tokens], adapter.parameters())
        found = _gradients(torch.compile(step, fullgraph=True, backend="aot_eager"), [tokens], adapter.parameters())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
