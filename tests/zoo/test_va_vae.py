"""VA-VAE's alignment loss against its formula, and its margins."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aligntok.errors import UserError
from aligntok.zoo.va_vae import alignment_loss


def by_loops(z: torch.Tensor, f: torch.Tensor, cosine_margin: float, distance_margin: float) -> float:
    """z [B, C, h, w], f [B, N, C]; tokens one by one."""
    z = z.flatten(2).transpose(1, 2)
    cosines, distances = [], []
    for image in range(len(z)):
        for i in range(z.shape[1]):
            cosines.append(
                max(0.0, 1 - cosine_margin - float(torch.cosine_similarity(z[image, i], f[image, i], dim=0)))
            )
            for j in range(z.shape[1]):
                ours = torch.cosine_similarity(z[image, i], z[image, j], dim=0)
                theirs = torch.cosine_similarity(f[image, i], f[image, j], dim=0)
                distances.append(max(0.0, float((ours - theirs).abs()) - distance_margin))
    return sum(cosines) / len(cosines) + sum(distances) / len(distances)


@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0.0, 0.25, 0.5]))
def test_formula(batch, channels, height, width, margin):
    torch.manual_seed(batch * 100 + channels)
    z, f = torch.randn(batch, channels, height, width), torch.randn(batch, height * width, channels)
    found = alignment_loss(z, f, 2 * margin, margin)
    assert float(found) == pytest.approx(by_loops(z, f, 2 * margin, margin), abs=1e-5)


def test_aligned_latents_cost_nothing_and_have_no_gradient():
    f = torch.randn(2, 6, 8)
    z = (3 * f + 0.1 * torch.randn_like(f)).transpose(1, 2).unflatten(2, (2, 3)).requires_grad_()
    loss = alignment_loss(z, f, cosine_margin=0.5, distance_margin=0.25)
    assert loss == 0
    assert torch.autograd.grad(loss, z)[0].abs().max() == 0
    assert alignment_loss(z, f, 0.0, 0.0) > 0


def test_other_grids_are_refused():
    with pytest.raises(UserError, match=r"tokens \[9, 8\], the latents \[4, 8\]"):
        alignment_loss(torch.zeros(1, 8, 2, 2), torch.zeros(1, 9, 8), 0.5, 0.25)
