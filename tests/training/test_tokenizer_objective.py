"""The tokenizer's objective: the semantic loss that the adapter computes on its way is the one of the formula."""

import copy

import pytest
import torch
from helpers import tiny_tokenizer

from aligntok.config import DiscriminatorConfig, LossConfig, SemanticConfig, StageConfig, TrainingConfig
from aligntok.losses.semantic import semantic_loss
from aligntok.models import adapter
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.runtime.devices import choose_precision
from aligntok.training.tokenizer_objective import FrozenInputs, TokenizerObjective


def objective(semantic: SemanticConfig) -> tuple[TokenizerObjective, dict, torch.Tensor]:
    """Stage 2, away from its snapshot; a batch; the snapshot's latents for it."""
    tokenizer = tiny_tokenizer()
    frozen = copy.deepcopy(tokenizer)
    with torch.no_grad():
        tokenizer.adapter.projection.bias.add_(0.5)
        batch = {"images": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1}
        batch["rows"] = torch.arange(2)
        target = frozen.raw_latents(batch["images"])
    stage = StageConfig(trains=("encoder", "adapter", "decoder"), steps=1, semantic=semantic)
    discriminator = PatchDiscriminator(DiscriminatorConfig(base_channels=8, layers=1))
    inputs = FrozenInputs(snapshot=lambda batch: target)
    precision = choose_precision("cpu", "fp32")
    return (
        TokenizerObjective(tokenizer, discriminator, None, LossConfig(), stage, inputs, precision, TrainingConfig(2)),
        batch,
        target,
    )


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_semantic_loss_is_that_of_the_formula(kind):
    made, batch, target = objective(SemanticConfig(weight=3.0, kind=kind))
    _, weighted, values = made._forward(batch)
    latents = made.tokenizer.raw_latents(batch["images"])
    expected = semantic_loss(latents, target, kind)
    assert expected > 0
    torch.testing.assert_close(values["semantic"], expected.detach())
    torch.testing.assert_close(weighted, 3 * expected)
    parameters = [made.tokenizer.adapter.projection.weight, made.tokenizer.adapter.hidden.weight]
    found = torch.autograd.grad(weighted, parameters)
    for one, other in zip(found, torch.autograd.grad(3 * expected, parameters), strict=True):
        torch.testing.assert_close(one, other)


def test_stage_2_goes_through_the_fused_pass(monkeypatch):
    """One call of the kernel gives latents and distance, and the distance is what is differentiated."""
    calls = []
    original = adapter.adapter_projection

    def counted(*arguments, **options):
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(adapter, "adapter_projection", counted)
    made, batch, target = objective(SemanticConfig(weight=1.0))
    calls.clear()
    made._forward(batch)
    assert len(calls) == 1 and calls[0][4].untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
