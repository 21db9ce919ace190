"""LightningDiT: positions, symmetries and switches."""

import pytest
import torch
from torch.nn import functional as F

from aligntok.config import LightningDiTConfig
from aligntok.errors import UserError
from aligntok.kernels import qknorm_rope
from aligntok.models.lightning_dit import LightningDiT, rope_table, sincos_table


def small(**options) -> LightningDiT:
    torch.manual_seed(0)
    config = LightningDiTConfig(size="custom", depth=2, width=48, heads=2, classes=5, **options)
    return LightningDiT(config, latent_channels=6, latent_size=(4, 4))


def wake(model: LightningDiT) -> LightningDiT:
    """Give the zero-initialised layers weights, or every output is zero."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of x [B, H, N, D] as the model applies them, without a norm."""
    packed = torch.stack([x.transpose(1, 2)] * 3, dim=2)  # [B, N, 3, H, D]
    return qknorm_rope(packed, None, None, cos, sin)[0].transpose(1, 2)


def test_starts_as_zero_velocity():
    model = small()
    assert not model(torch.randn(3, 6, 4, 4), torch.rand(3), torch.tensor([0, 4, 5])).any()


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"shift": False}, {"patch_size": 2}])
def test_every_trainable_parameter_gets_a_gradient(options):
    model = wake(small(**options))
    model(torch.randn(3, 6, 4, 4), torch.rand(3), torch.tensor([0, 4, 5])).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    assert not model.positions.requires_grad


def test_time_and_label_and_place_matter():
    model = wake(small()).eval()
    z, t, label = torch.randn(1, 6, 4, 4), torch.tensor([0.3]), torch.tensor([1])
    out = model(z, t, label)
    assert not torch.allclose(out, model(z, t + 0.2, label))
    assert not torch.allclose(out, model(z, t, label + 1))
    moved = model(z.roll(1, dims=3), t, label).roll(-1, dims=3)
    assert not torch.allclose(out, moved, atol=1e-3)


def test_images_of_a_batch_do_not_see_each_other():
    model = wake(small()).eval()
    z, t, labels = torch.randn(3, 6, 4, 4), torch.rand(3), torch.tensor([0, 1, 2])
    together = model(z, t, labels)
    alone = torch.cat([model(z[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_other_latent_sizes_work_and_odd_patches_are_refused():
    assert wake(small())(torch.randn(2, 6, 6, 3), torch.rand(2), torch.tensor([0, 1])).shape == (2, 6, 6, 3)
    with pytest.raises(UserError, match="patch size 2"):
        small(patch_size=2)(torch.randn(2, 6, 5, 4), torch.rand(2), torch.tensor([0, 1]))


def test_rotation_makes_scores_depend_on_differences_of_places():
    cos, sin = rope_table((4, 4), head_width=24, trained_side=4)
    q, k = torch.randn(1, 1, 1, 24).expand(1, 1, 16, 24), torch.randn(1, 1, 1, 24).expand(1, 1, 16, 24)
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2))[0, 0].view(4, 4, 4, 4)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[2, 1, 3, 3])
    torch.testing.assert_close(scores[1, 1, 0, 0], scores[3, 2, 2, 1])
    assert not torch.allclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1])
    assert rotate(q, cos, sin).norm(dim=-1) == pytest.approx(q.norm(dim=-1), rel=1e-5)


def test_rotation_of_a_pair_is_the_complex_product():
    cos, sin = rope_table((1, 3), head_width=4, trained_side=3)
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]] * 3]])
    turned = torch.view_as_complex(x[..., 2:]) * torch.polar(torch.ones(3), torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(rotate(x, cos, sin)[..., 2:], torch.view_as_real(turned))


def test_sincos_table_separates_all_places():
    table = F.normalize(sincos_table((16, 16), 384), dim=1)
    similarity = table @ table.T - torch.eye(256)
    assert similarity.max() < 0.999
