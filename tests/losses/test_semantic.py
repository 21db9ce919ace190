"""Semantic-preservation loss."""

import pytest
import torch

from aligntok.errors import UserError
from aligntok.losses.semantic import semantic_loss


def test_l2_is_a_mean_over_elements():
    z = torch.randn(2, 8, 4, 4)
    assert semantic_loss(z, z).item() == 0
    assert semantic_loss(z + 0.5, z).item() == pytest.approx(0.25)


def test_cosine_ignores_scale_and_sees_direction():
    z = torch.randn(2, 8, 4, 4)
    assert semantic_loss(3 * z, z, "cosine").item() == pytest.approx(0, abs=1e-6)
    assert semantic_loss(-z, z, "cosine").item() == pytest.approx(2, abs=1e-6)
    tokens = z.flatten(2).transpose(1, 2)
    other = torch.randn_like(z)
    by_token = semantic_loss(tokens, other.flatten(2).transpose(1, 2), "cosine", channel_dim=2)
    assert by_token.item() == pytest.approx(semantic_loss(z, other, "cosine").item())


def test_bfloat16_is_summed_in_float32():
    z = torch.full((1, 1024, 16, 16), 1.0)
    assert semantic_loss(z.bfloat16() * 1.0078125, z.bfloat16()).dtype == torch.float32


def test_unknown_kind():
    with pytest.raises(UserError, match="expected l2 or cosine"):
        semantic_loss(torch.zeros(1), torch.zeros(1), "huber")
