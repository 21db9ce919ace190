"""Flow matching: direction, target, loss."""

import pytest
import torch
from torch import nn

from aligntok.config import FlowConfig
from aligntok.diffusion.flow import drop_labels, flow_loss, interpolate, sample_time, training_loss
from aligntok.errors import UserError


def test_time_one_is_noise_and_the_target_leads_there():
    data, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    z, target = interpolate(data, noise, torch.tensor([0.0, 1.0, 0.25]))
    torch.testing.assert_close(z[0], data[0])
    torch.testing.assert_close(z[1], noise[1])
    torch.testing.assert_close(z[2], 0.75 * data[2] + 0.25 * noise[2])
    torch.testing.assert_close(z[2] - 0.25 * target[2], data[2])


def test_loss_is_mse_plus_one_minus_cosine_over_channels():
    v = torch.randn(2, 8, 3, 3)
    assert flow_loss(v, v, 1.0)[0].item() == pytest.approx(0, abs=1e-6)
    loss, values = flow_loss(2 * v, v, 1.0)
    assert values["direction"].item() == pytest.approx(0, abs=1e-6)
    assert loss.item() == pytest.approx(v.square().mean().item(), rel=1e-5)
    assert flow_loss(-v, v, 0.5)[0].item() == pytest.approx(4 * v.square().mean().item() + 1.0, rel=1e-5)


def test_time_sampling():
    torch.manual_seed(0)
    t = sample_time(20_000, "logit_normal")
    assert 0 < t.min() and t.max() < 1
    assert torch.logit(t).mean().abs() < 0.03 and abs(torch.logit(t).std() - 1) < 0.03
    assert abs(sample_time(20_000, "uniform").std() - 12**-0.5) < 0.01
    with pytest.raises(UserError, match="logit_normal or uniform"):
        sample_time(2, "cosine")


def test_dropped_labels_become_the_null_class():
    torch.manual_seed(0)
    labels = drop_labels(torch.full((10_000,), 3), 0.1, null_class=12)
    assert set(labels.tolist()) == {3, 12}
    assert abs((labels == 12).float().mean() - 0.1) < 0.01


class Exact(nn.Module):
    """The optimal velocity for data that is one point: (z - x) / t."""

    def __init__(self, point):
        super().__init__()
        self.point = point

    def forward(self, z, t, labels):
        return (z - self.point) / t.view(-1, 1, 1, 1)


def test_the_optimal_velocity_of_a_single_point_has_no_loss():
    point = torch.randn(1, 4, 2, 2)
    data = point.expand(64, -1, -1, -1)
    loss, _ = training_loss(Exact(point), data, torch.zeros(64, dtype=torch.long), FlowConfig())
    assert loss.item() == pytest.approx(0, abs=1e-5)
